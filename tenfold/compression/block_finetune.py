"""Finetuning of one block: a few steps of gradient descent on its output after its sites were fitted one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.compression.activations import Activations
from tenfold.models.config import Calibrate
from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes
from tenfold.structure.linalg import roots


def finetune_block(
    activations: Activations, number: int, original: nn.Module, fisher: Tensor | None, settings: Calibrate
) -> tuple[float, float]:
    """Lower ``1/2 mean_t e_t^T G e_t``, ``e_t = block(z_t) - original(x_t)``, over the parameters of block ``number``.

    Adam with a cosine schedule, a batch of the calibration text per step and process. The block is restored if it is not better
    over the whole text.

    Args:
        fisher: ``G (width, width)`` at the output of the block; the identity unless given.
        settings: of which ``block_finetune_steps``, ``block_finetune_rate`` and ``seed`` are used.

    Returns:
        The error before and after, in nats a token where ``fisher`` is a Fisher information.
    """
    root = None if fisher is None else roots(fisher)[0].float().to(activations.device)
    block, batches = activations.blocks[number], range(len(activations.batches))

    def squared_error(batch: int) -> Tensor:
        x, z = activations.states(batch)
        with torch.no_grad():
            goal = activations.run_block(number, original, x, batch)
        error = (activations.run_block(number, block, z, batch) - goal).flatten(0, -2)[activations.masks[batch]]
        return (error if root is None else error @ root).square().sum() / 2

    @torch.no_grad()
    def mean_error() -> float:
        error = all_reduce_number(sum(float(squared_error(k)) for k in batches))
        return error / max(1, all_reduce_number(activations.num_tokens))

    parameters = [p for p in block.parameters() if p.is_floating_point()]
    flags, saved = [p.requires_grad for p in parameters], [p.detach().clone() for p in parameters]
    before, rate = mean_error(), settings.block_finetune_rate
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.block_finetune_steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for _ in range(settings.block_finetune_steps):
            k = int(torch.randint(len(batches), (1,), generator=generator))
            optimizer.zero_grad()
            (squared_error(k) / int(activations.masks[k].sum())).backward()
            for parameter in parameters if num_processes() > 1 else ():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduce(gradient) / num_processes()
            optimizer.step()
            schedule.step()
    after = mean_error()
    for parameter, old, trained in zip(parameters, saved, flags, strict=True):
        parameter.requires_grad_(trained)
        parameter.grad = None
        if not after < before:
            parameter.data.copy_(old)
    return before, min(before, after)
