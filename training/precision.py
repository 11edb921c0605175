"""What a model computes in while it is trained; the weights that learn stay in float32."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def computes_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32: on GPUs and on CPUs with instructions for it; elsewhere it is slower."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()


def takes_bfloat16(precision: Precision, device: str) -> bool:
    """Whether a run of that precision computes in bfloat16 on this device."""
    return precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
