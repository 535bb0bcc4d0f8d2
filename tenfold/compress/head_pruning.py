"""Narrowing carried out: the dimensions of the heads of an attention, values with their output matrix, queries with keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.compress.allocate import TradeoffCurve
from tenfold.compress.block import Block
from tenfold.compress.divergence import Trial
from tenfold.compress.evidence import corrected, fisher_loss
from tenfold.compress.structured_pruning import (
    ByLoss,
    PruningCriterion,
    Queries,
    measured_sizes,
    refit_site,
    restricted,
)
from tenfold.compress.unit_selection import Basis
from tenfold.models.attention_layout import Heads
from tenfold.models.distributed import all_reduce, all_reduce_number
from tenfold.models.sites import Site
from tenfold.structure import Dense, Scattered


@dataclass
class NarrowHeads:
    """The dimensions of the heads of one attention."""

    sites: list[Site]
    heads: Heads
    chooser: PruningCriterion = field(default_factory=ByLoss)

    def __post_init__(self):
        by_role = {site.role: site for site in self.sites}
        self.out, self.fused = by_role["attn.out"], "attn.qkv" in by_role
        self.into = {which: by_role["attn.qkv" if self.fused else f"attn.{which}"] for which in "qkv"}
        self.distinct = list({site.path: site for site in self.into.values()}.values())
        self.units = self.heads.units() if self.heads.freedom == "pairs" else [[i] for i in range(self.heads.size)]
        self.weighed = self.evident = [self.out.path, self.into["q"].path]

    def members(self, group: int) -> range:
        """The query heads that group ``group`` of keys and values serves."""
        return range(group * self.heads.each, (group + 1) * self.heads.each)

    def rows(self, which: str, head: int) -> Tensor:
        return self.heads.rows(which, head, self.fused)

    def columns(self, head: int) -> Tensor:
        """Where the output matrix reads query head ``head``."""
        return head * self.heads.size + torch.arange(self.heads.size)

    def curves(self, block: Block) -> list[TradeoffCurve]:
        curves = []
        width, size = self.into["q"].shape[1], self.heads.size
        for group in range(self.heads.groups):
            name, basis = f"{self.out.path} v{group}", self.chooser.values(self, block, group)
            block.orders[name] = torch.stack([basis.there, basis.back])
            costs = (
                {k: self._cost_of_values(block, group, basis, k) for k in measured_sizes(size)}
                if block.evidence
                else {}
            )
            options = np.arange(1, size + 1)
            price = width + self.heads.each * self.out.shape[0]
            maps = (1 + self.heads.each) * options  # where the rows and columns belong that stay
            losses = corrected(_whole(basis.losses), costs)[1:]
            curves.append(TradeoffCurve(name, price * options, losses, options.tolist(), indices=maps))
            name, price = f"{self.out.path} q{group}", (1 + self.heads.each) * width
            if self.heads.freedom == "none":
                curves.append(TradeoffCurve(name, np.array([price * size]), np.array([0.0]), [None]))
                continue
            found = self.chooser.queries(self, block, group)
            units, basis = self._in_order(found), found.basis
            block.orders[name] = torch.tensor(found.order) if basis is None else torch.stack([basis.there, basis.back])
            some = (
                measured_sizes(len(units)) if block.evidence and basis is not None else []
            )  # pairs go by the evidence
            costs = {
                k: self._cost_of_queries(block, group, [i for unit in units[k:] for i in unit], basis) for k in some
            }
            sizes = np.cumsum([len(unit) for unit in units])
            maps, options = (1 + self.heads.each) * sizes, np.arange(1, len(sizes) + 1).tolist()
            curves.append(
                TradeoffCurve(name, price * sizes, corrected(_whole(found.losses), costs)[1:], options, indices=maps)
            )
        return curves

    def _cost_of_values(self, block: Block, group: int, basis: Basis, count: int) -> float:
        """What it costs when the first ``count`` dimensions of the values of a group stay."""
        rest, weight = basis.back[:, count:] @ basis.there[count:], block.weight(self.out.path)
        at = [self.columns(head) for head in self.members(group)]
        return block.cost(self.out.path, torch.cat([weight[:, some] @ rest for some in at], 1), columns=torch.cat(at))

    def _cost_of_queries(self, block: Block, group: int, gone: list[int], basis: Basis | None) -> float:
        """What it costs when the dimensions ``gone`` of the queries of a group go."""
        path, size = self.into["q"].path, self.heads.size
        weight, bias = block.weight(path), block.bias(path)
        rest = torch.zeros(size, size).to(weight).index_fill_(0, torch.tensor(gone), 1.0) * torch.eye(size).to(weight)
        rest = rest if basis is None else basis.back @ rest @ basis.there
        at = torch.cat([self.rows("q", head) for head in self.members(group)])
        error = torch.block_diag(*[rest] * self.heads.each) @ weight[at]
        pairs = [(inputs, gradients[:, at]) for inputs, gradients in block.evidence[path]]
        shift = None if bias is None else torch.block_diag(*[rest] * self.heads.each) @ bias[at]
        return fisher_loss(pairs, error, shift, block.tokens)

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        """Return what the values of all groups lack at their ``sizes``, and then what queries and keys do."""
        kinds = ("v",) if self.heads.freedom == "none" else ("v", "q")
        return [trial for kind in kinds for trial in self._trial(block, kind, sizes)]

    def _trial(self, block: Block, kind: str, sizes: Mapping[str, Any]) -> list[Trial]:
        site = self.out if kind == "v" else self.into["q"]
        names = [f"{self.out.path} {kind}{group}" for group in range(self.heads.groups)]
        weight, bias, free = block.weight(site.path), block.bias(site.path), block.centres(self.out.path)
        error, shift = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for group, name in enumerate(names):
            rest = self._beyond(block.orders[name], sizes[name]).to(weight)
            for head in self.members(group):
                if kind == "v":
                    at = self.columns(head)
                    error[:, at] = -weight[:, at] @ rest
                else:
                    at = self.rows("q", head)
                    error[at] = -rest @ weight[at]
                    if shift is not None and bias is not None:
                        shift[at] = -rest @ bias[at]
        if kind == "v":
            shift = -error @ block.moments(self.out.path).mean if free else None
        return [Trial({name: sizes[name] for name in names}, {site.path: (error, shift)})] if error.any() else []

    def _beyond(self, known: Tensor, count: int) -> Tensor:
        """``(size, size)``: what the dimensions of a head hold that go when ``count`` units of an order, or of a basis, stay."""
        if known.dim() > 1:
            return known[1][:, count:] @ known[0][count:]
        gone = [i for unit in known.long().tolist()[count:] for i in self.units[unit]]
        rest = torch.zeros(self.heads.size, self.heads.size)
        rest[gone, gone] = 1.0
        return rest

    def query_products(self, block: Block, group: int) -> Tensor:
        """The second moment ``(units, units)`` over tokens of ``g q``, summed over the dimensions of a unit.

        That is what it costs, in twice nats a token, to lose units together.
        """
        path = self.into["q"].path
        weight, bias, second, tokens = block.weight(path).float(), block.bias(path), 0, 0
        at = torch.stack([self.rows("q", head) for head in self.members(group)])
        for inputs, gradients in block.evidence[path]:
            queries = inputs.float() @ weight[at.flatten()].T + (0 if bias is None else bias[at.flatten()].float())
            products = (queries * gradients[:, at.flatten()].float()).unflatten(1, at.shape).sum(1)
            each = torch.stack([products[:, unit].sum(1) for unit in self.units], 1).double()
            second, tokens = second + each.T @ each, tokens + len(each)
        assert isinstance(second, Tensor)
        return all_reduce(second) / max(1.0, all_reduce_number(tokens))

    def query_moments(self, block: Block, group: int) -> tuple[Tensor, Tensor]:
        """``G`` and ``C (size, size)`` of the queries of a group, their mean included."""
        site = self.into["q"]
        weight, moments = block.target(site.path).weight, block.moments(site.path)
        bias = block.new_bias(site.path, weight)
        outputs = second = torch.zeros(self.heads.size, self.heads.size, dtype=torch.float64)
        full, mean = block.outputs(site.path), moments.mean
        around = moments.second - torch.outer(mean, mean)
        for head in self.members(group):
            at = self.rows("q", head)
            middle = weight[at] @ mean + (0 if bias is None else bias[at])
            second = second + weight[at] @ around @ weight[at].T + torch.outer(middle, middle)
            outputs = outputs + full[at][:, at]
        return outputs, second / self.heads.each

    def _in_order(self, found: Queries) -> list[list[int]]:
        """The units of a head, the ones that stay first; in another basis every dimension is one."""
        units = self.units if found.basis is None else [[i] for i in range(self.heads.size)]
        return [units[unit] for unit in found.order]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.distinct:
            refit_site(block, site.path)
        if all(self._stays_whole(chosen, group) for group in range(self.heads.groups)):
            refit_site(block, self.out.path)
            return
        kept: dict[str, list[Tensor]] = {which: [] for which in "qkv"}
        matrices = {site.path: block.refitted(site.path).clone() for site in self.distinct}
        biases = {path: block.new_bias(path, matrix) for path, matrix in matrices.items()}
        reader, columns = block.refitted(self.out.path).clone(), []
        turn = torch.eye(len(reader.T)).to(reader)
        for group in range(self.heads.groups):
            count = chosen[f"{self.out.path} v{group}"]
            readers = [reader[:, self.columns(head)] for head in self.members(group)]
            basis = _evened(_basis(block.orders[f"{self.out.path} v{group}"]), readers)
            values = matrices[self.into["v"].path][self.rows("v", group)]
            basis = _balanced(basis, [values], readers, torch.arange(count))
            self._turn(matrices, biases, "v", group, basis.there)
            kept["v"].append(self.rows("v", group)[:count])
            for head in self.members(group):
                at = self.columns(head)
                reader[:, at] = reader[:, at] @ basis.back
                turn[at[:, None], at] = basis.there
                columns.append(at[:count])
            kept_q, kept_k = self._queries(block, matrices, biases, group, chosen[f"{self.out.path} q{group}"])
            kept["q"] += kept_q
            kept["k"].append(kept_k)
        self._place(block, matrices, biases, kept)
        at = torch.cat(columns)
        whole = torch.zeros_like(reader).index_copy(1, at, reader[:, at])
        if not block.settings.refit:
            near, bias = reader[:, at], block.new_bias(self.out.path, whole @ turn)
            if self.chooser.refit:
                near, bias = restricted(block, self.out.path, at, reader, turn)
        else:
            block.changed_before.add(self.out.path)
            near, bias = restricted(block, self.out.path, at, reader)
        self._place_out(block, near, bias, at)

    def _stays_whole(self, chosen: dict[str, Any], group: int) -> bool:
        queries = chosen[f"{self.out.path} q{group}"]
        units = self.heads.size if self.heads.freedom == "basis" else len(self.units)
        return chosen[f"{self.out.path} v{group}"] == self.heads.size and queries in (None, units)

    def _turn(self, matrices: dict, biases: dict, which: str, head: int, turn: Tensor) -> None:
        """Rows of one head in another basis."""
        path, at = self.into[which].path, self.rows(which, head)
        matrices[path][at] = turn @ matrices[path][at]
        bias = biases[path]
        if bias is not None:
            bias[at] = turn @ bias[at]

    def _queries(self, block: Block, matrices: dict, biases: dict, group: int, count: int | None):
        """Turn queries and keys of a group, and say which rows stay."""
        inside = torch.arange(self.heads.size)
        if count is not None:
            known = block.orders[f"{self.out.path} q{group}"]
            if known.dim() == 1:
                inside = torch.tensor(sorted(i for unit in known[:count].long() for i in self.units[unit]))
            else:
                inside = torch.arange(count)
                queries = [matrices[self.into["q"].path][self.rows("q", head)] for head in self.members(group)]
                keys = matrices[self.into["k"].path][self.rows("k", group)]
                basis = _balanced(_basis(known), queries, [keys.T], inside)
                for head in self.members(group):
                    self._turn(matrices, biases, "q", head, basis.there)
                self._turn(matrices, biases, "k", group, basis.back.T)
        return [self.rows("q", head)[inside] for head in self.members(group)], self.rows("k", group)[inside]

    def _place(self, block: Block, matrices: dict, biases: dict, kept: dict[str, list[Tensor]]) -> None:
        """Only the rows that stay, where the attention expects them."""
        for site in self.distinct:
            rows = torch.cat([part for which in "qkv" if self.into[which] is site for part in kept[which]])
            matrix, bias = matrices[site.path], biases[site.path]
            if len(rows) == len(matrix):
                block.put(site.path, matrix, bias)
                continue
            if bias is not None:
                bias = torch.zeros_like(bias).index_copy(0, rows, bias[rows])
            base = Dense(out_features=len(rows), in_features=matrix.shape[1])
            placed = Scattered(base=base, out_features=len(matrix), in_features=matrix.shape[1], map_columns=False)
            block.fold(site.path, placed, {"matrix": matrix[rows], "rows": rows.int()}, bias)

    def _place_out(self, block: Block, near: Tensor, bias: Tensor | None, columns: Tensor) -> None:
        out, inner = self.out.shape
        if len(columns) == inner:
            return block.put(self.out.path, torch.zeros(out, inner).to(near).index_copy(1, columns, near), bias)
        base = Dense(out_features=out, in_features=len(columns))
        placed = Scattered(base=base, out_features=out, in_features=inner, map_rows=False)
        return block.fold(self.out.path, placed, {"matrix": near, "columns": columns.int()}, bias)


def _basis(known: Tensor) -> Basis:
    """A basis that was kept as ``(2, size, size)``."""
    return Basis(known[0], known[1], np.zeros(len(known[0]) + 1))


def _evened(basis: Basis, readers: list[Tensor]) -> Basis:
    """``basis`` scaled so that the columns of what reads it are equally long: quantisers give several columns one scale."""
    lengths = torch.stack([(reader @ basis.back).square().sum(0) for reader in readers]).sum(0).sqrt()
    scale = (lengths / lengths.mean().clamp_min(1e-30)).clamp_min(1e-6)
    return Basis(scale[:, None] * basis.there, basis.back / scale, basis.losses)


def _balanced(basis: Basis, written: list[Tensor], readers: list[Tensor], inside: Tensor) -> Basis:
    """``basis`` scaled as a whole so that the rows ``inside``, which stay, weigh what the columns do which read them.

    Nothing else sees the scale, but the steps of an optimizer are equally large in both.
    """
    rows = torch.stack([basis.there[inside] @ some for some in written]).square().mean(0).sum().sqrt()
    columns = torch.stack([some @ basis.back[:, inside] for some in readers]).square().mean(0).sum().sqrt()
    scale = (columns / rows).sqrt() if rows > 0 and columns > 0 else torch.ones_like(rows)
    return Basis(scale * basis.there, basis.back / scale, basis.losses)


def _whole(losses: np.ndarray) -> np.ndarray:
    """``losses`` with none where everything stays."""
    return np.append(losses[:-1], 0.0)
