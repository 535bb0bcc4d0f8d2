"""Layers against nn.Linear: what published recipes put into GPT-2 small, and every family at half the parameters.

    python benchmarks/speed.py [--only recipes families halves heads] [--names ttm-64 ...] [--again 1]
    python benchmarks/speed.py --table

Forward at 1, 512 and 4,096 rows, forward and backward at 4,096; float32, medians of turns in one run, each beside the least
time that its FLOPs and bytes take on this machine. A row that runs on a kept matrix is a dense layer, and marked so. Results go
to results/bench/DEVICE/layers.json, set by set; what is there is not measured again, unless it is marked as ``of`` an earlier
version; ``--again`` measures cells with so many rows anew, and leaves the others. Let nothing else run.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from study import device_folder
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold.evaluate.layers import bench_layers
from tenfold.evaluate.machine import bytes_per_second, flops_per_second
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe, recipe_names
from tenfold.models.replace import install_empty, replace
from tenfold.models.symmetry_maps import fold_maps
from tenfold.nn import FactorizedLinear
from tenfold.nn.kept import keep_matrices
from tenfold.structure import Structure

SHAPES, HEAD = ((3072, 768), (768, 3072), (768, 768)), (50257, 768)
FAMILIES = {
    "low rank": {"kind": "low_rank"},
    "Kronecker sum, inner 4 x 4": {"kind": "kronecker", "inner": [4, 4]},
    "tensor train, 3 cores": {"kind": "tensor_train", "parts": 3},
    "tensor train, 4 cores": {"kind": "tensor_train", "parts": 4},
    "block train": {"kind": "block_train"},
    "Monarch, 4 blocks": {"kind": "block_train", "blocks": 4},
    "BLAST": {"kind": "blast", "blocks": 4},
    "Tucker": {"kind": "tucker", "parts": 2},
    "CP, 2 modes": {"kind": "cp", "parts": 2},
    "CP, 3 modes": {"kind": "cp", "parts": 3},
    "block train + low rank": {"kind": "sum", "parts": [{"kind": "block_train"}, {"kind": "low_rank"}]},
}


def one_term(inner: list[int]) -> dict:
    return {"kind": "kronecker", "inner": inner, "terms": 1}


HALVES = {  # of the FLOPs
    "Kronecker (3072 x 384)(1 x 2)": [one_term([1, 2]), one_term([2, 1])],
    "Kronecker (1536 x 384)(2 x 2)": [one_term([2, 2])] * 2,
    "low rank": [FAMILIES["low rank"]] * 2,
    "Monarch, 4 blocks": [FAMILIES["Monarch, 4 blocks"]] * 2,
}
ROWS = (1, 512, 4096)


def published(name: str) -> list[Structure]:
    """The structures of the linear layers of a recipe for GPT-2 small, as they are when it is compressed."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    plan = make_plan(model, recipe)
    if any(entry.structure.index_shapes() for entry in plan.entries.values()):  # hidden units take some maps over
        model = GPT2LMHeadModel(GPT2Config())
        replace(model, plan, "noise")
        fold_maps(model)
    else:
        install_empty(model, plan)
    found = [
        model.get_submodule(path).structure for path, entry in plan.entries.items() if entry.site.layer is not None
    ]
    return [one for one in dict.fromkeys(found) if isinstance(one, Structure)]


def half(out: int, inner: int, fields: dict) -> Structure:
    """The largest structure of at most half the parameters; a vocabulary that its sizes do not divide is padded."""
    for rows in (out, -(-out // 64) * 64):
        try:
            if "terms" in fields:
                return Structure.family(fields["kind"]).for_shape(rows, inner, fields)
            return Structure.within(rows, inner, fields, rows * inner / 2 + 16)
        except ValueError:
            continue
    raise ValueError(f"{fields} does not fit {out} x {inner}")


def sets() -> dict[tuple[str, str], list[Structure]]:
    """``{(group, name): structures}``"""
    found = {}
    for name in recipe_names():
        if load_recipe(name).on == "gpt2" and not load_recipe(name).stages:
            found["recipes", name] = published(name)
    for name, fields in FAMILIES.items():
        found["families", name] = [half(out, inner, fields) for out, inner in SHAPES]
        found["heads", name] = [half(*HEAD, fields)]
    for name, pair in HALVES.items():
        some = zip(SHAPES, pair, strict=False)
        found["halves", name] = [half(out, inner, fields) for (out, inner), fields in some]
    return found


def cells_of(structure: Structure, rows=ROWS) -> list[dict]:
    """Through the factors (mode ``memory``); and what mode ``speed`` changes: kept matrices, and training that keeps more."""
    layer = FactorizedLinear(structure)
    layer.set_factors(structure.init(0.02))
    nn.init.zeros_(layer.bias)
    repeats, found = 3 if max(structure.shape) > 10_000 else 7, []
    for mode in ("memory", "speed"):
        keep_matrices(layer, mode)
        for count in rows:
            found += [{"mode": mode} | cell for cell in bench_layers(layer, [count], repeats, backward=count > 1)]
    return [cell for cell in found if cell["mode"] == "memory" or cell["kept"] or cell["pass"] != "forward"]


def renewed(cells: list[dict], newer: list[dict]) -> list[dict]:
    """``cells``, those of them replaced that are in ``newer``, too."""

    def key(cell: dict) -> str:
        return json.dumps([cell[name] for name in ("mode", "structure", "layers", "rows", "pass", "kept")])

    by_key = {key(cell): cell for cell in newer}
    return [by_key.get(key(cell), cell) for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--again", type=int, nargs="+", choices=ROWS)
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    parser.add_argument("--table", action="store_true", help="only write docs/speed-layers.md from the result files")
    given = parser.parse_args()
    if given.table:
        write_table(given.output, Path("docs/speed-layers.md"))
        return
    folder = device_folder(given.output)
    file, cpu = folder / "layers.json", torch.device("cpu")
    result = json.loads(file.read_text()) if file.exists() else {"sets": []}
    result["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": version("torch")}
    result["machine"] |= {
        "flops_per_second": flops_per_second(cpu, torch.float32),
        "bytes_per_second": bytes_per_second(cpu),
    }
    result["sets"] = [one for one in result["sets"] if "of" not in one or one["group"] not in given.only]
    done = {(one["group"], one["name"]) for one in result["sets"]}
    for (group, name), structures in sets().items():
        known = (group, name) in done
        if group not in given.only or (given.names and name not in given.names) or known != bool(given.again):
            continue
        torch.manual_seed(0)
        cells = [cell for structure in structures for cell in cells_of(structure, given.again or ROWS)]
        if known:
            (one,) = (one for one in result["sets"] if (one["group"], one["name"]) == (group, name))
            one["cells"] = renewed(one["cells"], cells)
        else:
            result["sets"].append({"group": group, "name": name, "cells": cells})
        file.write_text(json.dumps(result, indent=1) + "\n")
        for cell in cells:
            what = f"{cell['shape'][0]} x {cell['shape'][1]}, {cell['rows']} rows, {cell['pass']}, {cell['mode']}"
            print(f"{group}, {name}, {what}: {shown_of(cell)}", flush=True)


ABOUT = """Written by `python benchmarks/speed.py --table` from `results/bench/*/layers.json`: how many times as fast as
`nn.Linear` of the same shape in the same run (medians of turns, float32), and in brackets the most that the FLOPs and bytes of
the cheapest plan allow at the rates of a large product and a large copy, each measured once at the start (machines change
meanwhile). **memory**: through the factors, nothing kept but the input. **speed**: a kept matrix in evaluation, which makes the
layer a dense one and is never a gain (marked *dense*); in training what lies between two products is kept where it is no larger
than the input, or the matrix until the way back. One row is timed on more copies of a layer than a cache holds, as it is read in
a model.
"""
PASSES = [("forward", rows) for rows in ROWS] + [("forward + backward", rows) for rows in ROWS[1:]]


GROUPS = ["recipes", "families", "halves", "heads"]
GAIN = 1.05  # less is not told from the noise of these medians
SUMMED = """All layers of a row together, through the factors (mode **memory**), seconds of dense ones over theirs;
**training** is forward and backward; **parameters** are a share of the dense layers'. Bold: faster than dense by more
than 5 %. What is not bold saves storage only; see [speed.md](speed.md) for what a kept matrix does.
"""


def summary_of(sets: list[dict]) -> list[str]:
    """What saves storage, what saves time, and with how many rows."""
    shown = [f"{'training' if name != 'forward' else name}, {rows:,}" for name, rows in PASSES]
    lines = [SUMMED, f"| | parameters | {' | '.join(shown)} |", "|" + "---|" * (2 + len(PASSES))]
    for one in sorted(sets, key=lambda one: GROUPS.index(one["group"])):
        own = [cell for cell in one["cells"] if cell["mode"] == "memory"]
        if "of" in one or not own:
            continue
        shapes = {json.dumps(cell["structure"]): cell for cell in own}.values()
        held = sum(Structure.from_json(cell["structure"]).numel for cell in shapes)
        share, ratios = held / sum(cell["shape"][0] * cell["shape"][1] for cell in shapes), []
        for which in PASSES:
            some = [cell for cell in own if (cell["pass"], cell["rows"]) == which]
            ratio = sum(cell["dense_seconds"] for cell in some) / sum(cell["seconds"] for cell in some)
            ratios.append(f"**{ratio:.2f}**" if ratio > GAIN else f"{ratio:.2f}")
        among = {"halves": ", half the FLOPs", "heads": ", head"}.get(one["group"], "")
        lines.append(f"| {one['name']}{among} | {share:.1%} | {' | '.join(ratios)} |")
    return [*lines, ""]


DEFAULT = """What users have unless they say otherwise, mode **auto**: the layers of a row in {blocks} blocks, called one after
the other (`python benchmarks/auto.py`). As many keep their matrix in evaluation as fit into the bytes of the dense layers; in
brackets the share of them that does: these run as dense layers do, and gain nothing over them.
"""


def default_of(file: Path) -> list[str]:
    """The table of mode ``auto``."""
    if not file.exists():
        return []
    result = json.loads(file.read_text())
    shown = [f"{'training' if name != 'forward' else name}, {rows:,}" for name, rows in PASSES]
    lines = [DEFAULT.format(blocks=result["blocks"]), f"| | {' | '.join(shown)} |", "|" + "---|" * (1 + len(PASSES))]
    for one in sorted(result["sets"], key=lambda one: GROUPS.index(one["group"])):
        by = {(cell["pass"], cell["rows"]): cell for cell in one["cells"]}
        cells = [by[which] for which in PASSES]
        ratios = [f"**{cell['ratio']:.2f}**" if cell["ratio"] > GAIN else f"{cell['ratio']:.2f}" for cell in cells]
        kept = [f" ({cell['kept'] / cell['layers']:.0%})" if cell["kept"] else "" for cell in cells]
        lines.append(f"| {one['name']} | {' | '.join(map(''.join, zip(ratios, kept, strict=True)))} |")
    return [*lines, ""]


PEAK = """Memory of a training step in mode **memory** (`python benchmarks/peak.py`), MiB, parameters included: that of the layer
with so many rows, and in brackets that of a dense one and one `W`.
"""


def peaks_of(file: Path) -> list[str]:
    """The table of the memory of training steps."""
    if not file.exists():
        return []
    lines = [PEAK]
    for number, one in enumerate(json.loads(file.read_text())["sets"]):
        if number == 0:
            shown = [f"{' x '.join(map(str, cell['shape']))}, {cell['rows']:,}" for cell in one["cells"]]
            lines += [f"| | {' | '.join(shown)} |", "|" + "---|" * (1 + len(shown))]
        most = [(cell["bytes"], cell["dense_bytes"] + cell["w_bytes"]) for cell in one["cells"]]
        lines.append(f"| {one['name']} | {' | '.join(f'{a / 2**20:.1f} ({b / 2**20:.1f})' for a, b in most)} |")
    return [*lines, ""]


def write_table(results: Path, target: Path) -> None:
    lines = ["# Layers against dense ones\n", ABOUT]
    for file in sorted(results.glob("*/layers.json")):
        result = json.loads(file.read_text())
        machine = result["machine"]
        lines += [
            f"## {file.parent.name}\n",
            f"torch {machine['torch']}; {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s and "
            f"{machine['bytes_per_second'] / 1e9:,.0f} GB/s at the last set.\n",
            *summary_of(result["sets"]),
            *default_of(file.with_name("auto.json")),
            *peaks_of(file.with_name("peak.json")),
            f"| set | shape | mode | {' | '.join(f'{name}, {rows:,}' for name, rows in PASSES)} |",
            "|" + "---|" * (3 + len(PASSES)),
        ]
        for one in result["sets"]:
            shapes = dict.fromkeys((json.dumps(cell["structure"]), tuple(cell["shape"])) for cell in one["cells"])
            for structure, (out, inner) in shapes:
                for mode in ("memory", "speed"):
                    own = {
                        (cell["pass"], cell["rows"]): cell
                        for cell in one["cells"]
                        if (json.dumps(cell["structure"]), cell["mode"]) == (structure, mode)
                    }
                    shown = [shown_of(own.get(which)) for which in PASSES]
                    name = one["name"] + (f" ({one['of']})" if "of" in one else "")
                    lines.append(f"| {name} | {out} x {inner} | {mode} | {' | '.join(shown)} |")
        lines.append("")
    target.write_text("\n".join(lines))


def shown_of(cell: dict | None) -> str:
    if cell is None:
        return ""
    return f"{cell['ratio']:.2f} " + ("*dense*" if cell["kept"] else f"({cell['dense_seconds'] / cell['floor']:.2f})")


if __name__ == "__main__":
    main()
