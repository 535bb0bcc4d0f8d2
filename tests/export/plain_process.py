"""Run in a process of its own, where tenfold can't be imported: logits of exported folders, read from and written to a file."""

import sys
import traceback

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import logging

sys.modules["tenfold"] = None  # importing it raises
logging.set_verbosity_error()
logging.disable_progress_bar()


@torch.no_grad()
def logits(folder: str, kind: str, inputs: dict) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = getattr(transformers, "AutoModel" if kind == "AutoModel" else kind)
    if hasattr(config, "auto_map"):
        auto = getattr(transformers, next(name for name in config.auto_map if name.startswith("AutoModelFor")))
    model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()(**inputs)[0]


if __name__ == "__main__":
    results = {}
    for name, (folder, kind) in torch.load(sys.argv[1]).items():
        try:
            results[name] = logits(folder, kind, load_file(f"{folder}/../inputs.safetensors"))
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, sys.argv[2])
