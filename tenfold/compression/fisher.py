"""Statistics of the original model, block by block: moments of the inputs and Fisher information at the outputs.

The forward pass stores the hidden states in front of every block. The backward pass takes the blocks one at a time, the last
one first, each from those states and the gradient that the block behind it has left.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

from tenfold.compression.activations import Activations, expert_mask, select_rows
from tenfold.compression.calibration import mean_loss
from tenfold.compression.evidence import Evidence
from tenfold.compression.moments import Moments, mean_of_others, reduce_moments
from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes
from tenfold.models.experts import expert_of
from tenfold.models.sites import shape_of

DRAWN_TOKENS = 128  # that are drawn at once: drawing takes three times the memory of the distributions


class FisherPass:
    """Forward and backward pass through the original model.

    ``G (out, out)`` is the mean over tokens of ``g g^T``, ``g`` the gradient of the loss at a site's output. For a language
    model the loss is the cross entropy of tokens that the model itself draws, so that ``G`` is a block of the Fisher
    information: an error ``E`` of the site costs about ``1/2 tr(G E C E^T)`` nats a token, ``C`` the second moment of its
    inputs. A model that predicts no tokens (a base model, a classifier) is probed with random directions of its last hidden
    states.

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
        keys = [f"before-{number}-{k}" for k in range(len(self.activations.batches))]
        self.activations.keys = [(key, key) for key in keys]

    @torch.no_grad()
    def forward(self, number: int, input_groups: list[list[str]]) -> float:
        """Run block ``number``, keep the states in front of it, and return its influence.

        The influence is ``1 - mean over tokens of cos(x, y)``, ``x`` the hidden state in front of the block and ``y`` behind it.

        Reference: Men et al. 2024 (ShortGPT), arXiv 2403.03853.

        Raises:
            ValueError: it returns NaN or Inf; the first of its sites that reads any is named.
        """
        activations, distance = self.activations, 0.0
        block, path = activations.blocks[number], f"{activations.paths[number]}."
        for k, mask in enumerate(activations.masks):
            states = activations.states(k)[0]
            out = activations.run_block(number, block, states, k)
            if not bool(torch.isfinite(out).all()):
                for group in input_groups:
                    activations.sum_moments(number, block, [group[0].removeprefix(path)])
                where = f"{number}, batch {k} of the calibration text,"
                raise ValueError(
                    f"block {where} returns NaN or Inf; mend its weights, or try --dtype float32 or other text"
                )
            activations.store.put(f"before-{number + 1}-{k}", out)
            cosine = torch.cosine_similarity(states.cpu().float(), out.cpu().float(), dim=-1).flatten()
            distance += float((1 - cosine)[mask].double().sum())
        self.seek(number + 1)
        return all_reduce_number(distance) / max(1, all_reduce_number(activations.num_tokens))

    def mean_loss(self) -> float | None:
        """Return the loss of the model per token of the first samples, from behind the last block."""
        activations = self.activations
        return mean_loss(
            activations.model,
            activations.batches,
            lambda k, row, inputs: activations.run_head(activations.states(k)[0][row : row + 1], inputs),
        )

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
                    gradient_of = _probe if activations.model.get_output_embeddings() is None else _loss_gradient
                    by = gradient_of(out.detach(), inputs["attention_mask"].bool().cpu(), generator)
                    gradients.append(torch.autograd.grad(out, leaf, by)[0])
            activations.store.put(f"gradient-{len(activations.blocks)}-{k}", torch.cat(gradients))

    def backward(
        self,
        number: int,
        input_groups: list[list[str]],
        fisher_paths: Collection[str] | None,
        evidence_paths: Collection[str] = (),
    ) -> tuple[dict[int, Moments], dict[str, Tensor], Evidence]:
        """Run backward through block ``number``; ``release`` it afterwards.

        Args:
            input_groups: its sites.
            fisher_paths: the sites whose ``G`` is needed; None: no gradient is computed.
            evidence_paths: those of these whose gradients themselves are needed.

        Returns:
            The moments of the inputs, by the number of the input group; ``{path: G}`` of sites; and
            ``{path: [(inputs, gradients at the outputs)]}`` of sites, one pair per batch.
        """
        activations, gradients = self.activations, fisher_paths is not None
        block, modules = activations.blocks[number], activations.model.get_submodule
        dtype = torch.bfloat16 if activations.bfloat16 else torch.float32
        evidence: Evidence = {site: [] for site in evidence_paths if gradients}
        sums = {group[0]: Moments(shape_of(modules(group[0]))[1], True) for group in input_groups}
        fisher: dict[str, Tensor] = {}

        def add_inputs(module, arguments, site: str, mask: Tensor) -> None:
            rows = select_rows(arguments[0].detach(), expert_mask(activations.model, site, mask))
            sums[site].add(rows, rows)

        def watch_gradient(module, arguments, out: Tensor, site: str, mask: Tensor) -> None:
            here, inputs = expert_mask(activations.model, site, mask), arguments[0].detach()
            out.register_hook(lambda g: add_gradient(site, select_rows(inputs, here), select_rows(g, here)))

        def add_gradient(site: str, inputs: Tensor, rows: Tensor) -> None:
            if site in evidence:
                evidence[site].append((inputs.to(dtype), rows.to(dtype)))
            rows = clip_norms(rows) if self.clip else rows
            fisher[site] = fisher.get(site, 0) + (rows.T @ rows).cpu().double()

        for k, mask in enumerate(activations.masks):
            states = activations.load(f"before-{number}-{k}").requires_grad_(gradients)
            with torch.set_grad_enabled(gradients), ExitStack() as hooks:
                for site in sums:
                    hook = partial(add_inputs, site=site, mask=mask)
                    hooks.callback(modules(site).register_forward_pre_hook(hook).remove)
                for site in fisher_paths or ():
                    hook = partial(watch_gradient, site=site, mask=mask)
                    hooks.callback(modules(site).register_forward_hook(hook).remove)
                out = activations.run_block(number, block, states, k)
                if gradients:
                    behind = activations.load(f"gradient-{number + 1}-{k}")
                    activations.store.put(f"gradient-{number}-{k}", torch.autograd.grad(out, states, behind)[0])
        experts = {site: one for site, one in sums.items() if expert_of(site) is not None}
        moments = {site: one.reduce(site) for site, one in sums.items() if site not in experts}
        moments |= dict(zip(experts, reduce_moments(experts), strict=True))
        sizes = {site: shape_of(modules(site))[0] for site in sorted(fisher_paths or ())}
        by_group = {k: moments[group[0]] for k, group in enumerate(input_groups)}
        return by_group, self._reduce_fisher(fisher, sizes), evidence

    def release(self, number: int) -> None:
        """Drop what is no longer needed once block ``number`` is done."""
        for k in range(len(self.activations.batches)):
            self.activations.store.drop(f"before-{number}-{k}")
            self.activations.store.drop(f"gradient-{number + 1}-{k}")

    def _reduce_fisher(self, fisher: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        """Return the means over the tokens of all processes; experts that saw no token get the mean of the others."""
        if num_processes() > 1:
            for path, size in sizes.items():
                value = fisher.get(path, torch.zeros(size, size, dtype=torch.float64))
                if all_reduce_number(path in fisher):
                    fisher[path] = all_reduce(value)
        tokens = max(1, int(all_reduce_number(self.activations.num_tokens)))
        means = {path: value / tokens for path, value in fisher.items()}
        for path in (path for path in sizes if path not in fisher):
            part = f".{path.rpartition('.')[2]}"
            others = [value for name, value in means.items() if expert_of(name) is not None and name.endswith(part)]
            if others:
                means[path] = mean_of_others(others, sizes[path])
        return means


def _probe(states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return random directions at the tokens in ``mask``."""
    by = torch.zeros_like(states)
    by[mask] = torch.randn((int(mask.sum()), states.shape[-1]), generator=generator).to(states)
    return by


def _loss_gradient(logits: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of the cross entropy of drawn tokens: ``softmax - one hot``, in place."""
    by = logits.float().softmax(-1)
    if not bool(torch.isfinite(by).all()):
        raise ValueError(
            "the logits of the original model hold NaN or Inf; mend the weights of its head, or try --dtype float32"
        )
    for some in mask.nonzero().split(DRAWN_TOKENS):
        rows = tuple(some.to(by.device).T)
        drawn = torch.multinomial(by[rows].cpu(), 1, generator=generator)[:, 0]
        by[(*rows, drawn.to(by.device))] -= 1.0
    by[~mask] = 0.0
    return by.to(logits.dtype)


def clip_norms(rows: Tensor, least: float = 0.1, most: float = 10.0) -> Tensor:
    """Scale the vectors ``rows (tokens, width)`` so that their norms are ``least`` to ``most`` times the mean norm.

    Vectors of zeros stay, and do not count for the mean.

    Reference: KFAC-SVD (Thoma et al., ICML 2026), its published code.
    """
    norms = rows.norm(dim=1, keepdim=True)
    mean = norms.sum() / (norms > 0).sum().clamp_min(1)
    return rows * torch.where(norms > 0, norms.clamp(least * mean, most * mean) / norms, 0.0)
