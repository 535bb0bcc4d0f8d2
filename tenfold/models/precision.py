"""Precision of matrix products: bfloat16 where the device has instructions for it, float32 elsewhere."""

from __future__ import annotations

import platform
from functools import cache

import torch


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Tell whether ``device`` (``cpu``, ``cuda``, ...) has instructions for products in bfloat16.

    Without them they are tens of times slower than those in float32 (EPYC of 2021, AVX2: 1.3 against 50 GFLOP/s).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):  # with AVX-512 alone oneDNN emulates the products
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bfloat16(precision: str, device: str | None = None) -> bool:
    """Tell whether a recipe's ``precision`` means bfloat16 on ``device``, by default the accelerator."""
    accelerator = None if device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(kind))


def check_saved_dtype(dtype: torch.dtype | str) -> None:
    """Raise ValueError for ``auto``: a model that is trained anew has no dtype on disk."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"dtype {dtype} is for models that are read; this one is trained: write float32, bfloat16 or float16"
        )
