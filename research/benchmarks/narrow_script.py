"""Narrow every MLP of a Llama-type model to one width: the short script that a recipe has to beat.

    python research/benchmarks/narrow_script.py MODEL CALIBRATION -o DIR --keep 0.8 --num-samples 192

Block after block on the compressed prefix: the hidden units that explain most of the MLP's output stay, chosen greedily, and
the output matrix is solved by least squares for that block's own output. Attention stays as it is. ``--keep`` is a share of the
whole model. The windows of text are those that `tenfold compress` reads.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from tenfold import api
from tenfold.compression.calibration import load_calibration
from tenfold.models.auto import read_config
from tenfold.models.precision import multiplies_bfloat16

RIDGE, TOGETHER = 0.01, 8


def choose(weight: Tensor, second: Tensor, count: int) -> Tensor:
    """Return the units that explain most of ``weight @ h``, chosen a few at a time; ``second`` is the mean of ``h h^T``."""
    rest, seen, chosen = second.clone(), weight @ second, list[int]()
    floor = 1e-6 * float(second.diagonal().mean())
    while len(chosen) < count:
        gains = seen.square().sum(0) / rest.diagonal().clamp_min(floor)
        gains[chosen] = -1
        new = gains.topk(min(TOGETHER, count - len(chosen))).indices
        chosen += new.tolist()
        lower = torch.linalg.cholesky(rest[new][:, new] + floor * torch.eye(len(new), device=rest.device))
        along = torch.linalg.solve_triangular(lower, rest[new], upper=False)
        seen = seen - torch.linalg.solve_triangular(lower, seen[:, new].T, upper=False).T @ along
        rest = rest - along.T @ along
    return torch.tensor(sorted(chosen), device=weight.device)


def run(model, layer, states: Tensor) -> Tensor:
    """Return what ``layer`` makes of the states of one window."""
    places = torch.arange(states.shape[1], device=states.device)[None]
    made = layer(
        states, position_embeddings=model.model.rotary_emb(states, places), attention_mask=None, position_ids=places
    )
    return made if isinstance(made, Tensor) else made[0]


def narrow(mlp, second: Tensor, width: int) -> None:
    """Keep ``width`` units of ``mlp``, whose units have the second moments ``second``."""
    second, weight = second / second.diagonal().mean(), mlp.down_proj.weight.float()
    ridge = RIDGE * torch.eye(len(second), device=second.device)
    kept = choose(weight, second + ridge, width)
    wanted = (weight @ (second + ridge))[:, kept]
    solved = torch.linalg.solve((second + ridge)[kept][:, kept], wanted.T).T
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight, part.out_features = torch.nn.Parameter(part.weight[kept].clone()), width
    mlp.down_proj.weight = torch.nn.Parameter(solved.to(mlp.down_proj.weight.dtype))
    mlp.down_proj.in_features = width


@torch.no_grad()
def compress(model, windows: list[Tensor], keep: float) -> int:
    """Narrow ``model`` in place to the share ``keep`` of its parameters; returns the width.

    Raises:
        ValueError: the model is of another type, or its MLPs are too small for that.
    """
    layers = getattr(getattr(model, "model", None), "layers", [])
    if not layers or not all(hasattr(getattr(layer, "mlp", None), "gate_proj") for layer in layers):
        raise ValueError(f"a {type(model).__name__} is not of Llama's type; leave this script out")
    total, units = sum(p.numel() for p in model.parameters()), layers[0].mlp.down_proj.in_features
    each = 3 * layers[0].mlp.down_proj.out_features * len(layers)  # parameters of one unit in every block
    width = (units - math.ceil((1 - keep) * total / each)) // 8 * 8
    if width < 8:
        raise ValueError(f"{keep:.0%} of the model is less than it has without its MLPs; keep more")
    states = [model.model.embed_tokens(ids) for ids in windows]
    for layer in layers:
        second = torch.zeros(units, units, device=states[0].device)

        def add(module, given, second=second):
            rows = given[0].flatten(0, -2).float()
            second.addmm_(rows.T, rows)

        hook = layer.mlp.down_proj.register_forward_pre_hook(add)
        for one in states:
            run(model, layer, one)
        hook.remove()
        narrow(layer.mlp, second, width)
        states = [run(model, layer, one) for one in states]
    model.config.intermediate_size = width
    return width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--num-samples", type=int, default=192)
    parser.add_argument("--device")
    given = parser.parse_args()
    try:
        place, stored = api.resolve_device(given.device), read_config(given.model).dtype or torch.float32
        dtype = "bfloat16" if multiplies_bfloat16(place.type) else "float32"
        model, tokenizer = api.load(given.model, str(place), dtype)
        batches = load_calibration(model, tokenizer, [given.text], given.num_samples, batch_size=1).batches
        width = compress(model, [batch["input_ids"].to(place) for batch in batches], given.keep)
    except (OSError, ValueError) as reason:
        sys.exit(f"narrow_script: {reason}")
    model.to(stored).save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    print(f"every MLP has {width} units; saved in {given.output}")


if __name__ == "__main__":
    main()
