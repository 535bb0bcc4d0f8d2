"""Calibration text without a tokenizer, and the activations and gradients of a model on it, by plain hooks and in NumPy."""

import copy

import numpy as np
import torch

from tenfold.compression.calibration import Calibration


def text(samples: int = 8, window: int = 16, seed: int = 0, padded: bool = False) -> Calibration:
    """Return random tokens in batches of two; ``padded``: the second sample of every batch ends early."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(samples // 2):
        ids = torch.randint(3, 94, (2, window), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, window - 1 - number % (window // 2) :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return Calibration(batches, {"files": ["random"]})


def seen(model, text: Calibration, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs ``(tokens, in)`` and outputs ``(tokens, out)`` of a module, first of a tuple, without padding."""
    return watched(model, text, [path])[path]


@torch.no_grad()
def watched(model, text: Calibration, paths) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``{path: seen(model, text, path)}`` from one run."""
    kept = torch.cat([batch["attention_mask"].flatten().bool() for batch in text.batches])
    caught: dict[str, list] = {path: [] for path in paths}

    def hook(path: str):
        def catch(module, arguments, keywords, out) -> None:
            pair = ((*arguments, *keywords.values())[0], out if isinstance(out, torch.Tensor) else out[0])
            caught[path].append([side.reshape(-1, side.shape[-1]) for side in pair])

        return model.get_submodule(path).register_forward_hook(catch, with_kwargs=True)

    handles = [hook(path) for path in paths]
    for batch in text.batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    sides = {
        path: (torch.cat(side)[kept].double().numpy() for side in zip(*caught[path], strict=True)) for path in paths
    }
    return {path: tuple(pair) for path, pair in sides.items()}


def gradients(model, words, path: str) -> np.ndarray:
    """Return the gradients ``(tokens, out)`` at the output of the module ``path``, one sequence without padding at a time.

    The labels are the least likely tokens; without logits the loss is the sum of the states along one direction.
    """
    model, found = copy.deepcopy(model).double().requires_grad_(False), []

    def add_nothing(module, arguments, out):
        found.append(torch.zeros_like(out, requires_grad=True))
        return out + found[-1]

    model.get_submodule(path).register_forward_hook(add_nothing)
    for batch in words.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            out = model(input_ids=ids[mask][None])
            if hasattr(out, "logits"):
                chances = out.logits[0].softmax(-1)
                loss = -sum(row[row.argmin()].log() for row in chances)
            else:
                states = out.last_hidden_state[0]
                loss = (states * torch.linspace(-1, 1, states.shape[-1])).sum()
            found[-1] = torch.autograd.grad(loss, found[-1])[0]
    return torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in found]).numpy()


def moment(rows: np.ndarray) -> np.ndarray:
    return sum(np.outer(row, row) for row in rows) / len(rows)
