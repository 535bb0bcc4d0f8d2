"""Calibration text without a tokenizer, and what a model does with it, seen by plain hooks and told in NumPy."""

import numpy as np
import torch

from tenfold.compress.calibration import Calibration


def text(samples: int = 8, window: int = 16, seed: int = 0, padded: bool = False) -> Calibration:
    """Random tokens in batches of two; ``padded``: the second of every batch ends early."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(samples // 2):
        ids = torch.randint(3, 94, (2, window), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, window - 1 - number % (window // 2) :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return Calibration(batches, {"files": ["random"]})


@torch.no_grad()
def seen(model, text: Calibration, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs ``(tokens, in)`` and outputs ``(tokens, out)`` of a module, first of a tuple, padding left out."""
    caught: list = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, arguments, keywords, out: caught.append(((*arguments, *keywords.values())[0], out)),
        with_kwargs=True,
    )
    for batch in text.batches:
        model(**batch)
    handle.remove()
    kept = torch.cat([batch["attention_mask"].flatten().bool() for batch in text.batches])
    pairs = [(x, out if isinstance(out, torch.Tensor) else out[0]) for x, out in caught]
    first, second = (
        torch.cat([part.reshape(-1, part.shape[-1]) for part in side]) for side in zip(*pairs, strict=True)
    )
    return first[kept].double().numpy(), second[kept].double().numpy()
