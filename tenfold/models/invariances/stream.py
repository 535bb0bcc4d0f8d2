"""Residual stream of a model: which axes of which parameters lie in it, and which norm feeds which matrices.

One forward pass on a few tokens shows both. Roles say what a matrix reads and writes; the pass shows what else runs at the width
of the stream, and a parameter of that width whose use stays unknown is refused. In a **pre-norm** model only norms read the
stream and only matrices and embeddings add to it, so its basis is free. The pass checks this: the input of every norm must be
the sum of what was written before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.models.sites import FACTORIZED, LINEAR, find_sites, shape_of
from tenfold.nn import TiedEmbedding, TiedHead

HEADS = ("attn.q", "attn.k", "attn.v", "attn.qkv")
READS = (*HEADS, "mlp.in", "mlp.gate", "mlp.in_gate", "head")
WRITES = ("attn.out", "mlp.out")
TOKENS = 5  # of the forward pass


@dataclass(frozen=True)
class Axis:
    """Axis ``dim`` of the parameter ``name`` of ``module``, which runs over the stream.

    Args:
        kind: ``reads`` (columns of a matrix), ``writes`` (rows, biases, embeddings) or ``shift`` (bias of a norm).
    """

    path: str
    module: nn.Module
    name: str
    dim: int
    kind: str


@dataclass(frozen=True)
class Call:
    """Input and output rows of one module call, and the addresses of their storages."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor
    input_address: int
    output_address: int


@dataclass(frozen=True)
class PreNorm:
    """Norm of the stream, ``gain * n(x) + shift``, and the paths of the matrices that read its output.

    Args:
        unit: the weight at which the gain is one: 1, or 0 where the weight is added to 1 (Gemma); None without a weight.
        mean: whether ``n`` subtracts the mean (LayerNorm) or not (RMSNorm).
    """

    path: str
    module: nn.Module
    unit: float | None
    mean: bool
    readers: tuple[str, ...]

    @property
    def gain(self) -> Tensor | None:
        """Return ``g (width,)`` in float64, None where it is one."""
        return None if self.unit is None else self.module.weight.detach().double() + (1 - self.unit)

    @property
    def shift(self) -> Tensor | None:
        """Return ``b (width,)`` in float64, None where there is none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().double()


class Stream:
    """Residual stream of ``model``, traced in one forward pass.

    Raises:
        ValueError: the model is compressed or not in memory, or the use of a parameter is unknown.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.width = model.config.get_text_config().hidden_size
        self.roles = {site.path: site.role for site in find_sites(model)}
        check_dense(model.named_modules())
        self.calls = trace(model)
        self.axes = list(self._axes())

    @torch.no_grad()
    def transform(self, change: Callable[[Tensor, int], Tensor], kinds: tuple[str, ...]) -> None:
        """Replace every parameter ``p`` with an axis ``dim`` of these kinds by ``change(p, dim)``, a tied one once."""
        done = set()
        for axis in self.axes:
            parameter = getattr(axis.module, axis.name)
            if axis.kind in kinds and (id(parameter), axis.dim) not in done:
                done.add((id(parameter), axis.dim))
                parameter.copy_(change(parameter, axis.dim))

    def _axes(self) -> Iterator[Axis]:
        ran = {call.path for call in self.calls}
        known = {id(p) for call in self.calls for p in call.module.parameters(recurse=False)}
        for path, module in self.model.named_modules():
            own = {name: p for name, p in module.named_parameters(recurse=False) if self.width in p.shape}
            if path in ran:
                yield from self._axes_of(path, module, list(own))
                continue
            for name, parameter in own.items():
                if id(parameter) not in known:
                    raise ValueError(
                        f"{path}.{name} {tuple(parameter.shape)} has an axis as wide as the residual stream, but was not used "
                        "when the model ran on text; give the part of the model that has no such parameter"
                    )

    def _axes_of(self, path: str, module: nn.Module, own: list[str]) -> Iterator[Axis]:
        if is_norm(module):
            if "bias" in own and path in {call.path for call in self.norms}:
                yield Axis(path, module, "bias", 0, "shift")
        elif isinstance(module, nn.Embedding):
            if module.weight.shape[1] == self.width:
                yield Axis(path, module, "weight", 1, "writes")
        else:
            # a matrix outside of the blocks has none of these roles and goes by its shape
            role, (rows, columns), transposed = self.roles.get(path), shape_of(module), isinstance(module, Conv1D)
            if role not in WRITES and columns == self.width:
                yield Axis(path, module, "weight", 0 if transposed else 1, "reads")
            if role not in READS and rows == self.width:
                yield Axis(path, module, "weight", 1 if transposed else 0, "writes")
                if module.bias is not None:
                    yield Axis(path, module, "bias", 0, "writes")

    @cached_property
    def norms(self) -> list[Call]:
        """Return the calls of the norms of the stream in the order in which they ran, without norms of heads."""
        heads = {call.output_address for call in self.calls if self.roles.get(call.path) in HEADS}
        return [
            call
            for call in self.calls
            if is_norm(call.module) and call.input.shape[-1] == self.width and call.input_address not in heads
        ]

    def prenorms(self) -> list[PreNorm]:
        """Return the norms of a pre-norm model, each with its readers.

        Raises:
            ValueError: the model is not pre-norm; the message names the place.
        """
        self._check_sums()
        norm_at = {call.output_address: call.path for call in self.norms}
        readers: dict[str, list[str]] = {call.path: [] for call in self.norms}
        for axis in self.axes:
            if axis.kind == "writes" and axis.name == "weight" and not self._writes(axis.path, axis.module):
                raise ValueError(
                    _NOT_FREE.format(
                        f"{axis.path} makes vectors of its width, and no role says that they are added to it"
                    )
                )
            if axis.kind == "reads":
                norms = {norm_at.get(call.input_address) for call in self.calls if call.path == axis.path}
                if len(norms) != 1 or None in norms:
                    raise ValueError(_NOT_FREE.format(f"{axis.path} reads something else than the output of one norm"))
                readers[norms.pop()].append(axis.path)  # type: ignore[index]
        modules = {call.path: call.module for call in self.norms}
        return [
            PreNorm(path, modules[path], *describe_norm(path, modules[path], self.width), tuple(found))
            for path, found in readers.items()
        ]

    def _writes(self, path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) or self.roles.get(path) in (*WRITES, "embed.project")

    def _check_sums(self) -> None:
        """Raise ValueError unless the input of every norm is the stream, a sum of what was written before.

        In a parallel block a norm may run before the last output joins the stream.
        """
        state, pending, norms = None, [], {id(call) for call in self.norms}
        for call in self.calls:
            if id(call) in norms:
                state, pending = call.input, self._still_pending(call, state, pending)
            elif self._writes(call.path, call.module) and call.output.shape[-1] == self.width:
                pending = [*pending, call]
        if state is None or pending:
            raise ValueError(_NOT_FREE.format(f"no norm reads all that {self.model.config.model_type} writes to it"))

    def _still_pending(self, norm: Call, state: Tensor | None, pending: list[Call]) -> list[Call]:
        """Return the calls whose output has not joined the stream when ``norm`` runs."""
        for call in pending:
            if self.roles.get(call.path) in WRITES and torch.equal(norm.input, call.output):
                raise ValueError(
                    _NOT_FREE.format(f"{norm.path} stands between {call.path} and the stream (sandwich norm)")
                )
        for count in range(len(pending), -1, -1):
            for some in combinations(pending, count):
                outputs = [call.output for call in some]
                starts = [[]] if state is None else [[state], []]  # without: the stream of a decoder begins
                if any(start + outputs and _is_sum(norm.input, start + outputs) for start in starts):
                    return [call for call in pending if call not in some]
        raise ValueError(_NOT_FREE.format(f"the input of {norm.path} is no sum of what was written before (post-norm)"))


_NOT_FREE = "only the stream of a pre-norm model can be rotated, but {}; take another model"


def is_norm(module: nn.Module) -> bool:
    """Tell whether ``module`` is a norm, by the name of its class; ``describe_norm`` finds its kind."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


@torch.no_grad()
def describe_norm(path: str, module: nn.Module, width: int) -> tuple[float | None, bool]:
    """Return ``unit`` and ``mean`` of ``PreNorm``, from the output of a copy of the norm on random vectors."""
    twin = copy.deepcopy(module).to(device="cpu", dtype=torch.float64)
    x = 1 + torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = {False: x / x.square().mean(-1, keepdim=True).sqrt(), True: nn.functional.layer_norm(x, (width,))}
    for name, parameter in twin.named_parameters():
        parameter.fill_(0.0)
        if name not in ("weight", "bias"):
            raise ValueError(f"{path} has a parameter {name!r}, but a norm has a weight and a bias; rotate without it")
    unit = None
    if getattr(twin, "weight", None) is not None:
        unit = 0.0 if float(twin(x).abs().max()) > 0 else 1.0
        twin.weight.copy_(torch.linspace(1, 2, width))
        kinds = {mean: plain * (twin.weight + 1 - unit) for mean, plain in kinds.items()}
    for mean, expected in kinds.items():
        if _near(twin(x), expected, 1e-2 * float(expected.norm())):
            return unit, mean
    raise ValueError(
        f"{path} ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm with a gain, so that its gain can't be moved"
    )


def check_dense(modules) -> None:
    """Raise ValueError for a layer that is factorised, or not in memory."""
    for path, module in modules:
        if isinstance(module, (*FACTORIZED, TiedHead, TiedEmbedding)):
            raise ValueError(
                f"{path} is factorised: change the basis before compression, or make it dense first (densify)"
            )
        if any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(f"the weight of {path} is not in memory (meta device or offloaded); load it first")


@torch.no_grad()
def trace(model: PreTrainedModel) -> list[Call]:
    """Return every call of a matrix, an embedding or a norm when ``model`` runs on a few tokens."""
    calls: list[Call] = []
    alive = []  # so that no address is used twice

    def record(path: str) -> Callable:
        def hook(module, arguments, keywords, output):
            given = next(v for v in (*arguments, *keywords.values()) if isinstance(v, Tensor))
            output = output[0] if isinstance(output, tuple) else output
            alive.append((given, output))
            addresses = (v.untyped_storage().data_ptr() for v in (given, output))
            calls.append(Call(path, module, *(v.clone().flatten(0, -2) for v in (given, output)), *addresses))

        return hook

    hooks = [
        module.register_forward_hook(record(path), with_kwargs=True)
        for path, module in model.named_modules()
        if isinstance(module, (*LINEAR, nn.Embedding)) or is_norm(module)
    ]
    try:
        with _evaluation_mode(model):
            model(**_tokens(model))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    plain = [token for token in range(2, config.vocab_size) if token not in special][:TOKENS]
    ids = torch.tensor([plain], device=model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


def _is_sum(total: Tensor, terms: list[Tensor]) -> bool:
    """Tell whether ``total`` is the sum of ``terms`` up to rounding; they may be much larger than it."""
    size = sum(float(term.norm()) for term in terms)
    return total.shape == terms[0].shape and _near(
        total, sum(terms[1:], terms[0]), 16 * torch.finfo(total.dtype).eps * size
    )


def _near(one: Tensor, other: Tensor, distance: float) -> bool:
    return float((one - other).norm()) <= distance
