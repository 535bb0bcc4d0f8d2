"""How much every output of a site matters: the second moment of the gradients of the loss at it."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tenfold.compress.calibration import Batch
from tenfold.models.sites import Site


def sensitivities(
    model: nn.Module, sites: list[Site], batches: list[Batch], seed: int = 0, progress=iter
) -> dict[str, Tensor]:
    """``{path: G (out, out)}``, the mean over tokens of ``g g^T`` with ``g`` the gradient at the site's output.

    For a language model the loss is the cross entropy of tokens that the model itself draws, so that ``G`` is a block of
    the Fisher information: an error ``E`` of the site costs about ``1/2 tr(G E C E^T)`` nats a token, ``C`` the second
    moment of its inputs. A model without logits is probed with random directions of its last hidden states.

    Reference: Martens and Grosse 2015 (K-FAC), arXiv 1503.05671.
    """
    device = next(model.parameters()).device
    found = {site.path: torch.zeros(site.shape[0], site.shape[0], dtype=torch.float64) for site in sites}
    generator, tokens = torch.Generator().manual_seed(seed), 0
    with _gradients_only(model), _watching(model, found):
        for batch in progress(batches):
            kept = batch["attention_mask"].bool()
            tokens += int(kept.sum())
            _loss(model, {k: v.to(device) for k, v in batch.items()}, kept, generator).backward()
    return {path: value / max(1, tokens) for path, value in found.items()}


def _loss(model: nn.Module, batch: Batch, kept: Tensor, generator: torch.Generator) -> Tensor:
    out = model(**batch)
    logits = getattr(out, "logits", None)
    if logits is None:
        states = out.last_hidden_state[kept]
        return (states * torch.randn(states.shape, generator=generator).to(states)).sum()
    logits = logits[kept].float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


@contextmanager
def _gradients_only(model: nn.Module):
    """Gradients flow from the embedding on, but no parameter collects one."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


@contextmanager
def _watching(model: nn.Module, found: dict[str, Tensor]):
    def watch(path: str):
        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2).float()
            found[path] += (flat.T @ flat).double().cpu()

        def hook(module, arguments, out) -> None:
            out.register_hook(add)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path)) for path in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
