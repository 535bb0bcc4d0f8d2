"""Block refinement: a few steps of gradient descent on the output of a block whose sites were fitted one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.compress.activations import Streams
from tenfold.models.distributed import all_reduce, all_reduce_number, num_processes
from tenfold.structure.linalg import roots


def refine(
    streams: Streams,
    number: int,
    block: nn.Module,
    original: nn.Module,
    matters: Tensor | None,
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> tuple[float, float]:
    """Lower ``1/2 mean_t e_t^T G e_t``, ``e_t = block(z_t) - original(x_t)``, over everything in ``block`` that is trained.

    Adam, a batch of the calibration text a step (each of several processes takes one), cosine schedule. The block is left
    as it was if that was better over the whole text.

    Args:
        matters: ``G (width, width)`` of what the block returns; every direction alike without it.
        learning_rate: the first one, as a share of the root mean square of each tensor.

    Returns:
        The error before and after, in nats a token where ``matters`` is a Fisher information.
    """
    root = None if matters is None else roots(matters)[0].float().to(streams.device)
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    wanted, before = [p.requires_grad for p in parameters], [p.detach().clone() for p in parameters]
    begun = _error(streams, number, block, original, root)
    groups = [{"params": [p], "lr": learning_rate * float(p.detach().square().mean().sqrt())} for p in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for _ in range(steps):
            batch = int(torch.randint(len(streams.batches), (1,), generator=generator))
            optimizer.zero_grad()
            (_squares(streams, number, block, original, root, batch) / int(streams.kept[batch].sum())).backward()
            for parameter in parameters if num_processes() > 1 else ():
                here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduce(here) / num_processes()
            optimizer.step()
            schedule.step()
    ended = _error(streams, number, block, original, root)
    for parameter, old, trained in zip(parameters, before, wanted, strict=True):
        parameter.requires_grad_(trained)
        parameter.grad = None
        if not ended < begun:
            parameter.data.copy_(old)
    return begun, min(begun, ended)


def _squares(
    streams: Streams, number: int, block: nn.Module, original: nn.Module, root: Tensor | None, batch: int
) -> Tensor:
    x, z = streams.states(batch)
    with torch.no_grad():
        goal = streams.run(number, original, x, batch)
    error = (streams.run(number, block, z, batch) - goal).flatten(0, -2)[streams.kept[batch]]
    return (error if root is None else error @ root).square().sum() / 2


@torch.no_grad()
def _error(streams: Streams, number: int, block: nn.Module, original: nn.Module, root: Tensor | None) -> float:
    tokens = sum(int(kept.sum()) for kept in streams.kept)
    batches = range(len(streams.batches))
    error = sum(float(_squares(streams, number, block, original, root, k)) for k in batches)
    return all_reduce_number(error) / max(1, all_reduce_number(tokens))
