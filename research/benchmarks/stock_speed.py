"""Stock shapes against free ones of as many parameters, and against the dense model: prompts, decoding, a step of training.

    python research/benchmarks/stock_speed.py [--keep 0.65] [--output research/results/stock_speed.json]

A model of GPT-2 small's size with random weights, whose MLPs have lost units: one width everywhere, or widths that differ by
block. Pairs are measured in turns; ratios are medians over the turns. Let nothing else run.
"""

import argparse
import copy
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tenfold
from tenfold.models.plan import SitePlan
from tenfold.models.sites import find_sites
from tenfold.models.surgery import finish, install
from tenfold.structure import Dense


def dense_model(**changed) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**changed)).eval()


def free_model(width: int) -> GPT2LMHeadModel:
    """Return a model whose MLPs have half to one and a half times this width, this one in the mean."""
    model = dense_model()
    layers = model.config.num_hidden_layers
    for site in [site for site in find_sites(model) if site.role.startswith("mlp")]:
        own = width + 8 * round(width / 8 * (site.layer - (layers - 1) / 2) / layers)
        out, inner = (own, site.shape[1]) if site.role == "mlp.in" else (site.shape[0], own)
        plan = SitePlan(site, Dense(out_features=out, in_features=inner), True)
        install(model, plan, {"matrix": 0.02 * torch.randn(out, inner)}, torch.zeros(out))
    finish(model, "narrow")
    return model.eval()


def count(model: GPT2LMHeadModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.65)
    parser.add_argument("--output", type=Path, default=Path("research/results/stock_speed.json"))
    given = parser.parse_args()
    dense, config = dense_model(), GPT2Config()
    gone = (1 - given.keep) * count(dense)
    width = round((4 * config.n_embd - gone / config.n_layer / (2 * config.n_embd + 1)) / 64) * 64
    models = {"stock": dense_model(n_inner=width), "free": free_model(width), "dense": dense}
    result = {
        "parameters": {name: count(model) for name, model in models.items()},
        "machine": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()},
        "versions": {name: version(name) for name in ("tenfold", "torch", "transformers")},
        "rows": [],
    }
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            for other in ("free", "dense"):
                pair = [copy.deepcopy(models[name]).to(dtype) for name in ("stock", other)]
                speed = tenfold.bench(pair[0], batch, length=128, new_tokens=32, against=pair[1], training=batch == 1)
                row = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "against": other}
                for what in ("prefill", "decode", "training"):
                    if what in speed:
                        row[what] = {key: round(speed[what][key], 3) for key in ("tokens_per_second", "ratio")}
                result["rows"].append(row)
                print(row, flush=True)
                given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
