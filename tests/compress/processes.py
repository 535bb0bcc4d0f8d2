"""Compressions in memory, by one process or by several, for the tests that compare both."""

import os
import sys
from pathlib import Path

import small
import torch
import torch.distributed as dist
from models import toys

import tenfold
from tenfold.compression.activations import Activations
from tenfold.compression.calibration import Calibration
from tenfold.models.distributed import is_main_process, num_processes

MLP = ["mlp.in", "mlp.gate", "mlp.out"]
ROLES = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", *MLP]
LOW = {"kind": "low_rank"}
CASES = {
    "recommended": ("gpt2", {"replace": [{"prune": "mlp"}, {"prune": "attention"}], "budget": {"keep": 0.7},
                             "calibrate": {"divergence": 64}}),
    "folds": ("llama", {"replace": [{"role": ROLES, "structure": LOW}], "budget": {"keep": 0.7, "of": "blocks"}}),
    "kinds": ("llama", {"replace": [{"role": MLP, "structure": [LOW, {"kind": "kronecker", "inner": [2, 2]}]}],
                        "budget": {"keep": 0.8, "of": "blocks"}}),
    "experts": ("mixtral", {"replace": [{"role": MLP, "structure": LOW}], "budget": {"keep": 0.7, "of": "blocks"}}),
    "few": ("mixtral", {"replace": [{"role": MLP, "structure": LOW, "keep": 0.7}]}),  # tokens, so that experts go without
    "blind": ("llama", {"replace": [{"role": ROLES, "structure": LOW, "keep": 0.5}]}),
}  # fmt: skip


def compressed(case: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the compressed model."""
    kind, recipe = CASES[case]
    torch.manual_seed(0)
    model = small.model() if kind == "gpt2" else toys.build(kind)
    shape = (12, 2 if case == "few" else 16)
    tokens = torch.randint(3, model.get_input_embeddings().weight.shape[0], shape)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(2)]
    text = None if case == "blind" else Calibration(batches, {})
    settings = {} if text is None else {"calibrate": recipe.get("calibrate", {}) | {"precision": "float32"}}
    return tenfold.compress(model, {"name": case} | recipe | settings, text=text)[0].state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    read, init = [], Activations.__init__

    def noted(self, model, blocks, batches, *more):
        read.append(len(batches))
        init(self, model, blocks, batches, *more)

    Activations.__init__ = noted
    for name in CASES:
        found = compressed(name)
        assert num_processes() == 2
        torch.save(found, folder / f"{name}-{'first' if is_main_process() else 'second'}.pt")
    assert set(read) == {3}  # of six batches
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may still be there when the interpreter is taken down, and abort it
