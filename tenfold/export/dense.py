"""Export to the plain checkpoint of full size, which every engine for the architecture reads."""

from __future__ import annotations

from pathlib import Path

from tenfold.export.card import Format
from tenfold.export.weights import MAX_SHARD_SIZE, plain_weights
from tenfold.models.auto import load_model
from tenfold.models.densify import densify
from tenfold.models.lazy_checkpoint import open_lazy
from tenfold.models.model_card import save_config
from tenfold.nn import Experts

LOAD = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}")"""


def write(name: str | Path, folder: Path) -> None:
    """Write the checkpoint ``name`` as a plain one, one shard in memory; a mixture of experts is in memory as a whole."""
    checkpoint = open_lazy(name)
    if checkpoint is None or any(isinstance(module, Experts) for module in checkpoint.model.modules()):
        densify(load_model(name)).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        return
    weights = plain_weights(checkpoint)
    weights.model.config.dtype = checkpoint.dtype
    weights.save(folder)
    save_config(weights.model, folder)


FORMAT = Format(write, "A plain checkpoint of full size: every matrix is dense.", LOAD)
