"""Folding toys by short recipes, and the slow dense model that a folded one must equal."""

import copy

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from tenfold.models.plan import make_plan
from tenfold.models.recipe import parse_recipe
from tenfold.models.surgery import replace
from tenfold.nn import FactorizedEmbedding, FactorizedLinear

LOW_RANK = {"kind": "low_rank", "rank": 5}
KRONECKER = {"kind": "kronecker", "terms": 3}
TRAIN = {"kind": "tensor_train", "parts": 3, "rank": 4}
MLP = {"role": ["mlp.in", "mlp.gate", "mlp.out"], "structure": KRONECKER}
EMBED = {"role": "embed", "structure": LOW_RANK}


def rules(model) -> list[dict]:
    """Every matrix of ``model`` folded; a head of its own, too."""
    from tenfold.models.sites import find_sites, is_tied

    kinds = {"attn": LOW_RANK, "mlp": KRONECKER, "embed": LOW_RANK, "pooler": LOW_RANK, "head": TRAIN}
    roles = {site.role for site in find_sites(model)} - ({"head"} if is_tied(model) else set())
    return [{"role": role, "structure": kinds[role.split(".")[0]]} for role in sorted(roles)]


def fold(model, rules: list[dict], source: str = "weights", **recipe):
    """``model`` folded in place, and the changes."""
    plan = make_plan(model, parse_recipe({"name": "test", "replace": rules, **recipe}, "test"))
    return replace(model, plan, source)


def matrix(structure: dict, factors: dict[str, np.ndarray]) -> np.ndarray:
    """``W (out, in)`` by definition, in NumPy; knows the structures that are used here."""
    return globals()[f"_{structure['kind']}"](structure, factors)


def _low_rank(structure, f):
    return np.einsum("or,ri->oi", f["left"], f["right"])


def _kronecker(structure, f):
    return sum(np.kron(a, b) for a, b in zip(f["outer"], f["inner"], strict=True))


def _tensor_train(structure, f):
    w = np.einsum("xacr,rbds,sefy->abecdf", *(f[f"core_{k}"] for k in range(3)))
    return w.reshape(np.prod(structure["outs"]), np.prod(structure["ins"]))


def _placed(structure, f):
    w = np.zeros((structure["out_features"], structure["in_features"]))
    w[np.ix_(f["rows"], f["columns"])] = matrix(structure["base"], f)
    return w


def _parts(structure, f):
    return [
        matrix(
            part, {name.removeprefix(f"part_{k}_"): value for name, value in f.items() if name.startswith(f"part_{k}_")}
        )
        for k, part in enumerate(structure["parts"])
    ]


def _stacked(structure, f):
    return np.concatenate(_parts(structure, f))


def _sum(structure, f):
    return sum(_parts(structure, f))


@torch.no_grad()
def reference(dense, folded):
    """``dense``, the model before, with the matrices that the factors of ``folded`` stand for; an untied head apart."""
    model = copy.deepcopy(dense)
    head = model.get_output_embeddings()
    if head is not None and folded.config.quantization_config.untied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for path, layer in folded.named_modules():
        if isinstance(layer, FactorizedLinear | FactorizedEmbedding):
            factors = {
                name: value.double().numpy() for name, value in layer.factors().items() if value.is_floating_point()
            }
            maps = {name: value.numpy() for name, value in layer.factors().items() if not value.is_floating_point()}
            w = torch.from_numpy(matrix(layer.structure.to_json(), factors | maps))
            plain = model.get_submodule(path)
            plain.weight.copy_(w.T if isinstance(plain, Conv1D) else w)
            if getattr(plain, "bias", None) is not None:
                plain.bias.copy_(layer.bias if layer.bias is not None else torch.zeros(len(w)))
    return model
