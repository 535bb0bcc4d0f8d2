"""Pruning of the dimensions of the heads of an attention: values with their output matrix, queries with keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.block import Action, Block
from tenfold.compression.divergence import Trial
from tenfold.compression.evidence import fisher_losses, scale_losses
from tenfold.compression.structured_pruning import PruningCriterion, measured_sizes, solve_restricted
from tenfold.compression.unit_selection import Basis
from tenfold.models.attention_layout import Heads
from tenfold.models.distributed import all_reduce, all_reduce_number
from tenfold.models.sites import Site
from tenfold.structure import Dense, Scattered


@dataclass
class PruneHeads(Action):
    """Prune the dimensions of the heads of one attention."""

    sites: list[Site]
    heads: Heads
    criterion: PruningCriterion

    def __post_init__(self):
        by_role = {site.role: site for site in self.sites}
        self.out, self.fused = by_role["attn.out"], "attn.qkv" in by_role
        self.into = {which: by_role["attn.qkv" if self.fused else f"attn.{which}"] for which in "qkv"}
        self.distinct = list({site.path: site for site in self.into.values()}.values())
        self.units = self.heads.units() if self.heads.freedom == "pairs" else [[i] for i in range(self.heads.size)]
        self.fisher_paths = self.evidence_paths = [self.out.path, self.into["q"].path]

    def name(self, kind: str, group: int) -> str:
        """Return the name of the item of the values (``v``) or the queries and keys (``q``) of a group."""
        return f"{self.out.path} {kind}{group}"

    def members(self, group: int) -> range:
        """Return the query heads that group ``group`` of keys and values serves."""
        return range(group * self.heads.each, (group + 1) * self.heads.each)

    def rows(self, which: str, head: int) -> Tensor:
        """Return the rows of ``q``, ``k`` or ``v`` that make a head."""
        return self.heads.rows(which, head, self.fused)

    def columns(self, head: int) -> Tensor:
        """Return the columns of the output matrix that read query head ``head``."""
        return head * self.heads.size + torch.arange(self.heads.size)

    def curves(self, block: Block) -> list[TradeoffCurve]:
        return [curve for g in range(self.heads.groups) for curve in self._group_curves(block, g)]

    def _group_curves(self, block: Block, group: int) -> tuple[TradeoffCurve, TradeoffCurve]:
        """Return the curves of the values, and of the queries and keys, of a group."""
        inner, each, size = self.into["q"].shape[1], self.heads.each, self.heads.size
        basis = self.criterion.choose_value_basis(self, block, group)
        values = self._basis_curve(block, "v", group, basis, inner + each * self.out.shape[0])
        name, numel = self.name("q", group), (1 + each) * inner
        if self.heads.freedom == "none":
            return values, TradeoffCurve(name, np.array([numel * size]), np.array([0.0]), [None])
        found = self.criterion.order_queries(self, block, group)
        if isinstance(found, Basis):
            return values, self._basis_curve(block, "q", group, found, numel)
        order, losses = found  # which go by the evidence already
        block.orders[name] = torch.tensor(order)
        return values, self._curve(name, losses, {}, numel, np.cumsum([len(self.units[unit]) for unit in order]))

    def _basis_curve(self, block: Block, kind: str, group: int, basis: Basis, numel: int) -> TradeoffCurve:
        name, measured = self.name(kind, group), {}
        known = block.orders[name] = torch.stack([basis.forward, basis.inverse])
        for count in measured_sizes(self.heads.size) if block.evidence else []:
            at, error, shift = self._error(block, kind, group, self._dropped_part(known, count))
            if kind == "v":
                measured[count] = block.evidence_loss(self.out.path, error, at)
            else:
                pairs = [(inputs, gradients[:, at]) for inputs, gradients in block.evidence[self.into["q"].path]]
                measured[count] = fisher_losses(pairs, error, shift, block.activations.num_tokens)[0]
        return self._curve(name, basis.losses, measured, numel, np.arange(1, self.heads.size + 1))

    def _curve(
        self, name: str, losses: np.ndarray, measured: Mapping[int, float], numel: int, sizes: np.ndarray
    ) -> TradeoffCurve:
        """Return the curve of an item of which 1, 2, .. units stay.

        Args:
            losses: of no, one, two, .. units.
            measured: by the evidence, at some of these.
            numel: parameters of a dimension.
            sizes: dimensions of one, two, .. units.
        """
        losses = scale_losses(np.append(losses[:-1], 0.0), measured)[1:]
        indices = (1 + self.heads.each) * sizes  # of the rows and columns that stay
        return TradeoffCurve(name, numel * sizes, losses, [*range(1, len(sizes) + 1)], indices=indices)

    def _error(self, block: Block, kind: str, group: int, rest: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what goes with the part ``rest (size, size)`` of the values or the queries of a group.

        Returns:
            The columns of the output matrix, or the rows of that of the queries; their error; and that of the bias.
        """
        weight, members = block.weight((self.out if kind == "v" else self.into["q"]).path), self.members(group)
        if kind == "v":
            columns = [self.columns(head) for head in members]
            return torch.cat(columns), torch.cat([weight[:, some] @ rest for some in columns], 1), None
        rows, bias = [self.rows("q", head) for head in members], block.bias(self.into["q"].path)
        shift = None if bias is None else torch.cat([rest @ bias[some] for some in rows])
        return torch.cat(rows), torch.cat([rest @ weight[some] for some in rows]), shift

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        kinds = ("v",) if self.heads.freedom == "none" else ("v", "q")
        found = [self._trial(block, kind, sizes) for kind in kinds]
        return [trial for trial in found if trial.correction[0].any()]

    def _trial(self, block: Block, kind: str, sizes: Mapping[str, Any]) -> Trial:
        """Return the error of the values, or of the queries, of all groups at their sizes."""
        path = (self.out if kind == "v" else self.into["q"]).path
        names = [self.name(kind, group) for group in range(self.heads.groups)]
        weight, bias = block.weight(path), block.bias(path)
        error, shift = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for group, name in enumerate(names):
            rest = self._dropped_part(block.orders[name], sizes[name]).to(weight)
            at, part, lost = self._error(block, kind, group, rest)
            (error.T if kind == "v" else error)[at] = -(part.T if kind == "v" else part)
            if shift is not None and lost is not None:
                shift[at] = -lost
        if kind == "v":
            shift = -error @ block.moments(path).mean if block.centers(path) else None
        return Trial({name: sizes[name] for name in names}, path, (error, shift))

    def _dropped_part(self, known: Tensor, count: int) -> Tensor:
        """Return the projection ``(size, size)`` on what goes when ``count`` units of an order, or of a basis, stay."""
        if known.dim() > 1:
            return known[1][:, count:] @ known[0][count:]
        gone = [i for unit in known.long().tolist()[count:] for i in self.units[unit]]
        rest = torch.zeros(self.heads.size, self.heads.size)
        rest[gone, gone] = 1.0
        return rest

    def query_products(self, block: Block, group: int) -> Tensor:
        """Return the second moment ``(units, units)`` over tokens of ``g q``, summed over the dimensions of a unit.

        That is twice the loss, in nats a token, of removing units together.
        """
        path = self.into["q"].path
        weight, bias, tokens = block.weight(path).float(), block.bias(path), 0
        second = torch.zeros(len(self.units), len(self.units), dtype=torch.float64)
        at = torch.stack([self.rows("q", head) for head in self.members(group)])
        for inputs, gradients in block.evidence[path]:
            queries = inputs.float() @ weight[at.flatten()].T + (0 if bias is None else bias[at.flatten()].float())
            products = (queries * gradients[:, at.flatten()].float()).unflatten(1, at.shape).sum(1)
            each = torch.stack([products[:, unit].sum(1) for unit in self.units], 1).double()
            second, tokens = second + each.T @ each, tokens + len(each)
        return all_reduce(second) / max(1.0, all_reduce_number(tokens))

    def query_moments(self, block: Block, group: int) -> tuple[Tensor, Tensor]:
        """Return ``G`` and ``C (size, size)`` of the queries of a group, their mean included."""
        path = self.into["q"].path
        weight, moments = block.target(path).weight, block.moments(path)
        bias = block.corrected_bias(path, weight)
        outputs = second = torch.zeros(self.heads.size, self.heads.size, dtype=torch.float64)
        full, mean = block.output_metric(path), moments.mean
        covariance = moments.second - torch.outer(mean, mean)
        for head in self.members(group):
            at = self.rows("q", head)
            middle = weight[at] @ mean + (0 if bias is None else bias[at])
            second = second + weight[at] @ covariance @ weight[at].T + torch.outer(middle, middle)
            outputs = outputs + full[at][:, at]
        return outputs, second / self.heads.each

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.distinct:
            block.refit_dense(site.path)
        whole, units = self.heads.size, self.heads.size if self.heads.freedom == "basis" else len(self.units)
        groups = range(self.heads.groups)
        if all(chosen[self.name("v", g)] == whole and chosen[self.name("q", g)] in (None, units) for g in groups):
            block.refit_dense(self.out.path)
            return
        kept: dict[str, list[Tensor]] = {which: [] for which in "qkv"}
        matrices = {site.path: block.refitted_weight(site.path).clone() for site in self.distinct}
        biases = {path: block.corrected_bias(path, matrix) for path, matrix in matrices.items()}

        def rows_of(which: str, head: int) -> Tensor:
            return matrices[self.into[which].path][self.rows(which, head)]

        def change_basis(which: str, head: int, basis: Tensor) -> None:
            path, at = self.into[which].path, self.rows(which, head)
            for value in (matrices[path], biases[path]):
                if value is not None:
                    value[at] = basis @ value[at]

        reader, columns = block.refitted_weight(self.out.path).clone(), []
        basis = torch.eye(len(reader.T)).to(reader)
        for group in groups:
            count, members = chosen[self.name("v", group)], self.members(group)
            readers = [reader[:, self.columns(head)] for head in members]
            forward, inverse = block.orders[self.name("v", group)]
            forward, inverse = _equalize_columns(forward, inverse, readers)
            forward, inverse = _balance(forward, inverse, [rows_of("v", group)], readers, count)
            change_basis("v", group, forward)
            kept["v"].append(self.rows("v", group)[:count])
            for head in members:
                at = self.columns(head)
                reader[:, at] = reader[:, at] @ inverse
                basis[at[:, None], at] = forward
                columns.append(at[:count])
            inside, count = torch.arange(whole), chosen[self.name("q", group)]
            if count is not None:
                known = block.orders[self.name("q", group)]
                if known.dim() == 1:
                    inside = torch.tensor(sorted(i for unit in known[:count].long() for i in self.units[unit]))
                else:
                    inside, queries = torch.arange(count), [rows_of("q", head) for head in members]
                    forward, inverse = _balance(known[0], known[1], queries, [rows_of("k", group).T], count)
                    for head in members:
                        change_basis("q", head, forward)
                    change_basis("k", group, inverse.T)
            kept["q"] += [self.rows("q", head)[inside] for head in members]
            kept["k"].append(self.rows("k", group)[inside])
        for site in self.distinct:
            rows = torch.cat([part for which in "qkv" if self.into[which] is site for part in kept[which]])
            self._install_rows(block, site, matrices[site.path], biases[site.path], rows)
        self._install_columns(block, reader, torch.cat(columns), basis)

    def _install_rows(self, block: Block, site: Site, matrix: Tensor, bias: Tensor | None, rows: Tensor) -> None:
        """Install the ``rows`` that stay, scattered to where the attention expects them."""
        if len(rows) == len(matrix):
            return block.set_dense(site.path, matrix, bias)
        if bias is not None:
            bias = torch.zeros_like(bias).index_copy(0, rows, bias[rows])
        base = Dense(out_features=len(rows), in_features=matrix.shape[1])
        structure = Scattered(base=base, out_features=len(matrix), in_features=matrix.shape[1], map_columns=False)
        return block.install(site.path, structure, {"matrix": matrix[rows], "rows": rows.int()}, bias)

    def _install_columns(self, block: Block, reader: Tensor, at: Tensor, basis: Tensor) -> None:
        """Install the output matrix, which reads the columns ``at`` that stay, refitted if wanted.

        Args:
            basis: ``(in, in)``, of the values.
        """
        path, (out, inner) = self.out.path, self.out.shape
        if block.settings.refit:
            block.changed_before.add(path)
            near, bias = solve_restricted(block, path, at, reader)
        elif self.criterion.refit:
            near, bias = solve_restricted(block, path, at, reader, basis)
        else:
            near = reader[:, at]
            bias = block.corrected_bias(path, torch.zeros_like(reader).index_copy(1, at, near) @ basis)
        if len(at) == inner:
            return block.set_dense(path, torch.zeros(out, inner).to(near).index_copy(1, at, near), bias)
        base = Dense(out_features=out, in_features=len(at))
        structure = Scattered(base=base, out_features=out, in_features=inner, map_rows=False)
        return block.install(path, structure, {"matrix": near, "columns": at.int()}, bias)


def _equalize_columns(forward: Tensor, inverse: Tensor, readers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale a basis so that the columns of its readers are equally long: quantisers give several columns one scale."""
    lengths = torch.stack([(reader @ inverse).square().sum(0) for reader in readers]).sum(0).sqrt()
    scale = (lengths / lengths.mean().clamp_min(1e-30)).clamp_min(1e-6)
    return scale[:, None] * forward, inverse / scale


def _balance(
    forward: Tensor, inverse: Tensor, written: list[Tensor], readers: list[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Scale a basis as a whole so that its first ``count`` rows have the norm of the columns that read them.

    This changes no output, but the steps of an optimizer are then equally large in both.
    """
    rows = torch.stack([forward[:count] @ some for some in written]).square().mean(0).sum().sqrt()
    columns = torch.stack([some @ inverse[:, :count] for some in readers]).square().mean(0).sum().sqrt()
    scale = (columns / rows).sqrt() if rows > 0 and columns > 0 else torch.ones_like(rows)
    return scale * forward, inverse / scale
