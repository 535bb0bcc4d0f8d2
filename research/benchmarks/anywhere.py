"""Export a compressed model to every format and run each in its engine: the figures of docs/anywhere.md.

    python research/benchmarks/anywhere.py MODEL [--formats gguf onnx] [--name NAME]

transformers and onnxruntime run in processes that can't import tenfold (this file calls itself with --engine), llama.cpp by
the npm package node-llama-cpp, which is installed into out/engines. Each is compared with tenfold: the logits of one window, 32
greedy tokens after a prompt, and perplexity on 2,000 tokens. Results go to research/results/anywhere.json, the table to
docs/anywhere.md.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
OUT, RESULTS = ROOT / "out" / "anywhere", ROOT / "research" / "results" / "anywhere.json"
PACKAGES = ROOT / "out" / "engines" / "node_modules"
TEXT = ROOT / "tenfold" / "demo" / "heldout.jsonl"
NODE_LLAMA_CPP = "node-llama-cpp@3.21.1"
TOKENS, WINDOW, PROMPT, NEW = 2000, 250, 16, 32
# format of the export, its options, the engine
RUNS = (
    ("dense", {}, "transformers"),
    ("stock", {}, "transformers"),
    ("remote-code", {}, "transformers"),
    ("gguf", {"outtype": "f32"}, "llama.cpp"),
    ("gguf", {"outtype": "f16"}, "llama.cpp"),
    ("gguf", {"outtype": "q8_0"}, "llama.cpp"),
    ("onnx", {}, "onnxruntime"),
)


# engines: each returns next-token logits (rows, vocabulary) of tokens after those of a cache ---------------------------


class Transformers:
    def __init__(self, folder: str, trust: bool = True):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust).eval()

    @torch.no_grad()
    def __call__(self, ids: list[int], cache=None):
        found = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return found.logits[0].float(), found.past_key_values


class OnnxRuntime:
    def __init__(self, folder: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past")]

    def __call__(self, ids: list[int], cache=None):
        before = cache[0].shape[2] if cache else 0
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, before + len(ids)), dtype=np.int64)}
        feed["position_ids"] = np.arange(before, before + len(ids))[None]
        for number, value in enumerate(self.past):
            empty = np.zeros((1, int(value.shape[1]), 0, int(value.shape[3])), dtype=np.float32)
            feed[value.name] = cache[number] if cache else empty
        logits, *cache = self.session.run(None, feed)
        return torch.from_numpy(logits)[0], cache


def measure(engine, job: dict) -> dict:
    """Return greedy tokens, perplexity, the seconds of both, and the logits of the first window."""
    start, tokens = time.perf_counter(), []
    logits, cache = engine(job["prompt"])
    while len(tokens) < job["new_tokens"]:
        tokens.append(int(logits[-1].argmax()))
        logits, cache = engine(tokens[-1:], cache)
    loss, count, first = 0.0, 0, None
    for window in job["windows"]:
        logits = engine(window)[0]
        first = logits if first is None else first
        target = torch.tensor(window[1:])[:, None]
        loss -= float(logits[:-1].log_softmax(-1).gather(1, target).double().sum())
        count += len(window) - 1
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "perplexity": math.exp(loss / count),
        "scored": count,
        "seconds": seconds,
        "logits": first,
    }


def run_engine(name: str, folder: str, asked: str, answer: str) -> None:
    if name != "tenfold":
        sys.modules["tenfold"] = None  # importing it raises
    else:
        import tenfold  # noqa: F401 - registers its checkpoints
    engine = OnnxRuntime(folder) if name == "onnxruntime" else Transformers(folder)
    result = measure(engine, json.loads(Path(asked).read_text()))
    result["versions"] = (
        {"onnxruntime": version("onnxruntime")} if name == "onnxruntime" else {"transformers": version("transformers")}
    )
    torch.save(result, answer)


# the run ---------------------------------------------------------------------------------------------------------------


def child(*command: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(OUT / "modules"),
    }
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, **options)


def in_process(engine: str, folder: Path, work: Path) -> dict:
    answer = work / "answer.pt"
    done = child(sys.executable, __file__, "--engine", engine, str(folder), str(work / "asked.json"), str(answer))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return torch.load(answer)


def in_llama_cpp(folder: Path, work: Path) -> dict:
    if not (PACKAGES / "node-llama-cpp").is_dir():
        PACKAGES.parent.mkdir(parents=True, exist_ok=True)
        install = (
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            PACKAGES.parent,
            NODE_LLAMA_CPP,
        )
        subprocess.run(install, check=True)
    job = json.loads((work / "asked.json").read_text()) | {"model": str(folder / "model.gguf")}
    done = child("node", str(Path(__file__).with_name("llama_cpp.mjs")), str(PACKAGES), input=json.dumps(job))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def read_job(model: str) -> dict:
    from transformers import AutoTokenizer

    lines = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    ids = AutoTokenizer.from_pretrained(model)(" ".join(lines)).input_ids[:TOKENS]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return {"prompt": ids[:PROMPT], "new_tokens": NEW, "windows": windows}


def bytes_of(folder: Path) -> int:
    kinds = (".safetensors", ".gguf", ".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(kinds))


def compare(model: str, name: str, formats: list[str] | None) -> list[dict]:
    work = OUT / name
    work.mkdir(parents=True, exist_ok=True)
    (work / "asked.json").write_text(json.dumps(read_job(model)))
    reference, rows = in_process("tenfold", Path(model), work), []
    for to, options, engine in RUNS:
        if formats and to not in formats:
            continue
        folder = work / "-".join([to, *options.values()])
        arguments = [f"--{key}={value}" for key, value in options.items()]
        start = time.perf_counter()
        done = child(
            sys.executable, "-m", "tenfold", "export", model, "--to", to, "-o", str(folder), "--overwrite", *arguments
        )
        row = {"model": name, "format": " ".join([to, *options.values()]), "engine": engine}
        rows.append(row)
        if done.returncode:
            row["refused"] = done.stderr.strip().splitlines()[-1].removeprefix("tenfold: ").replace(model, name)
        else:
            row |= {"export_seconds": round(time.perf_counter() - start, 1), "bytes": bytes_of(folder)}
            found = in_llama_cpp(folder, work) if engine == "llama.cpp" else in_process(engine, folder, work)
            equal = sum(a == b for a, b in zip(found["tokens"], reference["tokens"], strict=True))
            row |= {"equal_tokens": f"{equal} of {NEW}", "perplexity": found["perplexity"], "tokens": found["scored"]}
            row |= {"tenfold_perplexity": reference["perplexity"], "seconds": round(found["seconds"], 1)}
            row["versions"] = found["versions"]
            if "logits" in found:
                row["logits_difference"] = float((found["logits"] - reference["logits"]).abs().max())
                row["largest_logit"] = float(reference["logits"].abs().max())
        print(json.dumps(row), flush=True)
        save(rows)
    return rows


def save(rows: list[dict]) -> None:
    """Put ``rows`` into the results, in the place of those of the same model and format, and rewrite the table."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    keys = {(row["model"], row["format"]) for row in rows}
    kept = [row for row in kept if (row["model"], row["format"]) not in keys] + rows
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    page = ROOT / "docs" / "anywhere.md"
    begin, end = "<!-- table: research/benchmarks/anywhere.py -->\n", "<!-- end -->"
    text = re.sub(f"{begin}.*?{end}", lambda _: begin + table(kept) + end, page.read_text(), flags=re.DOTALL)
    page.write_text(text)


def table(rows: list[dict]) -> str:
    lines = [
        "| model | format | engine | MB | logits differ by | equal greedy tokens | perplexity (tenfold) | seconds |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["model"], f"`{row['format']}`", row["engine"]]
        if "refused" in row:
            cells += [f"refused: {row['refused']}", "", "", "", ""]
        else:
            differ = row.get("logits_difference")
            differ = "" if differ is None else f"{differ:.1e} of {row['largest_logit']:.0f}"
            perplexity = f"{row['perplexity']:.3f} ({row['tenfold_perplexity']:.3f})"
            cells += [f"{row['bytes'] / 1e6:.0f}", differ, row["equal_tokens"], perplexity, f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        run_engine(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("model", help="a compressed model folder")
        parser.add_argument("--name", help="of the model in the table; default: the folder's")
        parser.add_argument("--formats", nargs="*", help="some of the formats; default: all")
        given = parser.parse_args()
        compare(given.model, given.name or Path(given.model).absolute().name, given.formats)
