"""Peak memory and seconds of every export of a compressed model of a billion parameters, each in a process of its own.

    python research/benchmarks/export_memory.py [--output research/results/export_memory.json]

The model is a randomly initialised Llama in bfloat16 whose MLPs have lost units, in every block as many as no other. Random
weights: the figures are bytes and times.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from study import measured
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tenfold.models.plan import SitePlan
from tenfold.models.sites import find_sites, weight_of
from tenfold.models.surgery import finish, install
from tenfold.structure import Dense

DEMO = Path(__file__).parents[2] / "tenfold" / "demo"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
FORMATS = ("dense", "stock", "remote-code", "gguf", "onnx")


def write_model(folder: Path) -> int:
    """Write the model and return its number of parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    for site in [site for site in find_sites(model) if site.role.startswith("mlp")]:
        weight, width = weight_of(model.get_submodule(site.path)).detach(), 6144 + 64 * site.layer
        matrix = weight[:, :width].clone() if site.role == "mlp.out" else weight[:width].clone()
        structure = Dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
        install(model, SitePlan(site, structure, False), {"matrix": matrix}, None)
    finish(model, "narrow")
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("research/results/export_memory.json"))
    parser.add_argument("--make", type=Path, help="only write the model to this folder")
    given = parser.parse_args()
    if given.make:
        print(write_model(given.make))
        return
    about = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    result = {"machine": about | {name: version(name) for name in ("torch", "transformers", "tenfold")}, "exports": {}}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        result["parameters"] = int(measured(sys.executable, __file__, "--make", str(model))["output"].split()[-1])
        sizes = [file.stat().st_size for file in model.glob("*.safetensors")]
        result |= {"mb": round(sum(sizes) / 2**20), "largest_shard_mb": round(max(sizes) / 2**20)}
        idle = "import tenfold, transformers.models.llama.modeling_llama"  # what an export that reads nothing takes
        result["import_mb"] = round(measured(sys.executable, "-c", idle)["mb"])
        for kind in FORMATS:
            out = Path(place) / kind
            run = measured(sys.executable, "-m", "tenfold", "export", str(model), "--to", kind, "-o", str(out))
            written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            result["exports"][kind] = {
                "peak_mb": round(run["mb"]), "seconds": round(run["seconds"], 1), "written_mb": round(written / 2**20),
            }  # fmt: skip
            print(kind, result["exports"][kind], file=sys.stderr)
            given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
