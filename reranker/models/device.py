"""Where models run, and in what precision."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]


Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(device: Device) -> Literal["cpu", "cuda"]:
    """The device itself; for auto, CUDA where torch sees a device and the CPU elsewhere."""
    import torch  # here, so that naming a device takes no second to import

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def computes_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32: on GPUs and on CPUs with instructions for it; elsewhere it is slower.

    Matrix products of SmolLM2's size on two cores with AVX512-BF16: 206 GFLOP/s in float32 and 898 in bfloat16, which a
    CPU without it emulates.
    """
    import torch

    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def takes_bfloat16(precision: Precision, device: str) -> bool:
    """Whether what is to compute in that precision computes in bfloat16 on this device."""
    return precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
