"""The modules that LoRA adapters change: the linear layers of a decoder's blocks, whatever their class.

The experts of a mixture are no linear layers in transformers, nor is the router, so both stay as they are. PEFT's own
`all-linear` would adapt them too, in a form that the engine does not serve.
"""

from typing import Any

from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from reranker.models.shared_trunk import decoder_layers


def lora_targets(trunk: Any) -> dict[str, Any]:
    """The arguments of `LoraConfig` that select the linear layers of all blocks."""
    linear = {
        name.rpartition(".")[2]: type(part)
        for name, part in decoder_layers(trunk).named_modules()
        if isinstance(part, Linear | Conv1D)
    }
    return {"target_modules": sorted(linear), "fan_in_fan_out": Conv1D in linear.values()}
