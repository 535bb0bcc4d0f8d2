"""Width pruning: fewer hidden units, heads and channels, equally many in every layer; nothing compensates for those that go.

| width | what goes together |
|---|---|
| ``mlp`` | a hidden unit of an MLP: a row of its in and gate matrices, a column of its out matrix |
| ``heads`` | a group of heads: a head of keys and values, and the query heads that read it |
| ``hidden`` | a channel of the residual stream, everywhere in the model |

A criterion scores them, the highest stay. The result is an ordinary checkpoint whose configuration has the smaller sizes: a new
model is made from that configuration and receives the rows and columns that stay. To add a criterion, write a transform of the
whole model (``tenfold.compression.compress``) that calls ``prune_widths``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.compression.structured_pruning import ALIGNED
from tenfold.models.attention_layout import Heads, heads_of
from tenfold.models.recipe import Recipe, Shrink
from tenfold.models.sites import FACTORIZED, Site, find_sites, group_by_block, part_of, shape_of

ROWS: dict[str, str] = dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.qkv"), "heads")
ROWS |= dict.fromkeys(("mlp.in", "mlp.gate"), "mlp")
COLUMNS = {"attn.out": "heads", "mlp.out": "mlp"}  # the rows and columns of all other matrices are channels ..
OUTER = ("embed", "head")  # .. or, in these, tokens
KEYS = {  # in configurations
    "mlp": ("intermediate_size", "n_inner", "ffn_dim"),
    "hidden": ("hidden_size", "word_embed_proj_dim"),
}

Sizes = dict[str, int]  # {width: how many}
Scores = dict[tuple[str, str], Tensor]  # {(width, path of a block, "" for channels): (how many,)}


class Axis(NamedTuple):
    """Dimension of a parameter."""

    width: str  # mlp, heads or hidden
    block: str = ""  # path of the block whose units or heads they are, empty for channels
    role: str = ""  # of the matrix


class Widths:
    """Widths of a model, and the dimensions of its parameters that belong to each.

    Args:
        model: dense, with equal blocks of one attention and one MLP each.

    Raises:
        ValueError: the model has another form.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.sites, self.blocks = model, find_sites(model), group_by_block(find_sites(model))
        self._check()
        first = {site.role: site for site in next(iter(self.blocks.values()))}
        self.out = first["attn.out"]
        inside = next(site.path for role, site in first.items() if ROWS.get(role) == "heads")
        heads = heads_of(model, model.get_submodule(inside.rpartition(".")[0]))
        if heads is None or self.out.shape[1] != heads.query * heads.size:
            raise ValueError(f"{self.out.path}: the heads of this attention are not known, so that none can be pruned")
        self.heads: Heads = heads
        self.full: Sizes = {"mlp": first["mlp.out"].shape[1], "heads": heads.groups, "hidden": self.out.shape[0]}
        named = {site.path: site for site in self.sites}
        self.axes = {
            name: self._axes(named.get(name.rpartition(".")[0]), name, parameter)
            for name, parameter in model.named_parameters()
        }

    def _check(self) -> None:
        kind = self.model.config.model_type
        for path, module in self.model.named_modules():
            if isinstance(module, FACTORIZED):
                raise ValueError(
                    f"{path} is compressed, and widths are pruned of dense models; tenfold export --to dense makes one"
                )
        for site in self.sites:
            if site.role not in (*ROWS, *COLUMNS, *OUTER) or site.expert is not None:
                raise ValueError(
                    f"{site.path} ({site.role}) of this {kind} has no place among the widths that are pruned"
                )
        alike = {tuple(sorted((site.role, site.shape) for site in sites)) for sites in self.blocks.values()}
        if len(alike) != 1 or sorted(role for role, _ in alike.pop() if role in COLUMNS) != sorted(COLUMNS):
            raise ValueError(
                f"the blocks of this {kind} are not alike, each of one attention and one MLP, as pruning of widths needs them"
            )

    def _axes(self, site: Site | None, name: str, parameter: nn.Parameter) -> tuple[Axis | None, ...]:
        path, _, part = name.rpartition(".")
        module = self.model.get_submodule(path)
        if site is None or site.role == "embed":  # embeddings, norms, layers of the head of an encoder
            channels = [n == self.full["hidden"] for n in parameter.shape]
            channels[0] &= not isinstance(module, nn.Embedding)
            return tuple(Axis("hidden") if yes else None for yes in channels)
        block = next((path for path, some in self.blocks.items() if site in some), "")
        rows, columns = (
            Axis(widths[site.role], block, site.role) if site.role in widths else Axis("hidden")
            for widths in (ROWS, COLUMNS)
        )
        rows = None if site.role in OUTER else rows
        if part == "bias":
            return (rows,)
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def count(self, parameters: dict[str, nn.Parameter], sizes: Sizes) -> int:
        """Count the elements of some ``{name: parameter}`` of the model at these sizes."""

        def length(n: int, axis: Axis | None) -> int:
            return n if axis is None else n * sizes[axis.width] // self.full[axis.width]

        return sum(prod(map(length, value.shape, self.axes[name])) for name, value in parameters.items())

    def indices(self, axis: Axis, chosen: Tensor) -> Tensor:
        """Return the sorted indices along ``axis`` of the ``chosen`` units, groups of heads or channels."""
        if axis.width != "heads":
            return chosen
        which, each = {"attn.qkv": "qkv", "attn.out": "q"}.get(axis.role, axis.role[-1]), self.heads.each
        rows = [
            self.heads.rows(one, head, axis.role == "attn.qkv")
            for one in which
            for group in chosen.tolist()
            for head in (range(group * each, (group + 1) * each) if one == "q" else [group])
        ]
        return torch.cat(rows).sort().values

    @cached_property
    def coupled(self) -> bool:
        """Whether the heads together are as wide as the channels, as in GPT-2: then heads and channels go together."""
        twice = self.full | {"hidden": 2 * self.full["hidden"]}
        with torch.device("meta"):
            twin = type(self.model)(self.configuration(twice, True))
        return shape_of(twin.get_submodule(self.out.path))[1] != self.out.shape[1]

    @cached_property
    def divided(self) -> bool:
        """Whether the configuration requires the channels to be a multiple of the number of heads, as Llama's does."""
        try:
            self.configuration(self.full | {"hidden": self.heads.query * self.full["hidden"] + 1}, True).validate()
        except StrictDataclassError:
            return self.heads.query > 1
        return False

    def configuration(self, sizes: Sizes, sized: bool) -> PretrainedConfig:
        """Return the configuration of the model at these sizes; ``sized``: with the width of a head."""
        config = copy.deepcopy(self.model.config)
        text = config.get_text_config()
        for width, keys in KEYS.items():
            for key in keys:
                if getattr(text, key, 0) in (None, self.full[width]):
                    setattr(text, key, sizes[width])
        text.num_attention_heads = sizes["heads"] * self.heads.each
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = sizes["heads"]
        if sized:
            text.head_dim = self.heads.size
        return config


def prune_widths(
    model: PreTrainedModel, recipe: Recipe, shrink: Shrink, score: Callable[[Widths, list[str]], Scores]
) -> dict[str, Any]:
    """Prune the widths of ``model``, in place, to the budget of ``recipe``.

    Args:
        shrink: the proportion in which they shrink.
        score: receives the widths and which of them shrink, and returns a score for everything that may go.

    Returns:
        ``widths``: ``{width: [before, after]}``.

    Raises:
        ValueError: there is no budget, it can't be met, or the widths of this model can't be pruned.
    """
    if recipe.budget is None:
        raise ValueError(f"nothing says how much recipe {recipe.name} shall prune; give it a budget, or --keep")
    widths = Widths(model)
    sizes = fit_sizes(widths, shrink, recipe.budget.of.replace("sites", "blocks"), recipe.budget.keep)
    scores = score(widths, [width for width, size in sizes.items() if size < widths.full[width]])
    chosen = {
        key: found.argsort(descending=True, stable=True)[: sizes[key[0]]].sort().values for key, found in scores.items()
    }
    cut_widths(widths, sizes, chosen)
    return {"widths": {width: [before, sizes[width]] for width, before in widths.full.items()}}


def fit_sizes(widths: Widths, shrink: Shrink, of: str, keep: float) -> Sizes:
    """Return sizes with which at most the share ``keep`` of the parameters stays.

    Every width loses the fraction ``t`` times its number in ``shrink``, rounded to steps: of 8 units or channels where there are
    many, of a group of heads. Where the configuration requires it, channels go in steps of the number of heads; where heads and
    channels are coupled, in steps of a group, and heads with them. Units of the MLPs, if they shrink, use the rest of the budget.
    Among all ``t`` whose sizes use up the budget, the one whose fractions are most nearly in proportion is taken.

    Raises:
        ValueError: even the smallest sizes are too large, or heads should go that are coupled to channels which should stay.
    """
    full, numbers, count = widths.full, shrink.model_dump(), partial(widths.count, part_of(widths.model, of))
    coupled = bool(shrink.heads or shrink.hidden) and widths.coupled
    if coupled and not shrink.hidden:
        raise ValueError(
            f"in this {widths.model.config.model_type} the channels are as many as all heads are wide, so that heads go with "
            "them only; give hidden a number under shrink"
        )
    step, allowed, whole = ALIGNED if full["mlp"] >= 32 * ALIGNED else 1, keep * count(full), count(full)

    def fill(t: float) -> Sizes:
        sizes = full | _outer_sizes(widths, shrink, coupled, t)
        if not shrink.mlp:
            return sizes
        none = count(sizes | {"mlp": 0})
        units = (allowed - none) // (count(sizes | {"mlp": 1}) - none)
        return sizes | {"mlp": int(max(step, units if units < full["mlp"] else full["mlp"]) // step * step)}

    def badness(sizes: Sizes) -> tuple[bool, float]:
        unused = allowed - count(sizes)
        loose = not shrink.mlp or unused >= count(sizes | {"mlp": sizes["mlp"] + step}) - count(sizes)
        lost = [(1 - sizes[width] / full[width]) / number for width, number in numbers.items() if number]
        return loose, unused if loose else max(lost) - min(lost)

    tried = [fill(t / max(numbers.values())) for t in np.linspace(0, 1, 1025)]
    tried = [dict(sizes) for sizes in dict.fromkeys(tuple(sizes.items()) for sizes in tried)]
    fitting = [sizes for sizes in tried if count(sizes) <= allowed]
    if not fitting:
        least = min(count(sizes) for sizes in tried) / whole
        raise ValueError(f"keep {keep} of the {of} can't be met by these widths; keep at least {least:.3f}")
    return min(fitting, key=badness)


def _outer_sizes(widths: Widths, shrink: Shrink, coupled: bool, t: float) -> Sizes:
    """Return how many groups of heads and channels stay when these lose the fraction ``t`` times their numbers."""
    full, each = widths.full, widths.heads.each
    heads, hidden = full["heads"] * (1 - t * shrink.heads), full["hidden"] * (1 - t * shrink.hidden)
    if coupled:
        step = full["hidden"] // full["heads"]
        size = _nearest(hidden, step, full["hidden"])
        return {"heads": size // step, "hidden": size}
    divided = bool(shrink.heads or shrink.hidden) and widths.divided
    fixed = divided and not shrink.hidden  # then only some numbers of heads divide the channels
    groups = [k for k in range(1, full["heads"] + 1) if not fixed or full["hidden"] % (k * each) == 0]
    count = min(groups, key=lambda k: abs(k - heads)) if shrink.heads else full["heads"]
    step = count * each if divided else ALIGNED if full["hidden"] >= 32 * ALIGNED else 1
    return {"heads": count, "hidden": _nearest(hidden, step, full["hidden"]) if shrink.hidden else full["hidden"]}


def _nearest(wanted: float, step: int, most: int) -> int:
    """Return the multiple of ``step`` nearest to ``wanted``, at least ``step`` and at most ``most``."""
    return max(step, min(round(wanted / step), most // step) * step)


@torch.no_grad()
def cut_widths(widths: Widths, sizes: Sizes, chosen: dict[tuple[str, str], Tensor]) -> None:
    """Cut the model down to what is ``chosen``, in place.

    Args:
        chosen: ``{(width, path of a block, "" for channels): indices}``; everything else stays whole.

    Raises:
        ValueError: no configuration of this model has these sizes.
    """
    model = widths.model
    kept, before = dict[str, Tensor](), dict(model.named_parameters())
    for name, parameter in before.items():
        for dim, axis in enumerate(widths.axes[name]):
            if axis is not None and (axis.width, axis.block) in chosen:
                indices = widths.indices(axis, chosen[axis.width, axis.block]).to(parameter.device)
                parameter = parameter.index_select(dim, indices)
        kept[name] = parameter
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in tied}
    config = widths.configuration(sizes, sizes != widths.full | {"mlp": sizes["mlp"]} and not widths.coupled)
    with init_empty_weights(include_buffers=False):
        small: Any = type(model)(config)
    try:
        small.load_state_dict(kept | buffers, strict=False, assign=True)
        small.tie_weights()
        if missing := [name for name, parameter in small.named_parameters() if parameter.is_meta]:
            raise RuntimeError(f"{missing[0]} is another one")
    except RuntimeError as reason:
        raise ValueError(
            f"no configuration of this {config.model_type} says mlp {sizes['mlp']}, heads {sizes['heads']} and hidden "
            f"{sizes['hidden']}: {str(reason).splitlines()[-1].strip()}"
        ) from None
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(before[name].requires_grad)
    if model.can_generate():
        small.generation_config = model.generation_config
    vars(model).update(vars(small.to(model.device).train(model.training)))
