"""The recommended recipe with one setting changed: is what it does by default the better choice?

    python research/benchmarks/variants.py --data DIR --model tenfold/demo --keep 0.8 0.65 0.5

Data, models and scores are those of quality.py. Writes research/results/variants/MODEL.json, run by run; what is
there is not run again.
"""

import copy
import json
import tempfile
import time
from pathlib import Path

from quality import Causal, counted
from study import arguments, results

from tenfold import api
from tenfold.models.recipe import load_recipe

VARIANTS = {
    "recommended": {},
    "equal shares everywhere": {"allocate": "uniform"},
    "shares by influence": {"allocate": "influence"},
    "without the first position": {"skip_first": 1},
    "without the first 4 positions": {"skip_first": 4},
    "without the first 16 positions": {"skip_first": 16},
    "without refit": {"refit": False},
    "without a metric of the outputs": {"output_metric": "none"},
}
ROLES = ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "mlp.in", "mlp.gate", "mlp.out"]
INSTEAD = {
    "low rank or Kronecker sums, chosen per site": [
        {"role": ROLES, "structure": [{"kind": "low_rank"}, {"kind": "kronecker"}]}
    ]
}


def main() -> None:
    parser = arguments(__doc__, [0.8, 0.65, 0.5])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, *INSTEAD])
    parser.add_argument("--samples", type=int, default=192, help="calibration windows")
    given = parser.parse_args()
    file, result = results("variants", given)
    done = {(run["variant"], run["keep"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory() as scratch:
        work = Causal(given.model, given.data, Path(scratch), given.samples)
        result["dense"] = work.score(work.model)
        result["calibration"] = work.calibration.source | {"tokens": work.calibration.tokens}
        blocks = counted(work.model)["blocks"]
        for keep in given.keep:
            for name in given.variants:
                if (name, keep) in done:
                    continue
                recipe, begun = work.recipe("recommended", keep), time.perf_counter()
                changed = recipe.calibrate.model_copy(update=VARIANTS.get(name, {}))
                rules = load_recipe({"replace": INSTEAD[name]}).replace if name in INSTEAD else recipe.replace
                recipe = recipe.model_copy(update={"calibrate": changed, "replace": rules})
                model, _ = api.compress(copy.deepcopy(work.model), recipe, text=work.calibration)
                run = {
                    "variant": name,
                    "keep": keep,
                    "calibrate": VARIANTS.get(name, {}),
                    "kept": counted(model)["blocks"] / blocks,
                }
                run |= {"seconds": round(time.perf_counter() - begun, 1), "scores": work.score(model)}
                result["runs"].append(run)
                file.write_text(json.dumps(result, indent=1) + "\n")
                shown = {kind: round(score["perplexity"], 2) for kind, score in run["scores"].items()}
                print(f"{name} at {keep}: {shown}, {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
