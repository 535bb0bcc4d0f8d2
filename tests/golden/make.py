"""Write the golden checkpoints: one folder per format version and structure, with the logits that its model gives.

    python tests/golden/make.py      # of the present format version; folders of earlier versions stay as they are

Run it only for a new structure or a new format version: a folder that is there already is what later versions must read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from tenfold.models.plan import Plan, SitePlan  # noqa: E402
from tenfold.models.quantization_config import VERSION  # noqa: E402
from tenfold.models.sites import Site  # noqa: E402
from tenfold.models.surgery import replace  # noqa: E402
from tenfold.structure import (  # noqa: E402
    CP,
    Blast,
    BlockTensorTrain,
    Cola,
    CustomEinsum,
    Dense,
    Kronecker,
    LowRank,
    RowTensorTrain,
    Scattered,
    Stacked,
    Sum,
    TensorTrain,
    Tucker,
)

OUT, IN, VOCABULARY = 12, 8, 16
UP, EMBED = "model.layers.0.mlp.up_proj", "model.embed_tokens"
LOW_RANK, KRONECKER = LowRank(out_features=OUT, in_features=IN, rank=2), Kronecker(outs=(4, 3), ins=(2, 4), terms=2)
HALF = LowRank(out_features=OUT // 2, in_features=IN, rank=2)
EINSUM = {"factors": (("one", ("a", "k")), ("two", ("a", "b", "k", "c"))), "outs": ("a", "b"), "ins": ("c",)}

STRUCTURES = {
    "dense": Dense(out_features=OUT, in_features=IN),
    "low_rank": LOW_RANK,
    "kronecker": KRONECKER,
    "kronecker-scaled": Kronecker(outs=(2, 3, 2), ins=(2, 2, 2), terms=2, scaled=True),
    "tensor_train": TensorTrain(outs=(2, 3, 2), ins=(2, 2, 2), ranks=(3, 2)),
    "row_train": RowTensorTrain(out_features=OUT, ins=(2, 4), ranks=(2,)),
    "block_train": BlockTensorTrain(outs=(4, 3), ins=(4, 2), rank=2),
    "blast": Blast(outs=(4, 3), ins=(2, 4), rank=3),
    "tucker": Tucker(outs=(4, 3), ins=(8,), ranks=(2, 2, 3)),
    "cp": CP(outs=(4, 3), ins=(2, 4), rank=3, weighted=True),
    "einsum": CustomEinsum(**EINSUM, sizes=(("a", 4), ("b", 3), ("c", 8), ("k", 2))),
    "sum": Sum(parts=(KRONECKER, LOW_RANK)),
    "stacked": Stacked(parts=(HALF, HALF)),
    "scattered": Scattered(base=LowRank(out_features=9, in_features=6, rank=2), out_features=OUT, in_features=IN),
    "cola": Cola(out_features=OUT, in_features=IN, rank=3),
}


def entry(path: str, structure, **more) -> SitePlan:
    return SitePlan(Site(path, "", None, structure.shape, False), structure, False, **more)


def plans() -> dict[str, Plan]:
    """Return the plans of all folders: a structure each, and what a site can have beside its structure."""
    found = {name: Plan({UP: entry(UP, structure)}, recipe="golden") for name, structure in STRUCTURES.items()}
    table, gate = LowRank(out_features=VOCABULARY, in_features=IN, rank=3), UP.replace("up", "gate")
    found["embedding"] = Plan({EMBED: entry(EMBED, table)}, recipe="golden")
    found["embedding-untied"] = Plan({EMBED: entry(EMBED, table)}, untie=True, recipe="golden")
    shared = {"shared": {"right": "right_of_both"}, "frozen": ("left",)}
    found["shared-frozen"] = Plan({path: entry(path, LOW_RANK, **shared) for path in (UP, gate)}, recipe="golden")
    return found


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": IN, "intermediate_size": OUT, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **special)).eval()


@torch.no_grad()
def logits(found) -> torch.Tensor:
    return found(input_ids=torch.arange(14).reshape(2, 7) + 1).logits


def main() -> None:
    for name, plan in plans().items():
        folder, made = HERE / f"version-{VERSION}" / name, model()
        if folder.exists():
            continue
        torch.manual_seed(1)
        replace(made, plan, "noise")
        for name_of_map, places in made.named_buffers():  # maps that are not the identity
            size = {"rows": OUT, "columns": IN}.get(name_of_map.rpartition(".")[2])
            if size is not None:
                places.copy_(torch.randperm(size)[: len(places)])
        made.save_pretrained(folder)
        (folder / "logits.json").write_text(json.dumps([round(value, 6) for value in logits(made).flatten().tolist()]))
        print(f"{folder.relative_to(HERE)}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
