"""Compressed toys in folders, and what exports of them compute where tenfold can't be imported."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import toys
from folding import fold, rules
from safetensors.torch import save_file

from tenfold.models.plan import SitePlan
from tenfold.models.sites import find_sites, weight_of
from tenfold.models.surgery import finish, install, unpack_experts
from tenfold.structure import Dense, Scattered

HERE = Path(__file__).parent
BLOCKS = {"kind": "block_train", "parts": 2, "rank": 2}
TRAIN = {"kind": "tensor_train", "parts": 3, "rank": 4}
EVERY_STRUCTURE = [  # of GPT-2
    {"role": "mlp.in", "structure": TRAIN, "share": {"factors": ["core_1"]}},
    {"role": "attn.out", "structure": {"kind": "placed", "base": {"kind": "kronecker", "terms": 3}}},
    {"role": "attn.qkv", "structure": {"kind": "stacked", "parts": [{"kind": "low_rank", "rank": 3}] * 3}},
    {"role": "mlp.out", "structure": {"kind": "sum", "parts": [BLOCKS, {"kind": "low_rank", "rank": 2}]}},
    {"role": "embed", "structure": {"kind": "low_rank", "rank": 5}},
]  # fmt: skip


def prune(model, units: tuple[int, int], groups: tuple[int, int] | None) -> None:
    """Leave so many hidden units and so many of two groups of two heads (all if None) in each of two blocks, any ones."""
    sites = [site for site in find_sites(model) if site.layer is not None]
    for site in [site for site in sites if groups is not None or site.role.startswith("mlp")]:
        weight, generator = (
            weight_of(model.get_submodule(site.path)).detach(),
            torch.Generator().manual_seed(site.layer),
        )
        mlp, out = site.role.startswith("mlp"), site.role.endswith("out")
        count, number = (weight.shape[out], units[site.layer]) if mlp else (2, groups[site.layer])
        width = weight.shape[out] // count
        kept = torch.randperm(count, generator=generator)[:number].sort().values
        kept = (kept[:, None] * width + torch.arange(width)).flatten()
        matrix, bias = weight.index_select(int(out), kept), getattr(model.get_submodule(site.path), "bias", None)
        structure = Dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
        factors = {"matrix": matrix}
        if mlp and bias is not None and not out:
            bias = bias[kept]
        elif not mlp:
            if bias is not None and not out:  # what is pruned has no bias
                bias = torch.zeros_like(bias).index_copy(0, kept, bias[kept])
            sides = {"map_rows": not out, "map_columns": out}
            structure = Scattered(base=structure, out_features=site.shape[0], in_features=site.shape[1], **sides)
            factors["columns" if out else "rows"] = kept.int()
        install(model, SitePlan(site, structure, site.bias), factors, bias)
    finish(model, "narrow")


def compressed(name: str, folder: Path, recipe: list[dict] | tuple | None = None):
    """Write the compressed toy ``name`` to ``folder``, and its inputs beside it; return its logits."""
    model = toys.build(name)
    if recipe is None and name in toys.EXPERTS:
        unpack_experts(model)
    if isinstance(recipe, tuple):
        prune(model, *recipe)
    else:
        fold(model, recipe or rules(model))
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="20KB")
    save_file(toys.inputs(model), folder.parent / "inputs.safetensors")
    return toys.logits(model)


def in_plain_process(jobs: dict[str, tuple[Path, str]], work: Path) -> dict[str, torch.Tensor | str]:
    """Return logits, or the traceback, of every exported folder."""
    torch.save({name: (str(folder), kind) for name, (folder, kind) in jobs.items()}, work / "jobs.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "plain_process.py", work / "jobs.pt", work / "results.pt"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return torch.load(work / "results.pt")


def auto_class(name: str) -> str:
    return (toys.TOYS | toys.EXPERTS)[name][0]


CASES = {name: (name, None, ("dense", "remote-code")) for name in toys.TOYS}
CASES |= {name: (name, None, ("dense",)) for name in toys.EXPERTS}
CASES |= {"structures": ("gpt2", EVERY_STRUCTURE, ("dense", "remote-code"))}
CASES |= {
    f"narrow-{name}": (name, ((24, 40), (1, 2)), ("dense", "stock", "remote-code"))
    for name in ("llama", "llama-tied", "mistral", "qwen2", "phi")
}
CASES |= {"fewer-heads": ("llama", ((24, 40), (1, 1)), ("stock",))}
