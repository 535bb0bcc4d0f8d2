"""Every structure fitted twice at the same size: to the weights alone (Frobenius), and in the metric of its inputs.

    python research/benchmarks/fits.py --data DIR --model tenfold/demo --keep 0.8 0.5
    python research/benchmarks/fits.py --data DIR --model ENCODER --keep 0.5

Data, models and scores are those of quality.py. All matrices get the same share, so that the fit is the only difference. The
fit in the metric starts from the closed form, and stops after 5 rounds. Writes research/results/fits/MODEL.json, run by run.
"""

import copy
import json
import tempfile
import time
from pathlib import Path

from quality import Causal, Encoder, counted
from study import arguments, results
from transformers import AutoModel

from tenfold import api
from tenfold.models.text_mode import is_causal_lm

STRUCTURES = {
    "low rank": {"kind": "low_rank"},
    "Kronecker sum, inner 4 x 4": {"kind": "kronecker", "inner": [4, 4]},
    "tensor train": {"kind": "tensor_train", "parts": 3},
    "block train": {"kind": "block_train"},
    "Monarch, 4 blocks": {"kind": "block_train", "blocks": 4},
    "BLAST": {"kind": "blast", "blocks": 4},
    "Tucker": {"kind": "tucker", "parts": 2},
    "CP": {"kind": "cp", "parts": 2},
    "CP, inputs whole": {"kind": "cp", "parts": [2, 1]},
    "block train + low rank": {"kind": "sum", "parts": [{"kind": "block_train"}, {"kind": "low_rank"}]},
}
FITS = {
    "Frobenius": {
        "input_metric": "none",
        "output_metric": "none",
        "refit": False,
        "bias_correction": False,
        "allocate": "uniform",
    },
    "metric": {
        "input_metric": "second",
        "output_metric": "none",
        "refit": False,
        "bias_correction": True,
        "allocate": "uniform",
    },
    "metric, refit": {
        "input_metric": "second",
        "output_metric": "none",
        "refit": True,
        "bias_correction": True,
        "allocate": "uniform",
    },
}


def recipe_of(work, structure: dict, keep: float, fit: dict) -> dict:
    roles = ["mlp.in", "mlp.gate", "mlp.out"]
    if work.of == "blocks":
        roles += ["attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out"]
    start = {"options": {"sweeps": 5, "tolerance": 1e-4}} if fit["input_metric"] == "second" else "nearest"
    rule = {"role": roles, "structure": structure, "start": start}
    return {"replace": [rule], "budget": {"keep": keep, "of": work.of}, "calibrate": fit}


def main() -> None:
    parser = arguments(__doc__, [0.8, 0.5])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--fits", nargs="+", choices=list(FITS), default=list(FITS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of a causal model")
    given = parser.parse_args()
    file, result = results("fits", given)
    done = {(run["structure"], run["keep"], run["fit"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory() as scratch:
        causal = is_causal_lm(AutoModel.from_pretrained(given.model))
        work = (Causal if causal else Encoder)(given.model, given.data, Path(scratch), given.samples)
        result["dense"] = work.score(work.model)
        result["calibration"] = work.calibration.source | {"tokens": work.calibration.tokens}
        for keep in given.keep:
            for name in given.structures:
                for fit in given.fits:
                    if (name, keep, fit) in done:
                        continue
                    begun = time.perf_counter()
                    recipe = recipe_of(work, STRUCTURES[name], keep, FITS[fit])
                    try:
                        model, _ = api.compress(copy.deepcopy(work.model), recipe, text=work.calibration)
                    except ValueError as reason:
                        print(f"{name} at {keep}: {reason}", flush=True)
                        break
                    took, part = time.perf_counter() - begun, "blocks" if causal else "mlp"
                    kept = counted(model)[part] / counted(work.model)[part]
                    run = {"structure": name, "keep": keep, "fit": fit, "kept": kept, "scores": work.score(model)}
                    result["runs"].append(run | {"seconds": round(took, 1)})
                    file.write_text(json.dumps(result, indent=1) + "\n")
                    shown = (
                        {k: round(v["perplexity"], 1) for k, v in run["scores"].items()} if causal else run["scores"]
                    )
                    print(f"{name} at {keep}, {fit}: {shown}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
