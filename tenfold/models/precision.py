"""Precision of matrix products: bfloat16 where the device has instructions for it, float32 elsewhere."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

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


def resolve_dtype(dtype: torch.dtype | str | None, default: Any = "auto") -> Any:
    """Return the torch dtype of this name, or ``default`` for None and ``auto``.

    Raises:
        ValueError: there is no such floating-point dtype.
    """
    if dtype in (None, "auto"):
        return default
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, auto")
    return found


def saved_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a model that is trained anew; raise ValueError for ``auto``, since it has none on disk."""
    if dtype == "auto":
        raise ValueError(
            "dtype auto is for models that are read; this one is trained: write float32, bfloat16 or float16"
        )
    return resolve_dtype(dtype)
