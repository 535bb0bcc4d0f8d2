"""Write the tables of docs/real-models.md, between its markers, from the result files of real_models.py alone.

python research/benchmarks/real_table.py
"""

import argparse
import json
import math
import sys
from pathlib import Path

BEGIN, END = "<!-- written by research/benchmarks/real_table.py -->", "<!-- end of what it writes -->"
TOKENS, WORDS = "WikiText-2, nats per token", "WikiText-2, nats per word"
# method, model, kept, perplexity, that of the dense model in the same paper, protocol
PUBLISHED = [
    ("LEMS", "Llama-3-8B", 0.8, 8.16, 6.14, TOKENS),
    ("MoDeGPT", "Llama-3-8B", 0.8, 9.01, 6.24, TOKENS),
    ("SVD-LLM", "Llama-3-8B", 0.8, 14.8, None, TOKENS),
    ("ROCKET", "Llama-3.2-1B", 0.8, 18, 11.6, WORDS),
    ("CoSpaDi", "Llama-3.2-1B", 0.8, 64, None, WORDS),
    ("SVD-LLM", "Llama-3.2-1B", 0.8, 170, None, WORDS),
    ("narrowing without data", "Llama-3.2-1B", 0.83, 25.1, None, WORDS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("research/results/real"))
    parser.add_argument("--output", type=Path, default=Path("docs/real-models.md"))
    given = parser.parse_args()
    try:
        write_tables(given.results, given.output)
    except (OSError, ValueError) as reason:
        sys.exit(f"real_table: {reason}")


def write_tables(results: Path, output: Path) -> None:
    """Write what is between the markers of ``output``.

    Raises:
        ValueError: they are not there.
    """
    text = output.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{output} must hold the lines {BEGIN} and {END} once each; write them there")
    before, rest = text.split(BEGIN)
    parts = [part for folder in sorted(results.glob("*/")) for part in model_tables(folder)]
    output.write_text(before + "\n".join([BEGIN, "", *parts, *published(), END]) + rest.split(END)[1])


def model_tables(folder: Path) -> list[str]:
    """Return the section of one model: a table for every size; none until its dense row is there."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))]
    dense = next((row for row in rows if row["contender"] == "dense" and "scores" in row and "bits" not in row), None)
    if dense is None:
        return []
    scores, asked, machine = dense["scores"], dense["inputs"]["scored"], dense["scores"]["machine"]
    names = [name for name in scores["texts"] if name != "kl"]
    where = " ".join(str(machine[key]) for key in ("device", "cpu") if key in machine)
    parts = [
        f"## {folder.name}\n",
        f"{scores['size']['parameters']:,} parameters, {scores['size']['without_embeddings']:,} of them outside of the "
        f"embeddings. Perplexity per token on the first {scores['texts'][names[0]]['tokens']:,} tokens of each text, windows of "
        f"{asked['window']:,} tokens that do not overlap, in {machine['dtype']} ({where}, {machine['threads']} threads).\n",
    ]
    quantised = [row for row in rows if "bits" in row and "scores" in row]
    made = [row for row in rows if row["contender"] != "dense" and "bits" not in row]
    for keep in sorted({row["keep"] for row in made}, reverse=True):
        here = [row for row in made if row["keep"] == keep and "scores" in row]
        here.sort(key=lambda row: times_dense(row, dense, names))
        for healed, told in ((False, ""), (True, ", healed")):
            some = [row for row in here if ("healed" in row) == healed]
            if some:
                parts += [f"### {keep:.0%} of the model{told}\n", *table([dense, *some], dense, names), ""]
        failed = [row for row in made if row["keep"] == keep and "scores" not in row]
        parts += [f"{row['contender']}{told_healed(row)} failed: {row['failed']}\n" for row in failed]
    if quantised:
        quantised.sort(key=lambda row: -row["scores"]["size"]["bytes"])
        parts += ["### Quantised\n", *table(quantised, dense, names), ""]
    return parts


def told_healed(row: dict) -> str:
    """Return with how many tokens a row was healed, nothing where it was not."""
    return f", healed with {row['healed']['tokens']:,} tokens at {row['healed']['rate']:g}," if "healed" in row else ""


def table(rows: list[dict], dense: dict, names: list[str]) -> list[str]:
    """Return one table; columns that no row has figures for are left out."""
    base = dense["scores"]["size"]
    columns = {
        "method": lambda row, scores: (
            f"**{row['contender']}**" if row["contender"] == "recommended" else row["contender"]
        ),
        "bits": lambda row, scores: str(row.get("bits", "")),
        "tokens": lambda row, scores: f"{row['healed']['tokens']:,}" if "healed" in row else "",
        "rate": lambda row, scores: f"{row['healed']['rate']:g}" if "healed" in row else "",
        "kept": lambda row, scores: f"{scores['size']['parameters'] / base['parameters']:.3f}",
        "without embeddings": lambda row, scores: (
            f"{scores['size']['without_embeddings'] / base['without_embeddings']:.3f}"
        ),
        **{name: lambda row, scores, name=name: number(scores["texts"][name]["perplexity"]) for name in names},
        "times dense": lambda row, scores: f"{times_dense(row, dense, names):.2f}",
        f"whole {names[0]}": lambda row, scores: number(scores["full"]["perplexity"]) if "full" in scores else "",
        "KL": lambda row, scores: f"{scores['texts']['kl']:.3f}" if "kl" in scores["texts"] else "",
        "LAMBADA %": lambda row, scores: f"{100 * scores['lambada']['accuracy']:.1f}" if "lambada" in scores else "",
        "LAMBADA perplexity": lambda row, scores: (
            number(scores["lambada"]["perplexity"]) if "lambada" in scores else ""
        ),
        "MB": lambda row, scores: f"{scores['size']['bytes'] / 1e6:,.0f}",
        "FLOPs": lambda row, scores: f"{scores['size']['flops_per_token'] / base['flops_per_token']:.3f}",
        "seconds": lambda row, scores: f"{row['made']['seconds']:,.0f}" if row["made"] else "",
        "peak MB": lambda row, scores: f"{row['made']['mb']:,}" if row["made"] else "",
    }
    cells = [[show(row, row["scores"]) for show in columns.values()] for row in rows]
    used = [k for k in range(len(columns)) if any(row[k] for row in cells)]
    heads = list(columns)
    lines = [[heads[k] for k in used], ["---"] * len(used)] + [[row[k] for k in used] for row in cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def times_dense(row: dict, dense: dict, names: list[str]) -> float:
    """Return the perplexity as a multiple of the dense model's, the geometric mean over the texts."""
    ratios = [row["scores"]["texts"][n]["perplexity"] / dense["scores"]["texts"][n]["perplexity"] for n in names]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def published() -> list[str]:
    """Return the table of what papers report, each by its own protocol."""
    lines = [
        "## What papers report\n",
        "Without training after the compression. Models, calibration texts and protocols are others than above, so that only the "
        "last column, as a multiple of the dense model in the same paper, says something beside **times dense**.\n",
        "| method | model | kept | perplexity | dense | protocol | times dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, model, keep, value, dense, protocol in PUBLISHED:
        ratio = f"{value / dense:.2f}" if dense else ""
        lines.append(f"| {method} | {model} | {keep:.0%} | {value:g} | {dense or ''} | {protocol} | {ratio} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
