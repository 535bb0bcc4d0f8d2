"""What every method leaves of a model without any training: one result file a run, one table from all files.

    python research/benchmarks/quality.py --data DIR --model tenfold/demo --keep 0.8 0.65 0.5
    python research/benchmarks/quality.py --data DIR --model ENCODER --keep 0.5
    python research/benchmarks/quality.py --data DIR --model tenfold/demo --bytes
    python research/benchmarks/quality.py --table

All methods read the same calibration text (the first file of the training text, windows spread evenly over it) and get the
same budget: a share of the parameters of the blocks. A causal model is scored by its perplexity on held-out text of three
kinds; an encoder, whose feed-forward matrices alone are folded, by the Spearman correlation of its sentence embeddings with
human judgements and by their cosine to the original's. What has a result file already is not run again (--again: it is).

DIR holds ``corpus/small-train.jsonl.xz`` and ``corpus/valid.jsonl.xz`` (JSON lines with source and text),
``summarization/samsum_test.jsonl.xz`` (JSON lines with document) and ``glue/STS-B/{train,dev}.tsv.xz``. Nothing of it is kept.
"""

import argparse
import copy
import json
import lzma
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from quality_table import write_table
from transformers import AutoModel, AutoTokenizer

from tenfold import api
from tenfold.compression.calibration import load_calibration
from tenfold.models.recipe import Budget, load_recipe
from tenfold.models.sites import count_parameters, find_sites
from tenfold.models.text_mode import is_causal_lm

BASELINES = [
    "svd-llm", "svd-llm-update", "modegpt", "modegpt-uniform", "slicegpt", "joint-svd-llm", "procrustesgpt",
    "procrustesgpt-kronecker", "svd", "asvd", "fwsvd", "joint-svd", "van-loan", "krony-van-loan", "krony-prune",
    "tqcompressor-keep", "drop-layers",
]  # fmt: skip
KINDS = ("encyclopedic", "books", "dialogue")
SCORED = 40_000  # tokens of each kind of text
SENTENCES = 2_000  # that an encoder is calibrated on


def lines(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        return stream.read().splitlines()


def texts(data: Path) -> dict[str, list[str]]:
    """Held-out documents by kind."""
    held = [json.loads(line) for line in lines(data / "corpus" / "valid.jsonl.xz")]
    spoken = [json.loads(line)["document"] for line in lines(data / "summarization" / "samsum_test.jsonl.xz")]
    return {
        "encyclopedic": [row["text"] for row in held if row["source"] == "wikipedia"],
        "books": [row["text"] for row in held if row["source"] == "books"],
        "dialogue": spoken,
    }


def pairs(data: Path, split: str) -> list[tuple[str, str, float]]:
    """Sentence pairs of STS-B and how alike people find them."""
    rows = [line.split("\t") for line in lines(data / "glue" / "STS-B" / f"{split}.tsv.xz")[1:]]
    return [(row[7], row[8], float(row[9])) for row in rows if len(row) >= 10]


class Peak:
    """The most memory that the process held since it was made, in bytes; None where the system does not tell."""

    def __init__(self):
        self.known = Path("/proc/self/clear_refs").exists()
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int | None:
        status = Path("/proc/self/status").read_text() if self.known else ""
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


class Causal:
    """A language model and its three texts."""

    of = "blocks"

    def __init__(self, name: str, data: Path, folder: Path, samples: int):
        self.model, self.tokenizer = api.load(name, device="cpu", dtype="float32")
        self.texts = texts(data)
        self.calibration = load_calibration(
            self.model, self.tokenizer, [data / "corpus" / "small-train.jsonl.xz"], num_samples=samples
        )

    def recipe(self, method: str, keep: float):
        if method == "krony-prune":
            mlp = sum(site.shape[0] * site.shape[1] for site in find_sites(self.model) if site.role.startswith("mlp."))
            share = 1 - mlp / 2 / count_parameters(self.model, "blocks")
            if abs(share - keep) > 0.02:
                raise ValueError(
                    f"it halves the feed-forward matrices, which leaves {share:.3f}, and knows no other size"
                )
            return load_recipe(method)
        return api.with_keep(method, keep, "blocks")

    def score(self, model) -> dict:
        scores = {}
        with tempfile.TemporaryDirectory() as scratch:
            for kind, some in self.texts.items():
                file = Path(scratch) / f"{kind}.jsonl"
                file.write_text("\n".join(json.dumps({"text": text}) for text in some))
                scores[kind] = api.evaluate(model, self.tokenizer, [file], limit=SCORED, batch_size=16)
        return scores


class Encoder:
    """A sentence encoder: mean-pooled, normalised last hidden states."""

    of = "sites"

    def __init__(self, name: str, data: Path, folder: Path, samples: int):
        self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
        self.pairs, file = pairs(data, "dev"), folder / "sts-b-train.txt"
        file.write_text("\n".join(text for one, other, _ in pairs(data, "train") for text in (one, other)))
        self.calibration = load_calibration(self.model, self.tokenizer, [file], num_samples=SENTENCES, batch_size=32)
        self.original = self.embed(self.model)

    def recipe(self, method: str, keep: float):
        """The recipe for the feed-forward matrices only."""
        recipe = load_recipe(method)
        if recipe.transform is not None:
            raise ValueError(f"{recipe.transform} changes more than the feed-forward matrices")
        rules = []
        for rule in recipe.replace:
            roles = [role for role in rule.roles if role.startswith("mlp.")]
            if rule.prune == "mlp":
                rules.append(rule)
            elif rule.prune is None and roles:
                rules.append(rule.model_copy(update={"role": roles}))
        recipe = recipe.model_copy(update={"replace": rules})
        return recipe if recipe.budget is None else recipe.model_copy(update={"budget": Budget(keep=keep, of="sites")})

    @torch.no_grad()
    def embed(self, model) -> torch.Tensor:
        sentences = [pair[side] for side in (0, 1) for pair in self.pairs]
        order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))
        found = torch.zeros(len(sentences), model.config.hidden_size)
        for begin in range(0, len(order), 64):
            some = order[begin : begin + 64]
            batch = self.tokenizer(
                [sentences[k] for k in some], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            weights = batch["attention_mask"][..., None].float()
            mean = (model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
            found[some] = torch.nn.functional.normalize(mean, dim=-1)
        return found

    def score(self, model) -> dict:
        from scipy.stats import spearmanr

        found, count = self.embed(model), len(self.pairs)
        alike = (found[:count] * found[count:]).sum(1)
        return {
            "spearman": float(spearmanr(alike.numpy(), [pair[2] for pair in self.pairs])[0]),
            "cosine": float((found * self.original).sum(1).mean()),
            "protocol": {"task": "STS-B dev", "pairs": count, "max_length": 128, "pooling": "mean"},
        }


def counted(model) -> dict[str, int]:
    mlp = {site.path for site in find_sites(model) if site.role.startswith("mlp.")}
    return api.price(model)["parameters"] | {
        "blocks": count_parameters(model, "blocks"),
        "mlp": sum(p.numel() for path in mlp for p in model.get_submodule(path).parameters()),
    }


def measured(work, method: str, keep: float | None, sizes: dict[str, int]) -> dict:
    """One run."""
    peak, begun, report = Peak(), time.perf_counter(), {}
    if method == "dense":
        model = work.model
    else:
        recipe = work.recipe(method, keep)
        model, report = api.compress(copy.deepcopy(work.model), recipe, text=work.calibration)
    took, memory, size = time.perf_counter() - begun, peak.read(), counted(model)
    return {
        "method": method,
        "keep": {"asked": keep, "of": work.of} | {part: size[part] / sizes[part] for part in ("blocks", "mlp")},
        "parameters": size,
        "parameters_dense": sizes,
        "scores": work.score(model),
        "seconds": round(took, 1),
        "peak_memory_bytes": memory,
        "recipe": report.get("recipe"),
        "calibration": None if method == "dense" else work.calibration.source | {"tokens": work.calibration.tokens},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("tenfold", "torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="a model folder or name")
    parser.add_argument("--name", help="of the model in the table; the folder's unless given")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--methods", nargs="+", default=["recommended", *BASELINES])
    parser.add_argument("--samples", type=int, default=192, help="calibration windows of a causal model")
    parser.add_argument("--output", type=Path, default=Path("research/results/quality"))
    parser.add_argument("--again", action="store_true", help="run what has a result file, too")
    parser.add_argument("--bytes", action="store_true", help="also quantised, dense and folded (needs torchao)")
    parser.add_argument("--table", action="store_true", help="only write docs/quality.md from the result files")
    given = parser.parse_args()
    if not given.table:
        run_all(given)
    write_table(given.output, Path("docs/quality.md"), BASELINES, KINDS)


def run_all(given) -> None:
    folder = given.output / (given.name or Path(given.model).name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        causal = is_causal_lm(AutoModel.from_pretrained(given.model))
        work = (Causal if causal else Encoder)(given.model, given.data, Path(scratch), given.samples)
        sizes = counted(work.model)
        if given.bytes:
            from quality_bytes import run_bytes

            return run_bytes(work, folder, given.keep, given.again)
        runs = [("dense", None)] + [(method, keep) for keep in given.keep for method in given.methods]
        for method, keep in runs:
            file = folder / (f"{method}.json" if keep is None else f"{method}-{keep:g}.json")
            if file.exists() and not given.again:
                continue
            try:
                result = measured(work, method, keep, sizes)
            except (ValueError, FileNotFoundError) as reason:
                print(f"{method} at {keep}: {reason}", flush=True)
                continue
            file.write_text(json.dumps(result, indent=1) + "\n")
            scores = result["scores"]
            shown = {kind: round(scores[kind]["perplexity"], 2) for kind in KINDS} if causal else scores
            print(f"{method} at {keep}: {shown}, {result['seconds']} s", flush=True)
    return None


if __name__ == "__main__":
    main()
