"""Selects the device and the precision that models run with."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(device: Device) -> Literal["cpu", "cuda"]:
    """Resolves auto: CUDA if torch finds a CUDA device, otherwise the CPU."""
    import torch  # imported here, because it takes a second, and importing this module should not

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def computes_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32: it is on GPUs, and on CPUs with instructions for it.

    Matrix products of SmolLM2's size on two cores with AVX512-BF16: 206 GFLOP/s in float32 and 898 in bfloat16. A CPU
    without such instructions emulates bfloat16, which is slower than float32.
    """
    import torch

    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def takes_bfloat16(precision: Precision, device: str) -> bool:
    """Whether a model of this precision computes in bfloat16 on this device."""
    return precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
