"""The sections of docs/quality.md behind the baselines: from the result files of fits.py, variants.py and healed.py."""

import json
from pathlib import Path


def studies(results: Path, kinds: tuple[str, ...]) -> list[str]:
    """``results`` holds the folders ``fits``, ``variants`` and ``healed``; what is not there is left out."""
    lines: list[str] = []
    for folder, title, table in (
        ("fits", "Fits in the metric of the inputs against Frobenius fits", fits),
        ("variants", "The recommended recipe with one setting changed", variants),
        ("healed", "Without training against Kronecker decomposition and healing", healed),
    ):
        files = sorted((results / folder).glob("*.json"))
        if files:
            lines.append(f"## {title}\n")
        for file in files:
            lines += [f"### {file.stem}\n", *table(json.loads(file.read_text()), kinds), ""]
    return lines


def fits(result: dict, kinds: tuple[str, ...]) -> list[str]:
    """A row for every structure and size, a column for every fit."""
    names = list(dict.fromkeys(run["fit"] for run in result["runs"]))
    runs = {(run["structure"], run["keep"], run["fit"]): run for run in result["runs"]}
    lines = [
        f"Every matrix keeps the same share. {about(result, kinds)}\n",
        f"| structure | kept | {' | '.join(names)} |",
        "|" + "---|" * (2 + len(names)),
    ]
    for structure, keep in dict.fromkeys((run["structure"], run["keep"]) for run in result["runs"]):
        here = [runs.get((structure, keep, name)) for name in names]
        kept = next(run["kept"] for run in here if run)
        lines.append(f"| {structure} | {kept:.3f} | {' | '.join(shown(run, kinds) for run in here)} |")
    worse = [
        f"{structure} at {keep:g}"
        for (structure, keep, name), run in runs.items()
        if name == "metric" and not better(run, runs.get((structure, keep, "Frobenius")), kinds)
    ]
    said = f"not for {', '.join(worse)}" if worse else "wherever both were run, on every score"
    return [*lines, "", f"The fit in the metric is better than the Frobenius fit {said}."]


def variants(result: dict, kinds: tuple[str, ...]) -> list[str]:
    lines = [
        about(result, kinds) + "\n",
        f"| kept | variant | {' | '.join(kinds)} | seconds |",
        "|" + "---|" * (3 + len(kinds)),
    ]
    for run in result["runs"]:
        scores = " | ".join(f"{run['scores'][kind]['perplexity']:,.2f}" for kind in kinds)
        lines.append(f"| {run['kept']:.3f} | {run['variant']} | {scores} | {run['seconds']:.0f} |")
    return lines


def healed(result: dict, kinds: tuple[str, ...]) -> list[str]:
    lines = [
        about(result, kinds) + "\n",
        f"| parameters of the blocks | method | healing | {' | '.join(kinds)} |",
        "|" + "---|" * (3 + len(kinds)),
    ]
    for run in result["runs"]:
        done = run.get("healing")
        said = f"{done['steps']} steps, {done['tokens']:,} tokens, rate {run['learning_rate']:g}" if done else "none"
        scores = " | ".join(f"{run['scores'][kind]['perplexity']:,.2f}" for kind in kinds)
        lines.append(f"| {run['blocks']:,} | {run['method']} | {said} | {scores} |")
    return lines


def about(result: dict, kinds: tuple[str, ...]) -> str:
    dense = result["dense"]
    if "cosine" in dense:
        return "Cosine to the original's embeddings / Spearman correlation."
    figures = " / ".join(f"{dense[kind]['perplexity']:,.2f}" for kind in kinds)
    return f"Perplexity on {', '.join(kinds)} text; dense {figures}."


def shown(run: dict | None, kinds: tuple[str, ...]) -> str:
    if run is None:
        return ""
    scores = run["scores"]
    if "cosine" in scores:
        return f"{scores['cosine']:.4f} / {scores['spearman']:.4f}"
    return " / ".join(f"{scores[kind]['perplexity']:,.1f}" for kind in kinds)


def better(run: dict, other: dict | None, kinds: tuple[str, ...]) -> bool:
    if other is None:
        return True
    if "cosine" in run["scores"]:
        return all(run["scores"][name] > other["scores"][name] for name in ("cosine", "spearman"))
    return all(run["scores"][kind]["perplexity"] < other["scores"][kind]["perplexity"] for kind in kinds)
