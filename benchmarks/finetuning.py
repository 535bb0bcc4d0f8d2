"""Full fine-tuning of an encoder against training only the auxiliary tensors of its matrix product operators (MPOP).

    python benchmarks/finetuning.py --data GLUE --model FOLDER
    python benchmarks/finetuning.py --table

The dense model is trained as a whole; the folded one has the same function at first, because no bond is cut, and of it only the
outer cores, biases, norms and the head are trained. A row is one task, one way and one seed, in a file of its own in
results/finetuning/NAME/: a row whose file is there is not run again. --table writes the means to docs/finetuning.md.

Reference: arXiv 2106.02205 (MPOP, lightweight fine-tuning).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

import tenfold

TASKS = ("cola", "sst2", "mrpc", "rte", "stsb")
RATES = {"full": 1e-4, "auxiliary": 2e-4}
RESULTS = Path("results/finetuning")
SQUARE = {"outs": [4, 4, 4, 3, 2], "ins": [2, 3, 4, 4, 4]}  # of 384 x 384: small cores outside, the largest one inside
WIDE, NARROW = [4, 4, 6, 4, 4], [2, 3, 4, 4, 4]  # of 1536 and 384
SHAPES = {
    ("attn.q", "attn.k", "attn.v", "attn.out", "pooler"): SQUARE,
    ("mlp.in",): {"outs": WIDE, "ins": NARROW},
    ("mlp.out",): {"outs": NARROW, "ins": WIDE},
}
RECIPE = {
    "name": "mpo-384",
    "replace": [
        {"role": list(roles), "structure": {"kind": "tensor_train", "rank": "full"} | shape, "start": "mpo"}
        for roles, shape in SHAPES.items()
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of GLUE")
    parser.add_argument("--model", help="the folder of an encoder of width 384")
    parser.add_argument("--name", help="of the folder of results; the model's unless given")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--ways", nargs="+", default=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="one for each of --ways; 1e-4 and 2e-4 unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--limit", type=int, default=10_000, help="training examples of a task at most")
    parser.add_argument("--dev-limit", type=int)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return write_table(Path("docs/finetuning.md"))
    rates = dict(zip(given.ways, given.rates or [RATES[way] for way in given.ways], strict=True))
    folder = RESULTS / (given.name or Path(given.model).name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        models = {"full": given.model, "auxiliary": folded(given.model, Path(scratch) / "folded")}
        for task in given.tasks:
            for seed in given.seeds:
                for way, rate in rates.items():
                    file = folder / f"{task}-{way}-{seed}.json"
                    if file.exists():
                        continue
                    row = tenfold.finetune(
                        models[way], task, given.data, Path(scratch) / "tuned", train=way, seeds=[seed], learning_rate=rate,
                        epochs=given.epochs, limit=given.limit, dev_limit=given.dev_limit, length=128, overwrite=True,
                    )  # fmt: skip
                    row |= {
                        "model": folder.name,
                        "data": given.data.name,
                        "recipe": RECIPE if way == "auxiliary" else None,
                    }
                    file.write_text(json.dumps(row, indent=1) + "\n")
                    share, seconds = row["parameters"]["share"], row["runs"][0]["seconds"]
                    print(
                        f"{file.stem}: {100 * row['score']['mean']:.1f}, {share:.1%} trained, {seconds:.0f} s",
                        flush=True,
                    )
    return None


def folded(model: str, folder: Path) -> Path:
    """The model with every matrix of its blocks as a matrix product operator of full bonds."""
    dense, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tenfold.compress(dense, RECIPE)
    tenfold.save(dense, folder, tokenizer)
    return folder


HEAD = """# Fine-tuning: all parameters, or the auxiliary tensors only

Dev scores of GLUE, times 100: the mean of the metrics of a task, the mean over the seeds and their standard deviation.
Written by `python benchmarks/finetuning.py --table` from the files in `results/finetuning/`, which have all settings, curves and
versions. `full` trains the dense model; `auxiliary` the same model with its matrices as matrix product operators, of which only
the outer cores, biases, norms and the head are trained (arXiv 2106.02205).
"""


def write_table(target: Path) -> None:
    parts = [HEAD]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        tasks = sorted({row["task"] for row in rows})
        parts += [
            f"## {folder.name}\n",
            f"| trained | share | {' | '.join(tasks)} | mean |",
            "|" + "---|" * (len(tasks) + 3),
        ]
        for way in sorted({row["settings"]["train"] for row in rows}, reverse=True):
            here = [row for row in rows if row["settings"]["train"] == way]
            share = max(row["parameters"]["share"] for row in here)
            scores = {task: [100 * row["score"]["mean"] for row in here if row["task"] == task] for task in tasks}
            means = [statistics.mean(values) for values in scores.values() if values]
            whole = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else ""
            parts.append(f"| {way} | {share:.1%} | {' | '.join(map(shown, scores.values()))} | {whole} |")
        about = {(row["task"], *row["examples"].values(), row["settings"]["epochs"]) for row in rows}
        parts += [
            "",
            "; ".join(f"{t}: {n:,} training and {d:,} dev examples, {e:g} epochs" for t, n, d, e in sorted(about)),
            "",
        ]
    target.write_text("\n".join(parts))


def shown(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


if __name__ == "__main__":
    main()
