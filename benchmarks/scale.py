"""Cost against size: seconds of layers over rows and width, of planning over factors, of a 70-billion-parameter model's plan.

    python benchmarks/scale.py [--only rows width planning models]
    python benchmarks/scale.py --table

Layers at half the parameters, forward, float32, through the factors, beside ``nn.Linear`` in turns. A power law is fitted to the
upper half of every curve. ``models`` is timed with what is installed beside the Python that runs this. Results go to
results/bench/DEVICE/scale.json, curve by curve; what is there is not measured again. Let nothing else run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from speed import FAMILIES, half
from study import device_folder, measured
from torch import nn
from transformers import AutoConfig

from tenfold.evaluate.layers import bench_layers
from tenfold.nn import FactorizedLinear
from tenfold.structure import Structure, TensorTrain, contract
from tenfold.structure.plan import cheapest_plan, plan_of
from tenfold.structure.rebuild import rebuild
from tenfold.structure.worth import CPU

SHAPES = ("low rank", "Monarch, 4 blocks", "tensor train, 3 cores")
KRONECKER = {"kind": "kronecker", "inner": [2, 2], "terms": 1}
ROWS, WIDTHS, MIDDLE = tuple(4**k for k in range(8)), (256, 512, 1024, 2048, 4096, 8192), 512
PARTS = range(2, 8)
LARGE = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
PLAN = """
import sys, tenfold
from tenfold.models.cost import meta_model
print(len(tenfold.plan(meta_model(sys.argv[1]), sys.argv[2]).entries))
"""


def structures(out: int, inner: int) -> dict[str, Structure]:
    found = {name: half(out, inner, FAMILIES[name]) for name in SHAPES}
    return found | {"Kronecker, inner 2 x 2": half(out, inner, KRONECKER)}


def curve(structure: Structure, rows: tuple[int, ...]) -> list[dict]:
    layer = FactorizedLinear(structure)
    layer.set_factors(structure.init(0.02))
    nn.init.zeros_(layer.bias)
    cells = [cell for cell in bench_layers(layer, rows, 5) if cell["pass"] == "forward"]
    return [{key: cell[key] for key in ("rows", "seconds", "dense_seconds", "ratio", "floor")} for cell in cells]


def power(sizes, seconds) -> float:
    """The exponent of ``seconds ~ sizes ** power``, least squares of logarithms over the upper half."""
    upper = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[upper:]), np.log(seconds[upper:]), 1)[0])


def over_rows() -> dict:
    return {name: fitted(name, "rows", curve(one, ROWS)) for name, one in structures(3072, 768).items()}


def over_width() -> dict:
    square = {width: structures(width, width) for width in WIDTHS}
    return {
        name: fitted(name, "width", [{"width": w} | curve(square[w][name], (MIDDLE,))[0] for w in WIDTHS])
        for name in square[WIDTHS[0]]
    }


def fitted(name: str, size: str, points: list[dict]) -> dict:
    sizes = [point[size] for point in points]
    powers = {key: power(sizes, [point[key] for point in points]) for key in ("seconds", "dense_seconds")}
    print(name, {point[size]: round(point["ratio"], 2) for point in points}, powers, flush=True)
    return {"points": points, "powers": powers}


def planning() -> dict:
    """Milliseconds of the plans of a layer for all numbers of rows that it distinguishes, none of them known before."""
    found = {}
    for parts in PARTS:
        structure = TensorTrain(outs=(4,) * parts, ins=(3,) * parts, ranks=(16,) * (parts - 1))
        (place,) = structure.normal_form()
        times = []
        for _ in range(5):
            for known in (contract.forward_plans, contract._through_dense, plan_of, cheapest_plan, rebuild):
                known.cache_clear()
            begun = time.perf_counter()
            for rows in contract.BUCKETS:
                contract.forward_plans(place.diagram, rows, CPU)
            times.append(1e3 * (time.perf_counter() - begun))
        found[parts] = statistics.median(times)
        print(f"planning, {parts} factors: {found[parts]:.1f} ms", flush=True)
    return found


def models() -> dict:
    found, installed = {}, [name for name in OPTIONAL if find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(
            LARGE["model_type"], **{k: v for k, v in LARGE.items() if k != "model_type"}
        ).save_pretrained(folder)
        tenfold = str(Path(sys.executable).parent / "tenfold")
        commands = {
            "inspect": (tenfold, "inspect", folder, "--recipe", "svd-50", "--json"),
            "plan": (sys.executable, "-c", PLAN, folder, "svd-50"),
        }
        for name, command in commands.items():
            run = measured(*command)
            found[name] = {"seconds": round(run["seconds"], 2), "mb": round(run["mb"]), "installed": installed}
            if name == "inspect":
                found[name]["parameters"] = json.loads(run["output"])["parameters"]
            print(name, found[name], flush=True)
    return found


CURVES = {"rows": over_rows, "width": over_width, "planning": planning, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    parser.add_argument("--table", action="store_true", help="only write docs/speed-scale.md from the result files")
    given = parser.parse_args()
    if not given.table:
        file = device_folder(given.output) / "scale.json"
        result = json.loads(file.read_text()) if file.exists() else {}
        result["versions"] = {name: version(name) for name in ("tenfold", "torch", "transformers")}
        torch.manual_seed(0)
        for name in given.only:
            if name not in result:
                result[name] = CURVES[name]()
                file.write_text(json.dumps(result, indent=1) + "\n")
    write_table(given.output, Path("docs/speed-scale.md"))


OPTIONAL = ("torchao", "scipy", "triton")  # transformers imports them where they are installed

ABOUT = """Written by `python benchmarks/scale.py --table` from `results/bench/*/scale.json`. Layers at half the parameters
(Kronecker: one term, half the FLOPs), forward, float32, through the factors: how many times as fast as `nn.Linear`, and the power
of rows or width that seconds grow with in the upper half (and that of `nn.Linear`).
"""


def write_table(results: Path, target: Path) -> None:
    lines = ["# Cost against size\n", ABOUT]
    for file in sorted(results.glob("*/scale.json")):
        result = json.loads(file.read_text())
        lines.append(f"## {file.parent.name}, torch {result['versions']['torch']}\n")
        for what, key, about in (
            ("rows", "rows", "3072 x 768, over rows"),
            ("width", "width", f"square, {MIDDLE} rows, over width"),
        ):
            if what not in result:
                continue
            sizes = [point[key] for point in next(iter(result[what].values()))["points"]]
            lines += [f"{about}:\n", f"| structure | {' | '.join(f'{n:,}' for n in sizes)} | power | dense |"]
            lines += ["|" + "---|" * (len(sizes) + 3)]
            for name, one in result[what].items():
                shown = " | ".join(f"{point['ratio']:.2f}" for point in one["points"])
                powers = " | ".join(f"{one['powers'][k]:.2f}" for k in ("seconds", "dense_seconds"))
                lines.append(f"| {name} | {shown} | {powers} |")
            lines.append("")
        if "planning" in result:
            parts = result["planning"]
            lines += ["Planning of a tensor train, all numbers of rows, once, in milliseconds:\n"]
            lines += [f"| factors | {' | '.join(parts)} |", "|" + "---|" * (len(parts) + 1)]
            lines += [f"| ms | {' | '.join(f'{ms:.1f}' for ms in parts.values())} |", ""]
        for name, one in result.get("models", {}).items():
            lines.append(
                f"- `{name}` of a 70-billion-parameter Llama, recipe `svd-50`: {one['seconds']} s, {one['mb']} MB"
                + ("" if "installed" not in one else f", beside {', '.join(one['installed']) or 'no optional package'}")
            )
        lines.append("")
    target.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
