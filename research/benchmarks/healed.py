"""The recommended recipe without any training, against a Kronecker decomposition as in Krony-PT that is trained afterwards.

    python research/benchmarks/healed.py --data DIR --model tenfold/demo --keep 0.8 0.5

Both keep the same parameters. The decomposition starts from Van Loan's with the norm restored, and is distilled from the dense
model for 200 steps of 16 x 512 tokens, with each of the learning rates; the best one counts. Scores are those of quality.py.
"""

import copy
import json
import tempfile
from pathlib import Path

from quality import Causal, counted, lines
from study import arguments, results

from tenfold import api
from tenfold.models.recipe import Heal


def main() -> None:
    parser = arguments(__doc__, [0.8, 0.5])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    file, result = results("healed", given)
    with tempfile.TemporaryDirectory() as scratch:
        work = Causal(given.model, given.data, Path(scratch), 192)
        result["dense"] = work.score(work.model)
        text = Path(scratch) / "train.jsonl"
        text.write_text("\n".join(lines(given.data / "corpus" / "small-train.jsonl.xz")))
        for keep in given.keep:
            for method, rate in [
                ("recommended", None),
                ("krony-van-loan", None),
                *(("krony-van-loan", r) for r in given.rates),
            ]:
                model, _ = api.compress(copy.deepcopy(work.model), work.recipe(method, keep), text=work.calibration)
                run = {"method": method, "keep": keep, "blocks": counted(model)["blocks"], "learning_rate": rate}
                if rate is not None:
                    settings = Heal(steps=given.steps, learning_rate=rate, tokens_per_step=16 * 512)
                    run["healing"] = api.heal(model, work.model, work.tokenizer, [text], settings)
                run["scores"] = work.score(model)
                result["runs"].append(run)
                file.write_text(json.dumps(result, indent=1) + "\n")
                shown = {kind: round(score["perplexity"], 1) for kind, score in run["scores"].items()}
                print(f"{method} at {keep}, rate {rate}: {shown}", flush=True)


if __name__ == "__main__":
    main()
