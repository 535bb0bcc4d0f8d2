"""docs/quality.md from the result files of quality.py."""

import json
from pathlib import Path

from quality_studies import studies

HEAD = """# Quality without training

What each method leaves of a model that is not trained afterwards, at the same share of parameters and with the same
calibration text. `python research/benchmarks/quality.py --table` writes this page from the files in
`research/results/quality/`, each of which has the whole recipe, the protocol and the versions, and from those that
`fits.py`, `variants.py` and `healed.py` beside it write. [recipes.md](recipes.md#baselines) says what the baselines
are, and where they depart from their papers.

The rows of the recommended recipe are older than the recipe that ships, which has local targets and measured divergences,
and have not been run again.

The causal models are small: two processor cores train them in an hour or two (`demo`: a GPT-2 shape, 5.9 million
parameters; `second-model`: `research/benchmarks/second_model.yaml`, a Llama shape, 7.8 million). The encoder is a
pre-trained BERT of 22 million (all-MiniLM-L6-v2). [real-models.md](real-models.md) has a larger model.
"""


def write_table(results: Path, target: Path, baselines: list[str], kinds: tuple[str, ...]) -> None:
    """One section for every model."""
    parts = [HEAD]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        dense = next(run for run in runs if run["method"] == "dense")
        folded = [run for run in runs if run["method"] != "dense" and "bits" not in run]
        causal = "spearman" not in dense["scores"]
        made = causal_tables(dense, folded, baselines, kinds) if causal else encoder_table(dense, folded, baselines)
        parts += [f"## {folder.name}\n", *made]
        if quantised := [run for run in runs if "bits" in run]:
            parts += bytes_table(dense, folded, quantised, kinds, causal)
    target.write_text("\n".join(parts + studies(results.parent, kinds)).rstrip() + "\n")


def causal_tables(dense: dict, runs: list[dict], baselines: list[str], kinds: tuple[str, ...]) -> list[str]:
    sizes, scores = dense["parameters"], dense["scores"]
    protocol = scores[kinds[0]]["protocol"]
    bits = " / ".join(f"{scores[kind]['bits_per_byte']:.3f}" for kind in kinds)
    lines = [
        f"{sizes['total']:,} parameters ({sizes['without_head']:,} without an output head of its own), {sizes['blocks']:,} of "
        f"them in the blocks. Perplexity per token on held-out text, {scores[kinds[0]]['tokens']:,} tokens of each kind, windows "
        f"of {protocol['window']} tokens. **kept** is the share of the blocks' parameters, measured; **outside** what is added "
        "or taken away elsewhere (embeddings, head). **gap** is how far the perplexity is above dense, for every kind of text "
        "as a share of the best baseline's. Seconds on one thread of a shared machine. "
        f"The dense model has {bits} bits per byte.{costs(dense, runs, kinds)}\n"
    ]
    for keep in sorted({run["keep"]["asked"] for run in runs}, reverse=True):
        here = sorted((run for run in runs if run["keep"]["asked"] == keep), key=lambda run: perplexity(run, kinds[0]))
        best = best_gaps(dense, here, baselines, kinds)
        lines += [
            f"### {keep:.0%} of the blocks\n",
            f"| method | kept | outside | {' | '.join(kinds)} | gap | seconds | peak MB |",
            "|" + "---|" * (6 + len(kinds)),
            row("dense", 1.0, 0, [perplexity(dense, kind) for kind in kinds], "0", "", ""),
        ]
        for run in here:
            gaps = [(perplexity(run, kind) - perplexity(dense, kind)) / best[kind] for kind in kinds] if best else []
            outside = sum(
                sign * run[name]["total"] - sign * run[name]["blocks"]
                for sign, name in ((1, "parameters"), (-1, "parameters_dense"))
            )
            shown = " / ".join(f"{gap:.2f}" for gap in gaps)
            memory = run["peak_memory_bytes"]
            figures = [perplexity(run, kind) for kind in kinds]
            name = f"**{run['method']}**" if run["method"] not in baselines else run["method"]
            peak = f"{memory / 1e6:,.0f}" if memory else ""
            lines.append(row(name, run["keep"]["blocks"], outside, figures, shown, f"{run['seconds']:.0f}", peak))
        lines.append("")
        if best and (ours := next((run for run in here if run["method"] == "recommended"), None)):
            ratios = [(perplexity(ours, kind) - perplexity(dense, kind)) / best[kind] for kind in kinds]
            said = ", ".join(f"{ratio:.2f} on {kind}" for ratio, kind in zip(ratios, kinds, strict=True))
            lines.append(f"The recommended recipe's gap to dense is, as a share of the best baseline's: {said}.\n")
    return lines


def costs(dense: dict, runs: list[dict], kinds: tuple[str, ...]) -> str:
    """What plain SVD at half of the blocks costs the model: one that learned too little hardly minds."""
    plain = next((run for run in runs if run["method"] == "svd" and run["keep"]["asked"] == 0.5), None)
    if plain is None:
        return ""
    ratios = " / ".join(f"{perplexity(plain, kind) / perplexity(dense, kind):,.1f}" for kind in kinds)
    return f" Plain SVD at 50% makes its perplexity {ratios} times as high."


def row(name: str, kept: float, outside: int, figures: list[float], gap: str, seconds: str, peak: str) -> str:
    shown = " | ".join(f"{figure:,.2f}" if figure < 1000 else f"{figure:,.0f}" for figure in figures)
    return f"| {name} | {kept:.4f} | {outside:+,} | {shown} | {gap} | {seconds} | {peak} |"


def perplexity(run: dict, kind: str) -> float:
    return run["scores"][kind]["perplexity"]


def best_gaps(dense: dict, runs: list[dict], baselines: list[str], kinds: tuple[str, ...]) -> dict[str, float]:
    """The smallest gap to dense of any baseline, for every kind of text."""
    others = [run for run in runs if run["method"] in baselines]
    if not others:
        return {}
    return {kind: min(perplexity(run, kind) for run in others) - perplexity(dense, kind) for kind in kinds}


def encoder_table(dense: dict, runs: list[dict], baselines: list[str]) -> list[str]:
    protocol = dense["scores"]["protocol"]
    lines = [
        f"{dense['parameters']['total']:,} parameters, {dense['parameters']['mlp']:,} of them feed-forward; only these are "
        f"compressed. Spearman correlation on {protocol['task']} ({protocol['pairs']:,} pairs) and mean cosine of the sentence "
        "embeddings to the original's. **kept** is the measured share of the feed-forward parameters, biases included.\n",
        "| method | asked | kept | cosine | Spearman | seconds | peak MB |",
        "|---|---|---|---|---|---|---|",
        f"| dense |  | 1.0000 | 1.0000 | {dense['scores']['spearman']:.4f} |  |  |",
    ]
    for run in sorted(runs, key=lambda run: (-run["keep"]["asked"], -run["scores"]["cosine"])):
        name = f"**{run['method']}**" if run["method"] not in baselines else run["method"]
        memory = run["peak_memory_bytes"]
        lines.append(
            f"| {name} | {run['keep']['asked']:g} | {run['keep']['mlp']:.4f} | {run['scores']['cosine']:.4f} | "
            f"{run['scores']['spearman']:.4f} | {run['seconds']:.0f} | {memory / 1e6 if memory else 0:,.0f} |"
        )
    return [*lines, ""]


def bytes_table(dense: dict, folded: list[dict], runs: list[dict], kinds: tuple[str, ...], causal: bool) -> list[str]:
    """By bytes: float32 files beside quantised ones."""
    names = list(kinds) if causal else ["cosine", "spearman"]

    def scores(run: dict) -> list[float]:
        return [run["scores"][name]["perplexity"] if causal else run["scores"][name] for name in names]

    rows = [(4 * dense["parameters"]["total"], "dense", 32, dense)]
    rows += [(4 * run["parameters"]["total"], f"{run['method']} {run['keep']['asked']:g}", 32, run) for run in folded
             if run["method"] == "recommended"]  # fmt: skip
    rows += [
        (run["bytes"], run["method"] if run["keep"] is None else f"{run['method']} {run['keep']:g}", run["bits"], run)
        for run in runs
    ]
    lines = [
        "### By bytes\n",
        "Weight-only quantisation of the blocks' matrices by torchao, of the dense model and of the compressed one; everything "
        "else in float32.\n",
        f"| model | bits | bytes | {' | '.join(names)} |",
        "|" + "---|" * (3 + len(names)),
    ]
    for size, name, bits, run in sorted(rows, key=lambda row: -row[0]):
        lines.append(f"| {name} | {bits} | {size:,} | {' | '.join(f'{score:.4g}' for score in scores(run))} |")
    better = 1 if causal else -1  # lower perplexities, higher cosines
    named = [
        (size, f"{name} in {bits} bits", [better * score for score in scores(run)]) for size, name, bits, run in rows
    ]
    front = [one for one in named if not any(other is not one and beats(other, one) for other in named)]
    lines += [
        "",
        "Nothing here is as small as one of these and as good: "
        + ", ".join(name for _, name, _ in sorted(front))
        + ".",
    ]
    plain = [one for one in named if not one[1].startswith("dense")]
    quantised = [one for one in named if one[1].startswith("dense") and not one[1].endswith("32 bits")]
    worse = {one[1]: other[1] for one in plain for other in quantised if beats(other, one)}
    lines += [
        f"Quantisation alone is the better choice than {one}: {other} is smaller and better."
        for one, other in worse.items()
    ]
    return [*lines, ""]


def beats(one: tuple, other: tuple) -> bool:
    """No larger and nowhere worse."""
    return one[0] <= other[0] and all(a <= b for a, b in zip(one[2], other[2], strict=True))
