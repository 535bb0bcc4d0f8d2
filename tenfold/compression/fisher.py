"""Statistics of the original model, block by block: moments of the inputs and Fisher information at the outputs.

The forward pass stores the hidden states in front of every block. The backward pass takes the blocks one at a time, the last
one first, each from those states and the gradient that the block behind it has left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor, nn

from tenfold.compression.activations import Activations, accumulate_inputs, expert_mask, select_rows
from tenfold.compression.block_influence import cosine_distance
from tenfold.compression.calibration import sum_losses
from tenfold.compression.evidence import Evidence
from tenfold.compression.moments import MomentAccumulator, Moments, check_moments, fill_unseen_experts
from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes
from tenfold.models.experts import expert_of
from tenfold.models.sites import shape_of
from tenfold.models.text_mode import is_causal_lm

DRAWN_TOKENS = 128  # that are drawn at once: drawing takes three times the memory of the distributions


@dataclass
class BlockStatistics:
    """Statistics of one block of the original model.

    Args:
        moments: of the inputs, by the number of the input group.
        fisher: ``{path: G}`` of its sites and of itself.
        evidence: ``{path: [(inputs, gradients at the outputs)]}`` of its sites, one pair per batch.
    """

    moments: dict[int, Moments]
    fisher: dict[str, Tensor]
    evidence: Evidence


class FisherPass:
    """Forward and backward pass through the original model.

    ``G (out, out)`` is the mean over tokens of ``g g^T``, ``g`` the gradient of the loss at a site's output. For a language
    model the loss is the cross entropy of tokens that the model itself draws, so that ``G`` is a block of the Fisher
    information: an error ``E`` of the site costs about ``1/2 tr(G E C E^T)`` nats a token, ``C`` the second moment of its
    inputs. A model without logits is probed with random directions of its last hidden states.

    Reference: Martens and Grosse 2015 (K-FAC), arXiv 1503.05671.

    Args:
        clip: see ``clip_norms``.
    """

    def __init__(self, activations: Activations, seed: int = 0, clip: bool = False):
        self.activations, self.seed, self.clip = activations, seed, clip
        for k in range(len(activations.batches)):
            activations.store.put(f"before-0-{k}", activations.states(k)[0])
            activations.store.drop(f"first-{k}")
        self.seek(0)

    def seek(self, number: int) -> None:
        """Go to the front of block ``number``, where this run or an interrupted one has been before."""
        self.activations.keys = [(f"before-{number}-{k}",) * 2 for k in range(len(self.activations.batches))]

    @torch.no_grad()
    def forward(self, number: int, input_groups: list[list[str]]) -> float:
        """Run block ``number``, keep the states in front of it, and return its influence.

        Raises:
            ValueError: it returns NaN or Inf; the first of its sites that reads any is named.
        """
        activations, distance = self.activations, 0.0
        for k, mask in enumerate(activations.masks):
            states = activations.states(k)[0]
            out = activations.run_block(number, activations.blocks[number], states, k)
            if not bool(torch.isfinite(out).all()):
                self._raise_not_finite(number, input_groups, k)
            activations.store.put(f"before-{number + 1}-{k}", out)
            distance += cosine_distance(states.cpu(), out.cpu(), mask)
        self.seek(number + 1)
        return all_reduce_number(distance) / max(1, all_reduce_number(activations.num_tokens))

    def _raise_not_finite(self, number: int, input_groups: list[list[str]], batch: int) -> None:
        hooks = _Hooks(self.activations.model, [group[0] for group in input_groups])
        with hooks.attached(self.activations.masks[batch]):
            states = self.activations.load(f"before-{number}-{batch}")
            self.activations.run_block(number, self.activations.blocks[number], states, batch)
        where = f"{number}, batch {batch} of the calibration text,"
        for path, sums in hooks.sums.items():
            check_moments(sums.second, path, where)
        raise ValueError(f"block {where} returns NaN or Inf; mend its weights, or try --dtype float32 or other text")

    @torch.no_grad()
    def mean_loss(self, samples: int = 8) -> float | None:
        """Return the loss of the model per token of the first ``samples`` of every process, from behind the last block.

        None where it predicts no next token.
        """
        activations, loss, tokens, left = self.activations, 0.0, 0, samples
        if not is_causal_lm(activations.model) or activations.model.get_output_embeddings() is None:
            return None
        for k, batch in enumerate(activations.batches):
            states = activations.states(k)[0]
            for row in range(min(left, len(states))):
                inputs = activations.to_device(batch, row)
                mask = inputs["attention_mask"].bool()
                logits = activations.run_head(states[row : row + 1], inputs).logits
                more, count = sum_losses(logits, inputs["input_ids"], mask[:, 1:] & mask[:, :-1])
                loss, tokens = loss + more, tokens + count
            left -= len(states)
            if left <= 0:
                break
        return all_reduce_number(loss) / max(1.0, all_reduce_number(tokens))

    def start_backward(self) -> None:
        """Store the gradient of the loss at the output of the last block."""
        activations = self.activations
        for k, batch in enumerate(activations.batches):
            states, gradients = activations.states(k)[0], []
            for row in range(len(states)):  # one sequence at a time: the logits of a batch are large
                # seeded by its tokens, so that what is drawn depends neither on the process nor on the rest of the batch
                read = batch["input_ids"][row : row + 1][batch["attention_mask"][row : row + 1].bool()].cpu().numpy()
                generator = torch.Generator().manual_seed(self.seed + crc32(read.tobytes()))
                inputs, leaf = activations.to_device(batch, row), states[row : row + 1].clone().requires_grad_()
                with torch.enable_grad(), activations.autocast():
                    out = activations.run_head(leaf, inputs)
                    ends, by = _loss_gradient(out, inputs["attention_mask"].bool().cpu(), generator)
                    gradients.append(torch.autograd.grad(ends, leaf, by)[0])
            activations.store.put(f"gradient-{len(activations.blocks)}-{k}", torch.cat(gradients))

    def backward(
        self,
        number: int,
        input_groups: list[list[str]],
        fisher_paths: set[str] | None,
        evidence_paths: Collection[str] = (),
    ) -> BlockStatistics:
        """Run backward through block ``number``; ``release`` it afterwards.

        Args:
            input_groups: its sites.
            fisher_paths: the sites whose ``G`` is needed; None: no gradient is computed.
            evidence_paths: those of these whose gradients themselves are needed.
        """
        activations, block, path = self.activations, self.activations.blocks[number], self.activations.paths[number]
        gradients = fisher_paths is not None
        fisher_paths, first = fisher_paths or set(), [group[0] for group in input_groups]
        dtype = torch.bfloat16 if activations.bfloat16 else torch.float32
        evidence: Evidence = {path: [] for path in evidence_paths if gradients}
        hooks = _Hooks(activations.model, first, fisher_paths, evidence, self.clip, dtype)
        for k, mask in enumerate(activations.masks):
            states = activations.load(f"before-{number}-{k}").requires_grad_(gradients)
            with torch.set_grad_enabled(gradients), hooks.attached(mask):
                out = activations.run_block(number, block, states, k)
                if gradients:
                    behind = activations.load(f"gradient-{number + 1}-{k}")
                    rows = select_rows(behind, mask)
                    hooks.fisher[path] = hooks.fisher.get(path, 0) + (rows.T @ rows).cpu().double()
                    activations.store.put(f"gradient-{number}-{k}", torch.autograd.grad(out, states, behind)[0])
        moments = {}
        for k, site in enumerate(first):
            width = shape_of(activations.model.get_submodule(site))[1]
            moments[k] = hooks.sums.get(site, MomentAccumulator(width, True)).reduce(site, number)
        experts = [k for k, site in enumerate(first) if expert_of(site) is not None]
        moments |= dict(zip(experts, fill_unseen_experts([moments[k] for k in experts]), strict=True))
        sizes = {site: shape_of(activations.model.get_submodule(site))[0] for site in sorted(fisher_paths)}
        return BlockStatistics(moments, self._reduce_fisher(hooks.fisher, path, sizes), evidence)

    def release(self, number: int) -> None:
        """Drop what is no longer needed once block ``number`` is done."""
        for k in range(len(self.activations.batches)):
            self.activations.store.drop(f"before-{number}-{k}")
            self.activations.store.drop(f"gradient-{number + 1}-{k}")

    def _reduce_fisher(self, fisher: dict[str, Tensor], block: str, sizes: dict[str, int]) -> dict[str, Tensor]:
        """Return the means over the tokens of all processes; experts that saw no token get the mean of the others."""
        if num_processes() > 1:
            own = {block: len(fisher[block])} if block in fisher else {}  # every process has tokens
            for path, size in (sizes | own).items():
                value = fisher.get(path, torch.zeros(size, size, dtype=torch.float64))
                if all_reduce_number(path in fisher):
                    fisher[path] = all_reduce(value)
        tokens = max(1, int(all_reduce_number(self.activations.num_tokens)))
        means = {path: value / tokens for path, value in fisher.items()}
        for path in (path for path in sizes if path not in fisher):
            part, size = f".{path.rpartition('.')[2]}", sizes[path]
            others = [value for name, value in means.items() if expert_of(name) is not None and name.endswith(part)]
            alike = [value for value in others if len(value) == size]
            if alike:
                means[path] = torch.stack(alike).mean(0)
            elif others:
                mean = sum(float(value.diagonal().mean()) for value in others) / len(others)
                means[path] = mean * torch.eye(size, dtype=torch.float64)
        return means


def _loss_gradient(out, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the output of the model and the gradient of the loss at it: of cross entropy ``softmax - one hot``, in place."""
    logits = getattr(out, "logits", None)
    if logits is None:
        states = out.last_hidden_state
        by = torch.zeros_like(states)
        by[mask] = torch.randn((int(mask.sum()), states.shape[-1]), generator=generator).to(states)
        return states, by
    by = logits.detach().float().softmax(-1)
    if not bool(torch.isfinite(by).all()):
        raise ValueError(
            "the logits of the original model hold NaN or Inf; mend the weights of its head, or try --dtype float32"
        )
    for some in mask.nonzero().split(DRAWN_TOKENS):
        rows = tuple(some.to(by.device).T)
        drawn = torch.multinomial(by[rows].cpu(), 1, generator=generator)[:, 0]
        by[(*rows, drawn.to(by.device))] -= 1.0
    by[~mask] = 0.0
    return logits, by.to(logits.dtype)


def clip_norms(rows: Tensor, least: float = 0.1, most: float = 10.0) -> Tensor:
    """Scale the vectors ``rows (tokens, width)`` so that their norms are ``least`` to ``most`` times the mean norm.

    Vectors of zeros stay, and do not count for the mean.

    Reference: KFAC-SVD (Thoma et al., ICML 2026), its published code.
    """
    norms = rows.norm(dim=1, keepdim=True)
    mean = norms.sum() / (norms > 0).sum().clamp_min(1)
    return rows * torch.where(norms > 0, norms.clamp(least * mean, most * mean) / norms, 0.0)


@dataclass
class _Hooks:
    """Accumulate the inputs of the sites ``first`` and the gradients at the outputs of the sites ``fisher_paths``."""

    model: nn.Module
    first: list[str]
    fisher_paths: Collection[str] = ()
    evidence: Evidence = field(default_factory=dict)
    clip: bool = False
    dtype: torch.dtype = torch.float32  # of the evidence
    sums: dict[str, MomentAccumulator] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def attached(self, mask: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self.first:
                module, hook = self.model.get_submodule(path), accumulate_inputs(self.sums, self.model, path, mask)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            for path in self.fisher_paths:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(self._watch_gradient(path, mask)).remove)
            yield

    def _watch_gradient(self, path: str, mask: Tensor) -> Callable:
        def hook(module, arguments, out) -> None:
            here, inputs = expert_mask(self.model, path, mask), arguments[0].detach()
            out.register_hook(lambda gradient: self._add(path, select_rows(inputs, here), select_rows(gradient, here)))

        return hook

    def _add(self, path: str, inputs: Tensor, rows: Tensor) -> None:
        if path in self.evidence:
            self.evidence[path].append((inputs.to(self.dtype), rows.to(self.dtype)))
        rows = clip_norms(rows) if self.clip else rows
        self.fisher[path] = self.fisher.get(path, 0) + (rows.T @ rows).cpu().double()
