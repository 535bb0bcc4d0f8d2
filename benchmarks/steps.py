"""A training step of a structured model against the dense one, in turns: published recipes for GPT-2 small, two layers of it.

    python benchmarks/steps.py [--recipes ttm-64 ...] [--layers 2] [--output results/steps.json]

A step is forward, backward and AdamW on 4,096 tokens, in float32, with noise for weights. The vocabulary is cut to 1,024 so that
the head, which no recipe changes, does not hide the layers. FLOPs are those of the cheapest plans at 4,096 rows a call. What
is in the result file is not run again.
"""

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold.evaluate.machine import turns
from tenfold.models.cost import price, site_flops
from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe, recipe_names
from tenfold.models.replace import replace
from tenfold.models.sites import find_sites, module_at

TOKENS = (4, 1024)


def model_of(layers: int, recipe: str | None) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_layer=layers, bos_token_id=0, eos_token_id=0))
    if recipe is not None:
        loaded = load_recipe(recipe)
        rules = [rule for rule in loaded.replace if any(rule.matches(site) for site in find_sites(model))]
        replace(model, make_plan(model, loaded.model_copy(update={"replace": rules, "untie": False})), "noise")
    return model.train()


def step_of(model: GPT2LMHeadModel):
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-4), torch.randint(0, 1024, TOKENS)

    def step() -> None:
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/steps.json"))
    given = parser.parse_args()
    result = json.loads(given.output.read_text()) if given.output.exists() else {"rows": {}}
    result["on"] = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": version("torch")}
    dense = model_of(given.layers, None)
    for name in given.recipes:
        if name in result["rows"] or load_recipe(name).stages:
            continue
        try:
            model = model_of(given.layers, name)
        except ValueError as reason:
            print(f"{name}: {reason}", flush=True)
            continue
        pairs = turns(step_of(model), step_of(dense), torch.device("cpu"), given.repeats)
        row = {
            "flops": flops(model) / flops(dense),
            "parameters": price(model)["parameters"]["total"] / price(dense)["parameters"]["total"],
            "seconds": statistics.median(ours for ours, _ in pairs),
            "dense_seconds": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(other / ours for ours, other in pairs),
        }
        result["rows"][name] = row
        given.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {row['ratio']:.2f} times as fast as dense, {row['flops']:.2f} of its FLOPs", flush=True)


if __name__ == "__main__":
    main()
