"""Full fine-tuning of an encoder against training only the auxiliary tensors of its matrix product operators (MPOP).

    python research/benchmarks/finetuning.py --data GLUE --model FOLDER
    python research/benchmarks/finetuning.py --table

The dense model is trained as a whole; the folded one has the same function at first, because no bond is cut, and of it only the
outer cores, biases, norms, the pooler and the head are trained. A row is one task, one way, one learning rate and one seed, in a
file of its own in research/results/finetuning/NAME/: a row whose file is there is not run again. --table writes the means to
docs/finetuning.md.

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
RATES = {"full": [1e-4, 3e-4], "auxiliary": [5e-4, 1e-3]}
RESULTS = Path("research/results/finetuning")
SQUARE = {"outs": [12, 4, 8], "ins": [12, 4, 8]}  # of 384 x 384: outer cores of 144 x 144 and 64 x 64
TALL, WIDE = [16, 8, 12], [12, 4, 8]  # 1536 and 384
SHAPES = {
    ("attn.q", "attn.k", "attn.v", "attn.out"): SQUARE,
    ("mlp.in",): {"outs": TALL, "ins": WIDE},
    ("mlp.out",): {"outs": WIDE, "ins": TALL},
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
    parser.add_argument("--rates", type=float, nargs="+", help="of every way; its own two unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--limit", type=int, default=10_000, help="training examples of a task at most")
    parser.add_argument("--dev-limit", type=int)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return write_table(Path("docs/finetuning.md"))
    rows = [(way, rate) for way in given.ways for rate in given.rates or RATES[way]]
    folder = RESULTS / (given.name or Path(given.model).name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        models = {"full": given.model, "auxiliary": folded(given.model, Path(scratch) / "folded")}
        for task in given.tasks:
            for seed in given.seeds:
                for way, rate in rows:
                    file = folder / f"{task}-{way}-{rate:g}-{seed}.json"
                    if file.exists():
                        continue
                    row = tenfold.finetune(
                        models[way], task, given.data, Path(scratch) / "tuned", method=way, seeds=[seed], learning_rate=rate,
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

Dev scores of GLUE, times 100: the mean of the metrics of a task, and over seeds, with their standard deviation where there
are several. Of one seed, differences of a point or two mean nothing.
Written by `python research/benchmarks/finetuning.py --table` from the files in `research/results/finetuning/`, which have
all settings, curves and versions. `full` trains the dense model; `auxiliary` the same model with its
matrices as matrix product operators, of which only
the outer cores, biases, norms, the pooler and the head are trained (arXiv 2106.02205).
"""


def write_table(target: Path) -> None:
    parts = [HEAD]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        tasks = sorted({row["task"] for row in rows})
        parts += [
            f"## {folder.name}\n",
            f"| trained | share | rate | {' | '.join(tasks)} | mean |",
            "|" + "---|" * (len(tasks) + 4),
        ]
        for way, rate in sorted({kind_of(row) for row in rows}, key=lambda kind: (kind[0] != "full", kind[1])):
            here = [row for row in rows if kind_of(row) == (way, rate)]
            share = max(row["parameters"]["share"] for row in here)
            scores = {task: [100 * row["score"]["mean"] for row in here if row["task"] == task] for task in tasks}
            means = [statistics.mean(values) for values in scores.values() if values]
            whole = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else ""
            parts.append(f"| {way} | {share:.1%} | {rate:g} | {' | '.join(map(shown, scores.values()))} | {whole} |")
        about = {(row["task"], *row["examples"].values(), row["settings"]["epochs"]) for row in rows}
        parts += [
            "",
            "; ".join(f"{t}: {n:,} training and {d:,} dev examples, {e:g} epochs" for t, n, d, e in sorted(about)),
            "",
        ]
    target.write_text("\n".join(parts))


def kind_of(row: dict) -> tuple[str, float]:
    return row["settings"].get("method", row["settings"].get("train")), row["settings"]["learning_rate"]


def shown(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


if __name__ == "__main__":
    main()
