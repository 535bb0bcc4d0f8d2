"""Order of the hidden units of an MLP: any permutation leaves the function as it is, and a structure fits better after some.

With a permutation ``order`` the new unit ``k`` is the old unit ``order[k]``.

Reference: Git Re-Basin, arXiv 2209.04836.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.invariances.stream import check_dense
from tenfold.models.sites import Site, find_sites, weight_of
from tenfold.models.surgery import set_matrix
from tenfold.structure import Scattered, Structure
from tenfold.structure.permutation_search import search


def mlp_sites(model: PreTrainedModel) -> dict[str, list[Site]]:
    """Return the matrices of every MLP by the path up to their last number."""
    groups: dict[str, list[Site]] = {}
    for site in find_sites(model):
        if site.role.startswith("mlp."):
            number = re.match(r"(.*\.)?\d+(?=\.)", site.path)
            groups.setdefault(number[0] if number else "", []).append(site)
    return groups


def hidden_weights(
    model: PreTrainedModel, path: str, chosen: Callable[[Site], bool] = lambda site: True
) -> list[Tensor]:
    """Return the ``chosen`` matrices of the MLP ``path`` of ``mlp_sites``, hidden units as rows ``(units, width)``.

    In, gate, and out transposed, in float64.
    """
    sites, found = mlp_sites(model)[path], []
    for site in filter(chosen, sites):
        matrix = weight_of(model.get_submodule(site.path)).detach().double()
        found += [matrix.T] if site.role == "mlp.out" else matrix.split(_count_units(sites))
    return found


@torch.no_grad()
def permute_hidden(model: PreTrainedModel, orders: Mapping[str, Tensor | Sequence[int]]) -> PreTrainedModel:
    """Permute hidden units: ``W_in[order]``, ``b_in[order]`` (those of the gate, too) and ``W_out[:, order]``.

    Args:
        orders: ``{path of an MLP in mlp_sites: order (units,)}``.

    Raises:
        ValueError: an order is no permutation of its units, or a matrix is factorised; the model is as it was.
    """
    groups, changes = mlp_sites(model), []
    for path, given in orders.items():
        sites = groups[path]
        order = _check_order(given, _count_units(sites), f"the hidden units of {sites[-1].path}")
        check_dense((site.path, model.get_submodule(site.path)) for site in sites)
        changes += [(site, order) for site in sites]
    for site, order in changes:
        module = model.get_submodule(site.path)
        matrix = weight_of(module).clone()
        if site.role == "mlp.out":
            set_matrix(module, matrix[:, order], None)
        else:  # both halves of a fused matrix alike
            rows = torch.cat([order + start for start in range(0, site.shape[0], len(order))])
            set_matrix(module, matrix[rows], None if module.bias is None else module.bias[rows])
    return model


def _count_units(sites: list[Site]) -> int:
    out = next((site for site in sites if site.role == "mlp.out"), None)
    if out is None:
        raise ValueError(
            f"{sites[0].path} has no role mlp.out beside it; add it to the table in tenfold/models/architectures.py"
        )
    for site in sites:
        if site.interleaved or site.shape[0 if site is not out else 1] % out.shape[1]:
            raise ValueError(
                f"the rows of {site.path} alternate or are none of {out.shape[1]} units; leave their order"
            )
    return out.shape[1]


def _check_order(given: Tensor | Sequence[int], size: int, what: str) -> Tensor:
    order = torch.as_tensor(given).long().cpu()
    if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(size)):
        raise ValueError(
            f"the order of {what} has shape {tuple(order.shape)}, but must hold each of 0 to {size - 1} once"
        )
    return order


def order_hidden(
    weights: Sequence[Tensor], structure: Structure, *, rounds: int = 5, starts: int = 1, seed: int = 0
) -> Tensor:
    """Search an order ``(units,)`` of hidden units in which all matrices of an MLP fit ``structure`` well.

    ``minimise sum_i ||W_i[order] - What_i||^2``; the result is never worse than the order they have. The search of
    ``tenfold.structure.permutation_search`` works on the matrices side by side, as one with more columns. For block trains
    that is the same problem, because blocks share nothing; a sum of Kronecker products shares its inner factors then, which is
    stricter.

    Args:
        weights: ``(units, width)`` each, as ``hidden_weights`` returns them. Scale them to weigh.
        structure: of one of them, with ``outs`` and ``ins``: Kronecker, BlockTensorTrain, TensorTrain.

    Raises:
        ImportError: scipy is missing.
        ValueError: the matrices have another shape than the structure, or it has no ``outs`` and ``ins``.
    """
    if not {"outs", "ins"} <= {field.name for field in dataclasses.fields(structure)}:
        raise ValueError(
            f"{structure} has no outs and ins, so that the order of its rows can't be searched; take Kronecker"
        )
    if wrong := [tuple(weight.shape) for weight in weights if tuple(weight.shape) != structure.shape]:
        raise ValueError(
            f"a weight has shape {wrong[0]} but {structure} is {structure.shape}: (units, width) for every weight"
        )
    beside = torch.cat([weight.detach().double().cpu() for weight in weights], 1)
    first, *rest = structure.ins  # type: ignore[attr-defined]
    base = dataclasses.replace(structure, ins=(first * len(weights), *rest))
    permuted = Scattered(base=base, out_features=beside.shape[0], in_features=beside.shape[1], map_columns=False)
    order = search(permuted, beside, rounds=rounds, starts=starts, seed=seed)["rows"].long()

    def loss(rows: Tensor) -> float:
        pairs = [
            (weight[rows], structure.fit(weight[rows], sweeps=20)) for weight in beside.split(structure.shape[1], 1)
        ]
        return sum(float((weight - structure.dense(factors)).square().sum()) for weight, factors in pairs)

    same = torch.arange(len(order))
    return order if loss(order) < loss(same) else same
