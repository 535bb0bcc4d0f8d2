"""Toys with idle weights: hidden units, and directions of values and queries that have no effect."""

import torch
from models import toys
from transformers.pytorch_utils import Conv1D

# name -> query heads, groups of keys and values, dimensions of a head; idle dimensions of the queries, where some may go
# (None: three directions of any basis)
HEADS = {
    "gpt2": (4, 4, 8, None),
    "bert": (4, 4, 8, None),
    "opt": (4, 4, 8, None),
    "llama": (4, 2, 8, [1, 5]),  # a pair of rotary positions
    "gpt_neox": (4, 4, 8, [0, 1, 5]),  # the two that are rotated, and one that is not
    "phi": (4, 2, 8, [1, 3, 6]),  # likewise, of four that are rotated
    "qwen3": (4, 2, 16, []),  # a norm for every head
    "gemma3_text": (4, 2, 8, []),
}
LOST = 3  # idle dimensions of every head's values
UNITS = 10  # idle hidden units of every MLP


def build(name: str):
    """Return the toy ``name`` and the number of its idle parameters."""
    model, idle = toys.build(name), 0
    for block in _blocks(model):
        with torch.no_grad():
            idle += _hidden(block) + _values(name, block) + _queries(name, block)
    return model, idle


def _blocks(model):
    paths = {"gpt2": "h", "bert": "encoder.layer", "opt": "decoder.layers"}
    return model.base_model.get_submodule(paths.get(model.config.model_type, "layers"))


def _named(block, *names: str):
    """Return weights ``(out, in)`` and biases of the linear layers of these names."""
    found = []
    for path, module in block.named_modules():
        if path in names:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            found.append((weight, module.bias))
    return found


def _hidden(block) -> int:
    into = ["mlp.c_fc", "mlp.gate_proj", "mlp.up_proj", "mlp.fc1", "fc1", "intermediate.dense", "mlp.dense_h_to_4h"]
    out = ["mlp.c_proj", "mlp.down_proj", "mlp.fc2", "fc2", "output.dense", "mlp.dense_4h_to_h"]
    ((reader, _),) = _named(block, *out)
    reader[:, 5 : 5 + UNITS], each = 0.0, len(reader)
    for weight, bias in _named(block, *into):
        weight[5 : 5 + UNITS], each = 0.0, each + weight.shape[1]
        if bias is not None:
            bias[5 : 5 + UNITS], each = 0.0, each + 1
    return UNITS * each


def _values(name: str, block) -> int:
    heads, groups, size, _ = HEADS[name]
    outs = ["attn.c_proj", "self_attn.o_proj", "self_attn.dense", "self_attn.out_proj", "attention.output.dense"]
    ((reader, _),) = _named(block, *outs, "attention.dense")
    for group in range(groups):
        narrow = torch.randn(size - LOST, size)
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            columns = slice(head * size, (head + 1) * size)
            reader[:, columns] = 0.1 * torch.randn(len(reader), size - LOST) @ narrow
    return LOST * groups * (reader.shape[0] + heads // groups * reader.shape[0])


def _queries(name: str, block) -> int:
    heads, groups, size, idle = HEADS[name]
    names = ["attn.c_attn", "self_attn.q_proj", "attention.self.query", "attention.query_key_value"]
    ((weight, bias),) = _named(block, *names)
    for group in range(groups):
        near = torch.eye(size)
        if idle is None:
            wide = torch.randn(size, size - LOST)
            near = wide @ torch.linalg.pinv(wide)
        else:
            near[idle] = 0.0
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            start = head * size * (3 if name == "gpt_neox" else 1)  # there queries, keys and values alternate
            weight[start : start + size] = near @ weight[start : start + size]
            if bias is not None:
                bias[start : start + size] = near @ bias[start : start + size]
    gone = LOST if idle is None else len(idle)
    return gone * groups * (1 + heads // groups) * weight.shape[1]
