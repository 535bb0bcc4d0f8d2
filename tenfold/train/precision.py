"""In which numbers products are computed in training: bfloat16 where the device has instructions for it, float32 elsewhere."""

from __future__ import annotations

import torch

from tenfold.models.precision import multiplies_bfloat16


def in_bfloat16(precision: str, device: str | None = None) -> bool:
    """Whether products are in bfloat16 by a recipe's ``precision``, on ``device``, or the accelerator there is."""
    accelerator = None if device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(kind))


def check_saved_dtype(dtype: torch.dtype | str) -> None:
    """Raise ValueError for ``auto``: what is trained anew has no type of its own."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype {dtype} is for models that are read; this one is trained: write float32, bfloat16 or float16"
        )
