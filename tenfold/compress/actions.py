"""What can be done to the matrices of a block: each action prices what a site, or several together, could become, and
carries the choice out.

Add an action by writing a class with ``curves`` and ``apply`` and a line in :func:`actions_for`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.compress.allocate import Curve
from tenfold.compress.block import Block, Target, centred
from tenfold.compress.narrow import Basis, best_basis, best_units, choose_units
from tenfold.models.heads import Heads, heads_of
from tenfold.models.recipe import Rule
from tenfold.models.sites import Site, weight_of
from tenfold.structure import Dense, Placed, Structure


class Action(Protocol):
    """One item, or several, of a block."""

    sites: list[Site]

    def curves(self, block: Block) -> list[Curve]:
        """What its items could become, judged by the original model."""
        ...

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        """Carry out the options that were chosen, by the names of the curves."""
        ...


@dataclass
class Fold:
    """One site in a structure, at any size that the rule leaves open."""

    site: Site
    rule: Rule

    @property
    def sites(self) -> list[Site]:
        return [self.site]

    def curves(self, block: Block) -> list[Curve]:
        target, (out, inner) = block.target(self.site.path), self.site.shape
        assert self.rule.structure is not None
        family = Structure.family(self.rule.structure["kind"])
        if not family.is_open(self.rule.structure):
            fixed = Structure.for_shape(out, inner, self.rule.structure)
            return [Curve(self.site.path, np.array([fixed.numel]), np.array([0.0]), [fixed])]
        sizes = family.sizes(target.weight, self.rule.structure, target.inputs, target.outputs)
        costs = [structure.numel for structure, _ in sizes] + [out * inner]
        losses = [loss / 2 for _, loss in sizes] + [0.0]
        return [Curve(self.site.path, np.array(costs), np.array(losses), [s for s, _ in sizes] + [None])]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        path, structure = self.site.path, chosen[self.site.path]
        target = block.target(path)
        if structure is None:
            return block.put(path, target.weight, block.new_bias(path, target.weight))
        factors = structure.fit(target.weight, target.inputs, target.outputs, **self.rule.start.options)
        bias = block.new_bias(path, structure.dense(factors)) if self.rule.bias == "keep" else None
        return block.fold(path, structure, factors, bias)


@dataclass
class NarrowMlp:
    """The hidden units of one MLP."""

    sites: list[Site]

    def __post_init__(self):
        self.into = [site for site in self.sites if site.role != "mlp.out"]
        (self.out,) = [site for site in self.sites if site.role == "mlp.out"]
        self.name = self.out.path

    @property
    def unit(self) -> int:
        """Parameters of one hidden unit."""
        return sum(site.shape[1] + site.bias for site in self.into) + self.out.shape[0]

    def curves(self, block: Block) -> list[Curve]:
        target, units = block.target(self.name), self.out.shape[1]
        _, losses = choose_units(target.weight, target.outputs, target.inputs)
        least = max(1, units // 32)
        options = range(least, units + 1)
        losses[-1] = 0.0
        return [Curve(self.name, self.unit * np.arange(least, units + 1), losses[least:], options)]

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        for site in self.into:
            weight = block.target(site.path).weight
            block.put(site.path, weight, block.new_bias(site.path, weight))
        target, count = block.target(self.name), chosen[self.name]
        if count < self.out.shape[1]:
            self._cut(block, target, count)
        else:
            block.put(self.name, target.weight, block.new_bias(self.name, target.weight))

    def _cut(self, block: Block, target: Target, count: int) -> None:
        order, _ = choose_units(target.weight, target.outputs, target.inputs)
        kept = torch.tensor(sorted(order[:count]))
        near, bias = _restricted(block, self.name, kept, block.weight(self.name))
        for site in self.into:
            _shorten(block, site, kept)
        _keep_columns(block, self.out, near, bias)


def _restricted(block: Block, path: str, kept: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best matrix ``(out, kept)`` that reads the inputs ``kept`` only, and its bias; damped towards ``before``."""
    moments = block.moments(path)
    second, cross = centred(moments, block.centres(path))
    damping = block.damping(second) / 10
    goal = block.weight(path) @ cross[:, kept] + (before @ damping)[:, kept]
    near = torch.linalg.solve((second + damping)[kept][:, kept], goal.T).T
    whole = torch.zeros_like(before).index_copy(1, kept, near)
    return near, block.new_bias(path, whole)


def _shorten(block: Block, site: Site, kept: Tensor) -> None:
    """A matrix that makes the units ``kept`` only."""
    module = block.model.get_submodule(site.path)
    matrix = weight_of(module).detach().double()[kept]
    bias = None if module.bias is None else module.bias.detach().double()[kept]
    block.fold(site.path, Dense(out_features=len(kept), in_features=site.shape[1]), {"matrix": matrix}, bias)


def _keep_columns(block: Block, site: Site, near: Tensor, bias: Tensor | None) -> None:
    block.fold(site.path, Dense(out_features=site.shape[0], in_features=near.shape[1]), {"matrix": near}, bias)


@dataclass
class NarrowHeads:
    """The dimensions of the heads of one attention."""

    sites: list[Site]
    heads: Heads

    def __post_init__(self):
        by_role = {site.role: site for site in self.sites}
        self.out, self.fused = by_role["attn.out"], "attn.qkv" in by_role
        self.into = {which: by_role["attn.qkv" if self.fused else f"attn.{which}"] for which in "qkv"}
        self.distinct = list({site.path: site for site in self.into.values()}.values())
        self.units = self.heads.units() if self.heads.freedom == "pairs" else [[i] for i in range(self.heads.size)]

    def members(self, group: int) -> range:
        """The query heads that group ``group`` of keys and values serves."""
        return range(group * self.heads.each, (group + 1) * self.heads.each)

    def rows(self, which: str, head: int) -> Tensor:
        return self.heads.rows(which, head, self.fused)

    def columns(self, head: int) -> Tensor:
        """Where the output matrix reads query head ``head``."""
        return head * self.heads.size + torch.arange(self.heads.size)

    def curves(self, block: Block) -> list[Curve]:
        curves = []
        width = self.into["q"].shape[1]
        for group in range(self.heads.groups):
            values = self.value_basis(block, group).losses
            options = np.arange(1, self.heads.size + 1)
            price = width + self.heads.each * self.out.shape[0]
            curves.append(Curve(f"{self.out.path} v{group}", price * options, _whole(values)[1:], options.tolist()))
            if self.heads.freedom != "none":
                order, losses = self.query_order(block, group)
                sizes = np.cumsum([len(self.units[unit]) for unit in order])
                price = (1 + self.heads.each) * width
                options = np.arange(1, len(order) + 1)
                curves.append(Curve(f"{self.out.path} q{group}", price * sizes, _whole(losses)[1:], options.tolist()))
            else:
                fixed = (1 + self.heads.each) * width * self.heads.size
                curves.append(Curve(f"{self.out.path} q{group}", np.array([fixed]), np.array([0.0]), [None]))
        return curves

    def value_basis(self, block: Block, group: int) -> Basis:
        """Of the values of a group, by what the output matrix makes of them."""
        target = block.target(self.out.path)
        outputs, second = 0, 0
        for head in self.members(group):
            at = self.columns(head)
            reads = target.weight[:, at]
            outputs = outputs + reads.T @ target.outputs @ reads
            second = second + target.inputs[at][:, at]
        assert isinstance(outputs, Tensor) and isinstance(second, Tensor)
        return best_basis(outputs, second / self.heads.each)

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

    def query_order(self, block: Block, group: int) -> tuple[list[int], np.ndarray]:
        outputs, second = self.query_moments(block, group)
        if self.heads.freedom == "basis":
            return list(range(self.heads.size)), best_basis(outputs, second).losses
        return best_units(outputs, second, self.units)

    def apply(self, block: Block, chosen: dict[str, Any]) -> None:
        kept: dict[str, list[Tensor]] = {which: [] for which in "qkv"}
        for site in self.distinct:
            weight = block.target(site.path).weight
            block.put(site.path, weight, block.new_bias(site.path, weight))
        matrices = {site.path: block.target(site.path).weight.clone() for site in self.distinct}
        biases = {path: block.new_bias(path, matrix) for path, matrix in matrices.items()}
        reader, columns = block.target(self.out.path).weight.clone(), []
        for group in range(self.heads.groups):
            count = chosen[f"{self.out.path} v{group}"]
            basis = self.value_basis(block, group)
            self._turn(matrices, biases, "v", group, basis.there)
            kept["v"].append(self.rows("v", group)[:count])
            for head in self.members(group):
                at = self.columns(head)
                reader[:, at] = reader[:, at] @ basis.back
                columns.append(at[:count])
            kept_q, kept_k = self._queries(block, matrices, biases, group, chosen[f"{self.out.path} q{group}"])
            kept["q"] += kept_q
            kept["k"].append(kept_k)
        self._place(block, matrices, biases, kept)
        at = torch.cat(columns)
        near, bias = _restricted(block, self.out.path, at, reader)
        self._place_out(block, near, bias, at)

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
        if count is not None and self.heads.freedom == "basis":
            basis = best_basis(*self.query_moments(block, group))
            for head in self.members(group):
                self._turn(matrices, biases, "q", head, basis.there)
            self._turn(matrices, biases, "k", group, basis.back.T)
            inside = inside[:count]
        elif count is not None:
            order, _ = self.query_order(block, group)
            inside = torch.tensor(sorted(i for unit in order[:count] for i in self.units[unit]))
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
            placed = Placed(base=base, out_features=len(matrix), in_features=matrix.shape[1], map_columns=False)
            block.fold(site.path, placed, {"matrix": matrix[rows], "rows": rows.int()}, bias)

    def _place_out(self, block: Block, near: Tensor, bias: Tensor | None, columns: Tensor) -> None:
        out, inner = self.out.shape
        if len(columns) == inner:
            return block.put(self.out.path, torch.zeros(out, inner).to(near).index_copy(1, columns, near), bias)
        base = Dense(out_features=out, in_features=len(columns))
        placed = Placed(base=base, out_features=out, in_features=inner, map_rows=False)
        return block.fold(self.out.path, placed, {"matrix": near, "columns": columns.int()}, bias)


def actions_for(model: PreTrainedModel, rule: Rule, sites: list[Site]) -> list[Action]:
    """What ``rule`` asks for in one block, where it matches ``sites``.

    Raises:
        ValueError: the rule narrows heads that are not known.
    """
    if rule.narrow is None:
        return [Fold(site, rule) for site in sites]
    if rule.narrow == "mlp":
        return [NarrowMlp(sites)]
    inside = [site.path for site in sites if site.role != "attn.out"]
    heads = heads_of(model, model.get_submodule(inside[0].rpartition(".")[0]))
    if heads is None or not any(site.role == "attn.out" for site in sites):
        raise ValueError(
            f"{', '.join(inside)}: the heads of this attention are not known; fold its matrices one by one"
        )
    return [NarrowHeads(sites, heads)]


def _whole(losses: np.ndarray) -> np.ndarray:
    """``losses`` with none where everything stays."""
    return np.append(losses[:-1], 0.0)
