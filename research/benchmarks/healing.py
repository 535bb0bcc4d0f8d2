"""Healing with 3 % of the tokens of pre-training: from every start, beside the dense model trained on the same tokens.

    python research/benchmarks/healing.py --data DIR --model MODEL --name second-model --tokens 491520
    python research/benchmarks/healing.py --data DIR --model MODEL --name second-model --tokens 491520 \\
        --starts recommended --rates 1e-4

Every start keeps the same share of the parameters of the blocks, is distilled on the same text with each of the learning rates,
and the best one counts; the dense model learns the text itself. What is in
research/results/healing/MODEL.json is not run again. Data and scores are those of quality.py; the text that
is trained on is a file that neither calibrates nor scores.
"""

import copy
import json
import tempfile
from itertools import accumulate
from pathlib import Path

from quality import Causal, counted, lines
from study import arguments, results

from tenfold import api
from tenfold.models.recipe import Heal

STARTS = ["recommended", "svd-llm-update", "krony-van-loan", "tqcompressor-keep", "krony-prune"]
CHARACTERS = 8  # a token, at most on average: enough text is tokenised


def main() -> None:
    parser = arguments(__doc__, [0.65])
    parser.add_argument("--tokens", type=int, required=True, help="that are trained on; 3 %% of those of pre-training")
    parser.add_argument("--starts", nargs="+", default=["dense", *STARTS])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--text", default="train-01.jsonl.xz", help="a file of the corpus")
    given = parser.parse_args()
    file, result = results("healing", given)
    done = {(run["start"], run["keep"], run["learning_rate"], run["tokens"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory() as scratch:
        work = Causal(given.model, given.data, Path(scratch), 192)
        result["untouched"] = work.score(work.model)
        text = Path(scratch) / "train.jsonl"
        text.write_text("\n".join(enough(lines(given.data / "corpus" / given.text), CHARACTERS * given.tokens)))
        for keep in given.keep:
            for start in given.starts:
                for rate in (None, *given.rates):
                    tokens = 0 if rate is None else given.tokens
                    if (start, keep, rate, tokens) in done:
                        continue
                    try:
                        run = measured(work, start, keep, rate, given.tokens, text)
                    except ValueError as reason:
                        print(f"{start} at {keep}: {reason}", flush=True)
                        break
                    result["runs"].append(run | {"tokens": tokens})
                    file.write_text(json.dumps(result, indent=1) + "\n")
                    shown = {kind: round(score["perplexity"], 2) for kind, score in run["scores"].items()}
                    print(f"{start} at {keep}, rate {rate}: {shown}", flush=True)


def measured(work: Causal, start: str, keep: float, rate: float | None, tokens: int, text: Path) -> dict:
    model, run = copy.deepcopy(work.model), {"start": start, "keep": keep, "learning_rate": rate}
    if start != "dense":
        model, _ = api.compress(model, work.recipe(start, keep), text=work.calibration)
    if rate is not None:
        given = {"steps": tokens // 4096, "learning_rate": rate, "tokens_per_step": 4096}
        teacher, losses = (None, {"cross_entropy": 1.0}) if start == "dense" else (work.model, {"kl": 1.0})
        run["healing"] = api.heal(model, teacher, work.tokenizer, [text], Heal(losses=losses, **given))
    return run | {"blocks": counted(model)["blocks"], "scores": work.score(model)}


def enough(rows: list[str], characters: int) -> list[str]:
    """The first of ``rows`` that have so many ``characters`` together."""
    return rows[: 1 + sum(reached < characters for reached in accumulate(map(len, rows)))]


if __name__ == "__main__":
    main()
