"""A training step of a structured model against the dense one, in turns: published recipes for GPT-2 small, two layers of it.

    python benchmarks/steps.py [--recipes ttm-64 ...] [--layers 2] [--accumulate 1 2]
    python benchmarks/steps.py --table

A step is forward and backward on 4,096 tokens, once or several times (accumulate), and AdamW, in float32, with noise for
weights, in mode auto. The vocabulary is cut to 1,024 so that the head, which no recipe changes, does not hide the layers. FLOPs
are those of the cheapest plans at 4,096 rows a call. Results go to results/bench/DEVICE/steps.json; what is there is not run
again. Let nothing else run. --table writes docs/speed-steps.md.
"""

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from study import device_folder
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold.evaluate.machine import turns
from tenfold.models.cost import price, site_flops
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe, recipe_names
from tenfold.models.replace import replace
from tenfold.models.sites import find_sites, module_at
from tenfold.nn.kept import keep_matrices

TOKENS = (4, 1024)
ABOUT = """Written by `python benchmarks/steps.py --table` from `results/bench/*/steps.json`: a step of training of two layers of
GPT-2 small (vocabulary of 1,024, random weights, float32, mode auto) on 4,096 tokens a call, forward, backward and AdamW; medians
of turns in one run. **Faster than dense**: the dense model's seconds over the structured one's. With two calls a step (gradients
of two micro-batches are summed) a `W` that the first has made serves the second, in the layers that may keep one.
"""


def model_of(layers: int, recipe: str | None) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_layer=layers, bos_token_id=0, eos_token_id=0))
    if recipe is not None:
        loaded = load_recipe(recipe)
        inside = [site for site in find_sites(model) if site.layer is not None]
        rules = [rule for rule in loaded.replace if any(rule.matches(site) for site in inside)]
        replace(model, make_plan(model, loaded.model_copy(update={"replace": rules, "untie": False})), "noise")
    return model.train()


def step_of(model: GPT2LMHeadModel, accumulate: int):
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-4), torch.randint(0, 1024, TOKENS)

    def step() -> None:
        for _ in range(accumulate):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(model: GPT2LMHeadModel) -> int:
    rows = TOKENS[0] * TOKENS[1]
    inside = [site for site in find_sites(model) if site.layer is not None]
    return sum(site_flops(site, module_at(model, site.path), rows) for site in inside) // rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[n for n in recipe_names() if load_recipe(n).on == "gpt2"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return write_table(given.output, Path("docs/speed-steps.md"))
    file = device_folder(given.output) / "steps.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    result["torch"] = version("torch")
    dense = model_of(given.layers, None)
    there = {(row["recipe"], row["calls"]) for row in result["rows"]}
    for name in given.recipes:
        for calls in given.accumulate:
            if (name, calls) in there or load_recipe(name).stages:
                continue
            try:
                model = model_of(given.layers, name)
            except ValueError as reason:
                print(f"{name}: {reason}", flush=True)
                continue
            row = {"recipe": name, "calls": calls} | measured(model, dense, calls, given.repeats)
            result["rows"].append(row)
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{name}, {calls} a step: {row['ratio']:.2f} times as fast, {row['flops']:.2f} of the FLOPs", flush=True
            )
    return None


def measured(model: GPT2LMHeadModel, dense: GPT2LMHeadModel, calls: int, repeats: int) -> dict:
    kept = keep_matrices(model, "auto")["layers"]
    pairs = turns(step_of(model, calls), step_of(dense, calls), torch.device("cpu"), repeats)
    return {
        "flops": flops(model) / flops(dense),
        "parameters": price(model)["parameters"]["total"] / price(dense)["parameters"]["total"],
        "kept": kept,
        "seconds": statistics.median(ours for ours, _ in pairs),
        "dense_seconds": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / ours for ours, other in pairs),
    }


def write_table(results: Path, target: Path) -> None:
    lines = ["# A step of training against the dense model's\n", ABOUT]
    for file in sorted(results.glob("*/steps.json")):
        result = json.loads(file.read_text())
        lines += [f"## {file.parent.name}, torch {result['torch']}\n"]
        lines += [
            "| recipe | calls a step | FLOPs of the layers | parameters | layers that may keep a `W` | faster than dense |"
        ]
        lines += ["|" + "---|" * 6]
        for row in result["rows"]:
            lines.append(
                f"| {row['recipe']} | {row['calls']} | {row['flops']:.2f} | {row['parameters']:.0%} | {row['kept']} | "
                f"{row['ratio']:.2f} |"
            )
        lines.append("")
    target.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
