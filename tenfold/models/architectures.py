"""Tables of the matrices of every architecture, one per ``model_type`` of transformers.

A table maps roles to module paths inside the base model; ``*`` is a number (of a layer, a group, an expert). ``embed`` and
``head`` need no entry, since transformers knows their places. ``calls`` counts the calls of a module in one forward pass, for
architectures that apply a layer several times.

To add an architecture: write its table here, and add its name to ``tests/models/toys.py``. docs/architectures.md has an
example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

ROLES = (
    "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out",
    "mlp.in", "mlp.gate", "mlp.in_gate", "mlp.out",
    "embed", "embed.project", "pooler", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Table of one architecture.

    Args:
        paths: role -> path patterns inside the base model.
        calls: config -> the number of calls of a block's module in one forward pass.
        interleaved: roles whose matrix holds several with alternating rows, so that ``split`` can't part them.
        stored: ``(pattern, replacement)`` from names in the model to names in published checkpoints.
        norms: path of a norm -> the roles of the matrices of its block that read it, where LayerNorms, or RMSNorms with a weight
            that is their gain, stand before all that reads the residual stream. Empty: the stream keeps its basis.
    """

    paths: dict[str, str | tuple[str, ...]]
    calls: Callable = lambda config: 1
    interleaved: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _split_attention(block: str, attention: str, out: str = "o_proj") -> dict:
    names = {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.out": out}
    return {role: f"{block}.{attention}.{name}" for role, name in names.items()}


_QKV = ("attn.q", "attn.k", "attn.v")
_LLAMA = Architecture(
    _split_attention("layers.*", "self_attn")
    | {"mlp.gate": "layers.*.mlp.gate_proj", "mlp.in": "layers.*.mlp.up_proj", "mlp.out": "layers.*.mlp.down_proj"},
    norms={
        "layers.*.input_layernorm": _QKV,
        "layers.*.post_attention_layernorm": ("mlp.gate", "mlp.in"),
        "norm": ("head",),
    },
)


_EXPERT = r"\.experts\.each\.(\d+)"
_MIXTRAL = tuple((rf"{_EXPERT}\.{ours}\.weight$", rf".experts.\1.{theirs}.weight")
                 for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")))  # fmt: skip
_MIXTRAL += ((r"\.mlp\.", ".block_sparse_moe."),)
_EACH = ((rf"{_EXPERT}\.(gate|up|down)\.weight$", r".experts.\1.\2_proj.weight"),)


def _with_experts(block: str, shared: str | None = None, stored: tuple[tuple[str, str], ...] = _EACH) -> Architecture:
    """Return the table of Llama with experts in every ``block`` beside plain MLPs, and one ``shared`` by all tokens."""
    experts = {"mlp.gate": f"{block}.experts.each.*.gate", "mlp.in": f"{block}.experts.each.*.up"}
    experts["mlp.out"] = f"{block}.experts.each.*.down"
    paths: dict[str, str | tuple[str, ...]] = dict(_LLAMA.paths)
    for role, path in experts.items():
        name = str(_LLAMA.paths[role]).rpartition(".")[2]
        paths[role] = (str(_LLAMA.paths[role]), path, *([f"{block}.{shared}.{name}"] if shared else []))
    return Architecture(paths, stored=stored)


_GPT = Architecture(
    {
        "attn.qkv": "h.*.attn.c_attn",
        "attn.out": "h.*.attn.c_proj",
        "mlp.in": "h.*.mlp.c_fc",
        "mlp.out": "h.*.mlp.c_proj",
    },
    norms={"h.*.ln_1": ("attn.qkv",), "h.*.ln_2": ("mlp.in",), "ln_f": ("head",)},
)
_BERT = Architecture(
    {
        "attn.q": "encoder.layer.*.attention.self.query",
        "attn.k": "encoder.layer.*.attention.self.key",
        "attn.v": "encoder.layer.*.attention.self.value",
        "attn.out": "encoder.layer.*.attention.output.dense",
        "mlp.in": "encoder.layer.*.intermediate.dense",
        "mlp.out": "encoder.layer.*.output.dense",
        "pooler": "pooler.dense",
    }
)
_ALBERT_LAYER = "encoder.albert_layer_groups.*.albert_layers.*"
_T5_ATTENTION = (
    "encoder.block.*.layer.0.SelfAttention",
    "decoder.block.*.layer.0.SelfAttention",
    "decoder.block.*.layer.1.EncDecAttention",
)
_T5_MLP = ("encoder.block.*.layer.1.DenseReluDense", "decoder.block.*.layer.2.DenseReluDense")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _GPT,
    "openai-gpt": replace(_GPT, norms={}),
    "gpt_neox": Architecture(
        {
            "attn.qkv": "layers.*.attention.query_key_value",
            "attn.out": "layers.*.attention.dense",
            "mlp.in": "layers.*.mlp.dense_h_to_4h",
            "mlp.out": "layers.*.mlp.dense_4h_to_h",
        },
        interleaved=("attn.qkv",),  # head by head: query, key and value of head 0, then those of head 1, ...
        norms={
            "layers.*.input_layernorm": ("attn.qkv",),
            "layers.*.post_attention_layernorm": ("mlp.in",),
            "final_layer_norm": ("head",),
        },
    ),
    "opt": Architecture(
        _split_attention("decoder.layers.*", "self_attn", "out_proj")
        | {"mlp.in": "decoder.layers.*.fc1", "mlp.out": "decoder.layers.*.fc2"}
        | {"embed.project": ("decoder.project_in", "decoder.project_out")},  # where embeddings are narrower
        norms={
            "decoder.layers.*.self_attn_layer_norm": _QKV,
            "decoder.layers.*.final_layer_norm": ("mlp.in",),
            "decoder.final_layer_norm": ("head",),
        },
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": replace(_LLAMA, norms={}),
    "gemma3": Architecture({role: f"language_model.{path}" for role, path in _LLAMA.paths.items()}),
    "mixtral": _with_experts("layers.*.mlp", stored=_MIXTRAL),
    "olmoe": _with_experts("layers.*.mlp"),
    "qwen2_moe": _with_experts("layers.*.mlp", "shared_expert"),
    "qwen3_moe": _with_experts("layers.*.mlp"),
    "phi": Architecture(
        _split_attention("layers.*", "self_attn", "dense")
        | {"mlp.in": "layers.*.mlp.fc1", "mlp.out": "layers.*.mlp.fc2"},
        norms={"layers.*.input_layernorm": (*_QKV, "mlp.in"), "final_layernorm": ("head",)},
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "albert": Architecture(
        {
            "attn.q": f"{_ALBERT_LAYER}.attention.query",
            "attn.k": f"{_ALBERT_LAYER}.attention.key",
            "attn.v": f"{_ALBERT_LAYER}.attention.value",
            "attn.out": f"{_ALBERT_LAYER}.attention.dense",
            "mlp.in": f"{_ALBERT_LAYER}.ffn",
            "mlp.out": f"{_ALBERT_LAYER}.ffn_output",
            "embed.project": "encoder.embedding_hidden_mapping_in",
            "pooler": "pooler",
        },
        calls=lambda config: config.num_hidden_layers // config.num_hidden_groups,
    ),
    "t5": Architecture(
        {
            "attn.q": tuple(f"{path}.q" for path in _T5_ATTENTION),
            "attn.k": tuple(f"{path}.k" for path in _T5_ATTENTION),
            "attn.v": tuple(f"{path}.v" for path in _T5_ATTENTION),
            "attn.out": tuple(f"{path}.o" for path in _T5_ATTENTION),
            "mlp.in": (*(f"{path}.wi" for path in _T5_MLP), *(f"{path}.wi_1" for path in _T5_MLP)),
            "mlp.gate": tuple(f"{path}.wi_0" for path in _T5_MLP),
            "mlp.out": tuple(f"{path}.wo" for path in _T5_MLP),
        }
    ),
}
