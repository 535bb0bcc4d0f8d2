"""The part of quality.py that counts bytes: the dense and the recommended model under int8 and int4 weight-only.

torchao quantises every matrix of the blocks, and every factor where a matrix is folded, row by row in groups: int8 with one
group a row, int4 in groups of 64 columns. The values that it would compute with are put back, so that the model runs in
float32 and scores what a kernel for these types would; bytes are those of the integers and of float32 scales. Embeddings,
norms and biases stay in float32.
"""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from tenfold import api
from tenfold.models.sites import find_sites

GROUP = 64


def quantised(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """What ``matrix (out, in)`` becomes, and its bytes."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    out, inner = matrix.shape
    more = -inner % GROUP if bits == 4 else 0
    layer = nn.Linear(inner + more, out, bias=False)
    layer.weight = nn.Parameter(nn.functional.pad(matrix, (0, more)), requires_grad=False)
    whole = nn.Sequential(layer)
    kind = {8: torch.int8, 4: torch.int4}[bits]
    quantize_(whole, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerAxis(0) if bits == 8 else PerGroup(GROUP)))
    groups = out * (1 if bits == 8 else (inner + more) // GROUP)
    return whole[0].weight.dequantize()[:, :inner], matrix.numel() * bits // 8 + 4 * groups


@torch.no_grad()
def quantise(model, bits: int, ends: int | None = None, rest: int = 4) -> int:
    """Quantise the matrices of the blocks of ``model``, in place; returns the bytes of the whole model.

    Args:
        ends: bits of embeddings and heads; they stay as they are unless given.
        rest: bytes of a parameter that stays as it is.
    """
    size, done = sum(rest * p.numel() for p in model.parameters()), set()
    for site in find_sites(model):
        module, kind = model.get_submodule(site.path), bits if site.layer is not None else ends
        for name, p in module.named_parameters() if kind else ():
            if name != "bias" and id(p) not in done:
                done.add(id(p))  # a tied head is its embedding
                flat = p.T if type(module).__name__ == "Conv1D" else p.reshape(-1, p.shape[-1])
                near, held = quantised(flat.float().contiguous(), kind)
                p.copy_((near.T if type(module).__name__ == "Conv1D" else near).reshape(p.shape))
                size += held - rest * p.numel()
    return size


def run_bytes(work, folder: Path, keeps: list[float], again: bool) -> None:
    """One result file per model and number of bits."""
    for keep in (None, *keeps):
        method = "dense" if keep is None else "recommended"
        files = {bits: folder / f"int{bits}-{method}{'' if keep is None else f'-{keep:g}'}.json" for bits in (8, 4)}
        if all(file.exists() for file in files.values()) and not again:
            continue
        model = work.model
        if keep is not None:
            model, _ = api.compress(copy.deepcopy(model), work.recipe(method, keep), text=work.calibration)
        for bits, file in files.items():
            one = copy.deepcopy(model)
            size = quantise(one, bits)
            result = {"method": method, "keep": keep, "bits": bits, "bytes": size, "scores": work.score(one)}
            versions = {name: version(name) for name in ("tenfold", "torch", "torchao", "transformers")}
            file.write_text(
                json.dumps(result | {"group": GROUP if bits == 4 else None, "versions": versions}, indent=1) + "\n"
            )
            print(f"{method} {keep} int{bits}: {size:,} bytes", flush=True)
