"""A GPT-2 small with random weights at 65 % of its parameters against the dense one: prompts, decoding, a step of training.

    python research/benchmarks/models.py [--structures low_rank ...] [--keep 0.65] [--batch 1 8] [--int8] [--compile]
    python research/benchmarks/models.py --folder recommended DIR [...]
    python research/benchmarks/models.py --table

Matrices of the blocks are folded from noise (speed does not depend on the values), so that all parameters together, embedding
included, are that share. Prompts have 128 tokens. float32, layers in mode ``auto``. Results go to
research/results/bench/DEVICE/models.json, row by row; what is there is not measured again. Let nothing else run.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from study import device_folder
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold import api
from tenfold.models.plan import make_plan
from tenfold.models.surgery import replace

WHAT, MATRICES = ("prefill", "decode", "training"), r"re:.*\.(left|right|matrix)"
STRUCTURES = {
    "low_rank": {"kind": "low_rank"},
    "monarch": {"kind": "block_train", "blocks": 4},
    "kronecker": {"kind": "kronecker", "inner": [4, 4]},
    "tensor_train": {"kind": "tensor_train", "parts": 3},
}


ABOUT = """Written by `python research/benchmarks/models.py --table` from `research/results/bench/*/models.json`. GPT-2 small,
random weights, float32, prompts of 128 tokens; **cached W**: layers that multiply by a cached `W` at some numbers of rows, maybe
not at these, and then run as dense layers do, which is no gain of the structure. All rows are of commit 682bcdb or before: the
evaluator was rewritten since, and not measured again here.
"""


def model_of(structure: dict | None, keep: float) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    if structure is not None:
        replace(model, make_plan(model, api.recipe_for(structure, keep, "model")), "noise")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--folder", nargs=2, metavar=("NAME", "DIR"), help="instead of --structures")
    parser.add_argument("--int8", action="store_true", help="factors that are matrices in eight bits, without training")
    parser.add_argument("--compile", action="store_true", help="both models, with a static cache")
    parser.add_argument("--no-training", action="store_true", help="a step at batch 64 needs more than 24 GB")
    parser.add_argument("--keep", type=float, default=0.65)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path, default=Path("research/results/bench"))
    parser.add_argument(
        "--table", action="store_true", help="only write research/speed-models.md from the result files"
    )
    given = parser.parse_args()
    if not given.table:
        measure(given)
    write_table(given.output, Path("research/speed-models.md"))


def measure(given) -> None:
    folder = device_folder(given.output)
    file = folder / "models.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    result["machine"] = {"threads": torch.get_num_threads(), "torch": version("torch")}
    done = {(row["structure"], row["keep"], row["batch"]) for row in result["rows"]}
    for plain in [given.folder[0]] if given.folder else given.structures:
        name = plain + ", int8" * given.int8 + ", compiled" * given.compile
        for batch in given.batch:
            if (name, given.keep, batch) in done:
                continue
            folded = api.load(given.folder[1], "cpu", "float32")[0] if given.folder else None
            model, dense = folded or model_of(STRUCTURES[plain], given.keep), model_of(None, 1.0)
            if given.int8:
                quantize_(model, FqnToConfig({MATRICES: Int8WeightOnlyConfig(version=2)}), filter_fn=None)
            how = {"length": 128, "new_tokens": 32, "repeats": 5, "training": not (given.int8 or given.no_training)}
            speed = api.bench(model, batch, against=dense, compiled=given.compile, **how)
            row = {"structure": name, "keep": given.keep, "batch": batch, "speed": speed}
            row["parameters"] = {"ours": api.price(model)["parameters"], "dense": api.price(dense)["parameters"]}
            result["rows"].append(row)
            file.write_text(json.dumps(result, indent=1) + "\n")
            told = {what: round(speed[what]["ratio"], 2) for what in WHAT if what in speed}
            print(f"{name}, batch {batch}: {told}", flush=True)


def write_table(results: Path, target: Path) -> None:
    lines = ["# A whole model against the dense one\n", ABOUT]
    for file in sorted(results.glob("*/models.json")):
        result = json.loads(file.read_text())
        lines += [f"## {file.parent.name}, torch {result['machine']['torch']}\n"]
        lines += [
            "| structure | parameters | batch | | tokens/s | dense | ratio | MiB | dense MiB | cached W |",
            "|" + "---|" * 10,
        ]
        for row in result["rows"]:
            share = row["parameters"]["ours"]["total"] / row["parameters"]["dense"]["total"]
            for what in (what for what in WHAT if what in row["speed"]):
                one = row["speed"][what]
                lines.append(
                    f"| {row['structure']} | {share:.0%} | {row['batch']} | {what} | {one['tokens_per_second']:,.0f} | "
                    f"{one['dense_tokens_per_second']:,.0f} | {one['ratio']:.2f} | "
                    f"{one['bytes'] / 2**20:,.0f} | {one['dense_bytes'] / 2**20:,.0f} | {cached(row['speed'], what)} |"
                )
        lines.append("")
    target.write_text("\n".join(lines))


def cached(speed: dict, what: str) -> int:
    """Count layers that run on a cached matrix; older results call it kept."""
    return 0 if what == "training" else speed.get("cached", speed.get("kept", 0))


if __name__ == "__main__":
    main()
