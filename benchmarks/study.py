"""What the studies of one model have in common: their arguments, and a result file that grows run by run."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path


def arguments(about: str, keep: list[float]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the result file; the model's unless given")
    parser.add_argument("--keep", type=float, nargs="+", default=keep)
    return parser


def results(folder: str, given: argparse.Namespace) -> tuple[Path, dict]:
    """The file and what is in it already; its versions are those of now."""
    file = Path("results") / folder / f"{given.name or Path(given.model).name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    result["versions"] = {name: version(name) for name in ("tenfold", "torch", "transformers")}
    return file, result
