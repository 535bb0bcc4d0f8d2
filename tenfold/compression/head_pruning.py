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
from tenfold.models.attention_layout import Heads
from tenfold.models.distributed import all_reduce, all_reduce_number
from tenfold.models.sites import Site
from tenfold.structure import Dense, Scattered

BasisPair = tuple[Tensor, Tensor]  # a basis of a head (size, size), and its inverse


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
        self.evidence_paths = [self.out.path, self.into["q"].path]

    @property
    def fisher_paths(self) -> list[str]:
        return [self.out.path, self.into["q"].path]

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
        groups = range(self.heads.groups)
        return [curve for g in groups for curve in (self._value_curve(block, g), self._query_curve(block, g))]

    def _value_curve(self, block: Block, group: int) -> TradeoffCurve:
        name, size, basis = (
            self.name("v", group),
            self.heads.size,
            self.criterion.choose_value_basis(self, block, group),
        )
        block.orders[name] = torch.stack([basis.forward, basis.inverse])
        measured = {}
        for count in measured_sizes(size) if block.evidence else []:
            rest, weight = basis.inverse[:, count:] @ basis.forward[count:], block.weight(self.out.path)
            at = [self.columns(head) for head in self.members(group)]
            error = torch.cat([weight[:, some] @ rest for some in at], 1)
            measured[count] = block.evidence_loss(self.out.path, error, torch.cat(at))
        options = np.arange(1, size + 1)
        numel = self.into["q"].shape[1] + self.heads.each * self.out.shape[0]
        indices = (1 + self.heads.each) * options  # of the rows and columns that stay
        losses = scale_losses(_end_with_zero(basis.losses), measured)[1:]
        return TradeoffCurve(name, numel * options, losses, options.tolist(), indices=indices)

    def _query_curve(self, block: Block, group: int) -> TradeoffCurve:
        name, size, numel = self.name("q", group), self.heads.size, (1 + self.heads.each) * self.into["q"].shape[1]
        if self.heads.freedom == "none":
            return TradeoffCurve(name, np.array([numel * size]), np.array([0.0]), [None])
        found = self.criterion.order_queries(self, block, group)
        basis = found.basis
        units = [([[i] for i in range(size)] if basis else self.units)[unit] for unit in found.order]
        block.orders[name] = torch.stack([basis.forward, basis.inverse]) if basis else torch.tensor(found.order)
        measured = {}
        for count in measured_sizes(len(units)) if block.evidence and basis else []:  # pairs go by the evidence already
            gone, dropped = [i for unit in units[count:] for i in unit], torch.zeros_like(basis.forward)
            dropped[gone, gone] = 1.0
            measured[count] = self._query_loss(block, group, basis.inverse @ dropped @ basis.forward)
        sizes = np.cumsum([len(unit) for unit in units])
        losses = scale_losses(_end_with_zero(found.losses), measured)[1:]
        indices, options = (1 + self.heads.each) * sizes, np.arange(1, len(sizes) + 1).tolist()
        return TradeoffCurve(name, numel * sizes, losses, options, indices=indices)

    def _query_loss(self, block: Block, group: int, rest: Tensor) -> float:
        """Return the loss when the part ``rest (size, size)`` of the queries of a group goes."""
        path = self.into["q"].path
        weight, bias = block.weight(path), block.bias(path)
        at = torch.cat([self.rows("q", head) for head in self.members(group)])
        error = torch.block_diag(*[rest] * self.heads.each) @ weight[at]
        pairs = [(inputs, gradients[:, at]) for inputs, gradients in block.evidence[path]]
        shift = None if bias is None else torch.block_diag(*[rest] * self.heads.each) @ bias[at]
        return fisher_losses(pairs, error, shift, block.activations.num_tokens)[0]

    def trials(self, block: Block, sizes: Mapping[str, Any]) -> list[Trial]:
        kinds = ("v",) if self.heads.freedom == "none" else ("v", "q")
        return [trial for kind in kinds for trial in self._trial(block, kind, sizes)]

    def _trial(self, block: Block, kind: str, sizes: Mapping[str, Any]) -> list[Trial]:
        """Return the error of the values, or of the queries, of all groups at their sizes, if there is any."""
        site = self.out if kind == "v" else self.into["q"]
        names = [self.name(kind, group) for group in range(self.heads.groups)]
        weight, bias = block.weight(site.path), block.bias(site.path)
        error, shift = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for group, name in enumerate(names):
            rest = self._dropped_part(block.orders[name], sizes[name]).to(weight)
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
            shift = -error @ block.moments(self.out.path).mean if block.centers(self.out.path) else None
        return [Trial({name: sizes[name] for name in names}, {site.path: (error, shift)})] if error.any() else []

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
        if all(self._stays_whole(chosen, group) for group in range(self.heads.groups)):
            block.refit_dense(self.out.path)
            return
        kept: dict[str, list[Tensor]] = {which: [] for which in "qkv"}
        matrices = {site.path: block.refitted_weight(site.path).clone() for site in self.distinct}
        biases = {path: block.corrected_bias(path, matrix) for path, matrix in matrices.items()}
        reader, columns = block.refitted_weight(self.out.path).clone(), []
        basis = torch.eye(len(reader.T)).to(reader)
        for group in range(self.heads.groups):
            count = chosen[self.name("v", group)]
            readers = [reader[:, self.columns(head)] for head in self.members(group)]
            values = matrices[self.into["v"].path][self.rows("v", group)]
            forward, inverse = _equalize_columns(*block.orders[self.name("v", group)], readers)
            forward, inverse = _balance(forward, inverse, [values], readers, torch.arange(count))
            self._change_basis(matrices, biases, "v", group, forward)
            kept["v"].append(self.rows("v", group)[:count])
            for head in self.members(group):
                at = self.columns(head)
                reader[:, at] = reader[:, at] @ inverse
                basis[at[:, None], at] = forward
                columns.append(at[:count])
            self._prune_queries(block, matrices, biases, group, chosen[self.name("q", group)], kept)
        self._install_rows(block, matrices, biases, kept)
        self._install_columns(block, reader, torch.cat(columns), basis)

    def _stays_whole(self, chosen: dict[str, Any], group: int) -> bool:
        units = self.heads.size if self.heads.freedom == "basis" else len(self.units)
        return chosen[self.name("v", group)] == self.heads.size and chosen[self.name("q", group)] in (None, units)

    def _change_basis(self, matrices: dict, biases: dict, which: str, head: int, basis: Tensor) -> None:
        """Express the rows of one head in another basis, in place."""
        path, at = self.into[which].path, self.rows(which, head)
        matrices[path][at] = basis @ matrices[path][at]
        bias = biases[path]
        if bias is not None:
            bias[at] = basis @ bias[at]

    def _prune_queries(
        self, block: Block, matrices: dict, biases: dict, group: int, count: int | None, kept: dict[str, list[Tensor]]
    ) -> None:
        """Change the basis of queries and keys of a group, and add the rows that stay to ``kept``."""
        inside, members = torch.arange(self.heads.size), self.members(group)
        if count is not None:
            known = block.orders[self.name("q", group)]
            if known.dim() == 1:
                inside = torch.tensor(sorted(i for unit in known[:count].long() for i in self.units[unit]))
            else:
                inside = torch.arange(count)
                queries = [matrices[self.into["q"].path][self.rows("q", head)] for head in members]
                keys = matrices[self.into["k"].path][self.rows("k", group)]
                forward, inverse = _balance(*known, queries, [keys.T], inside)
                for head in members:
                    self._change_basis(matrices, biases, "q", head, forward)
                self._change_basis(matrices, biases, "k", group, inverse.T)
        kept["q"] += [self.rows("q", head)[inside] for head in members]
        kept["k"].append(self.rows("k", group)[inside])

    def _install_rows(self, block: Block, matrices: dict, biases: dict, kept: dict[str, list[Tensor]]) -> None:
        """Install the rows that stay, scattered to where the attention expects them."""
        for site in self.distinct:
            rows = torch.cat([part for which in "qkv" if self.into[which] is site for part in kept[which]])
            matrix, bias = matrices[site.path], biases[site.path]
            if len(rows) == len(matrix):
                block.set_dense(site.path, matrix, bias)
                continue
            if bias is not None:
                bias = torch.zeros_like(bias).index_copy(0, rows, bias[rows])
            base = Dense(out_features=len(rows), in_features=matrix.shape[1])
            structure = Scattered(base=base, out_features=len(matrix), in_features=matrix.shape[1], map_columns=False)
            block.install(site.path, structure, {"matrix": matrix[rows], "rows": rows.int()}, bias)

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
        structure = Scattered(
            base=Dense(out_features=out, in_features=len(at)), out_features=out, in_features=inner, map_rows=False
        )
        return block.install(path, structure, {"matrix": near, "columns": at.int()}, bias)


def _equalize_columns(forward: Tensor, inverse: Tensor, readers: list[Tensor]) -> BasisPair:
    """Scale a basis so that the columns of its readers are equally long: quantisers give several columns one scale."""
    lengths = torch.stack([(reader @ inverse).square().sum(0) for reader in readers]).sum(0).sqrt()
    scale = (lengths / lengths.mean().clamp_min(1e-30)).clamp_min(1e-6)
    return scale[:, None] * forward, inverse / scale


def _balance(forward: Tensor, inverse: Tensor, written: list[Tensor], readers: list[Tensor], kept: Tensor) -> BasisPair:
    """Scale a basis as a whole so that the rows ``kept`` have the norm of the columns that read them.

    This changes no output, but the steps of an optimizer are then equally large in both.
    """
    rows = torch.stack([forward[kept] @ some for some in written]).square().mean(0).sum().sqrt()
    columns = torch.stack([some @ inverse[:, kept] for some in readers]).square().mean(0).sum().sqrt()
    scale = (columns / rows).sqrt() if rows > 0 and columns > 0 else torch.ones_like(rows)
    return scale * forward, inverse / scale


def _end_with_zero(losses: np.ndarray) -> np.ndarray:
    """Return ``losses`` with zero where everything stays."""
    return np.append(losses[:-1], 0.0)
