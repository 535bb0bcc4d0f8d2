"""Symmetries inside a block: the order of the hidden units of an MLP, and the bases of the heads of an attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.models.attention_layout import Heads, heads_of
from tenfold.models.invariances.stream import check_dense
from tenfold.models.sites import Site, find_sites, weight_of
from tenfold.models.surgery import set_matrix

LARGEST_CONDITION = 1e6  # of a basis

Where = int | str  # the number of a layer, or the path of a block, of a module in it, or of one of its matrices


# hidden units ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def permute_hidden(model: PreTrainedModel, orders: Mapping[Where, Tensor | Sequence[int]]) -> PreTrainedModel:
    """``W_in[order]``, ``b_in[order]`` (those of the gate, too) and ``W_out[:, order]``: the same function.

    Args:
        orders: ``{layer or path of an MLP: order (units,)}``.

    Raises:
        ValueError: no MLP or several are meant, an order is no permutation of its units, or a matrix is folded.
    """
    groups, work = groups_of(model, "mlp."), []
    for where, given in orders.items():
        sites = _chosen(groups, where, "MLP")
        order = checked_order(given, _units(sites), f"the hidden units of {sites[-1].path}")
        check_dense((site.path, model.get_submodule(site.path)) for site in sites)
        work += [(site, order) for site in sites]
    for site, order in work:
        module = model.get_submodule(site.path)
        matrix = weight_of(module).clone()
        if site.role == "mlp.out":
            set_matrix(module, matrix[:, order], None)
        else:  # of a fused matrix both halves alike
            rows = torch.cat([order + start for start in range(0, site.shape[0], len(order))])
            set_matrix(module, matrix[rows], None if module.bias is None else module.bias[rows])
    return model


def hidden_weights(
    model: PreTrainedModel, where: Where, which: Callable[[Site], bool] = lambda site: True
) -> list[Tensor]:
    """Every matrix of an MLP, or ``which`` of them, with its hidden units as rows ``(units, width)``.

    In, gate, and out transposed, in float64.

    Raises:
        ValueError: no MLP or several are meant.
    """
    sites, found = _chosen(groups_of(model, "mlp."), where, "MLP"), []
    for site in filter(which, sites):
        matrix = weight_of(model.get_submodule(site.path)).detach().double()
        found += [matrix.T] if site.role == "mlp.out" else matrix.split(_units(sites))
    return found


def _units(sites: list[Site]) -> int:
    out = next((site for site in sites if site.role == "mlp.out"), None)
    if out is None:
        raise ValueError(
            f"{sites[0].path} has no role mlp.out beside it; add it to the table in tenfold/models/roles.py"
        )
    for site in sites:
        if site.interleaved or site.shape[0 if site is not out else 1] % out.shape[1]:
            raise ValueError(
                f"the rows of {site.path} alternate or are none of {out.shape[1]} units; leave their order"
            )
    return out.shape[1]


# heads -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def turn_heads(
    model: PreTrainedModel, layer: Where, values: Tensor | None = None, queries: Tensor | None = None
) -> PreTrainedModel:
    """Another basis for every group of heads: ``v -> M v``; ``q -> A q`` with ``k -> A^-T k``. Biases follow.

    The output matrix reads ``M^-1``, and ``q^T k`` stays, so that neither changes the function.

    Args:
        layer: its number, or the path of its attention.
        values: ``M (groups, size, size)``, or one ``(size, size)`` for all, invertible.
        queries: ``A``, likewise. With rotary positions only blocks ``[[a, -b], [b, a]]`` of each pair of dimensions
            ``(i, i + rotary / 2)``, and any basis of the dimensions that are not rotated.

    Raises:
        ValueError: the heads are not known, a basis has another shape, or is not free or not invertible.
    """
    sites = _chosen(groups_of(model, "attn."), layer, "attention")
    heads, roles = heads_at(model, sites), {site.role: site for site in sites}
    if heads is None:
        raise ValueError(f"the heads of {sites[0].path} are not known; leave them as they are")
    check_dense((site.path, model.get_submodule(site.path)) for site in sites)
    new = None if values is None else _bases(values, heads, "values")
    turn = None if queries is None else _bases(queries, heads, "queries")
    if turn is not None:
        _check_queries(turn, heads, sites[0])
        _turn_rows(model, roles, heads, "q", turn.repeat_interleave(heads.each, 0))
        _turn_rows(model, roles, heads, "k", torch.linalg.inv(turn).mT)
    if new is not None:
        _turn_rows(model, roles, heads, "v", new)
        out = model.get_submodule(roles["attn.out"].path)
        back = torch.linalg.inv(new).repeat_interleave(heads.each, 0)
        matrix = weight_of(out).double().unflatten(1, (heads.query, heads.size))
        set_matrix(out, torch.einsum("ohi,hij->ohj", matrix, back.to(matrix)).flatten(1), None)
    return model


def heads_at(model: PreTrainedModel, sites: list[Site]) -> Heads | None:
    """The heads of one attention; None where they are not known or the sizes do not add up."""
    inside = [site for site in sites if site.role != "attn.out"]
    if not inside or len(inside) == len(sites):
        return None
    heads = heads_of(model, model.get_submodule(inside[0].path.rpartition(".")[0]))
    fits = heads and sum(site.shape[0] for site in inside) == (heads.query + 2 * heads.groups) * heads.size
    return heads if fits else None


def _bases(given: Tensor, heads: Heads, what: str) -> Tensor:
    """One basis per group ``(groups, size, size)`` in float64."""
    shape = (heads.groups, heads.size, heads.size)
    if tuple(given.shape) not in (shape, shape[1:]):
        raise ValueError(f"the basis of the {what} has shape {tuple(given.shape)}, but the heads need {shape}")
    bases = given.detach().double().expand(shape)
    for group, condition in enumerate(torch.linalg.cond(bases).tolist()):
        if not condition < LARGEST_CONDITION:
            raise ValueError(
                f"the basis of the {what} of group {group} has condition number {condition:.2g}, too much to be inverted well; "
                f"take one below {LARGEST_CONDITION:.0e}"
            )
    return bases


def _check_queries(bases: Tensor, heads: Heads, site: Site) -> None:
    """Raise ValueError for a basis that does not leave the product of queries and keys as it is."""
    if heads.freedom == "none":
        raise ValueError(
            f"a norm stands between {site.path} and the product of queries and keys, so that their basis is not free; "
            "turn the values only"
        )
    if (
        heads.freedom == "pairs"
        and float(off := (bases - _paired(bases, heads)).abs().max() / bases.abs().max()) > 1e-6
    ):
        raise ValueError(
            f"queries and keys of {site.path} are rotated by position in pairs (i, i + {heads.rotary // 2}), so that only turns "
            f"and scales [[a, -b], [b, a]] of each pair are free; the basis is off by {off:.2g} of its largest entry"
        )


def _paired(bases: Tensor, heads: Heads) -> Tensor:
    """The nearest bases that commute with rotary positions."""
    one, two = slice(heads.rotary // 2), slice(heads.rotary // 2, heads.rotary)
    rest, near = slice(heads.rotary, None), torch.zeros_like(bases)
    cosine = (bases[:, one, one] + bases[:, two, two]).diagonal(dim1=1, dim2=2).diag_embed() / 2
    sine = (bases[:, two, one] - bases[:, one, two]).diagonal(dim1=1, dim2=2).diag_embed() / 2
    near[:, one, one], near[:, two, two], near[:, two, one], near[:, one, two] = cosine, cosine, sine, -sine
    near[:, rest, rest] = bases[:, rest, rest]
    return near


def _turn_rows(model: PreTrainedModel, roles: dict[str, Site], heads: Heads, which: str, turns: Tensor) -> None:
    """``turns (heads, size, size)`` times the rows of every head, and the biases."""
    fused = "attn.qkv" in roles
    module = model.get_submodule(roles["attn.qkv" if fused else f"attn.{which}"].path)
    at = torch.stack([heads.rows(which, head, fused) for head in range(len(turns))])
    matrix, bias = weight_of(module).double().clone(), None
    turns = turns.to(matrix)
    matrix[at] = turns @ matrix[at]
    if module.bias is not None:
        bias = module.bias.double().clone()
        bias[at] = (turns @ bias[at][..., None])[..., 0]
    set_matrix(module, matrix, bias)


# which matrices belong together ----------------------------------------------------------------------------------------


def groups_of(model: PreTrainedModel, prefix: str) -> dict[str, list[Site]]:
    """The sites whose role starts with ``prefix`` by the path up to its last number: all of one MLP or attention."""
    groups: dict[str, list[Site]] = {}
    for site in find_sites(model):
        if site.role.startswith(prefix):
            number = re.match(r"(.*\.)?\d+(?=\.)", site.path)
            groups.setdefault(number[0] if number else "", []).append(site)
    return groups


def _chosen(groups: dict[str, list[Site]], where: Where, what: str) -> list[Site]:
    """The one group that ``where`` means, whole."""

    def means(key: str, sites: list[Site]) -> bool:
        if isinstance(where, int):
            return sites[0].layer == where
        return key == where or any(f"{site.path}.".startswith(f"{where}.") for site in sites)

    found = [sites for key, sites in groups.items() if means(key, sites)]
    if len(found) != 1:
        raise ValueError(
            f"{where!r} means {len(found)} {what}s of this model; name one of {', '.join(groups) or 'none'}"
        )
    return found[0]


def checked_order(given: Tensor | Sequence[int], size: int, what: str) -> Tensor:
    """``given`` as a permutation ``(size,)``."""
    order = torch.as_tensor(given).long().cpu()
    if order.ndim != 1 or not torch.equal(order.sort().values, torch.arange(size)):
        raise ValueError(
            f"the order of {what} has shape {tuple(order.shape)}, but must hold each of 0 to {size - 1} once"
        )
    return order
