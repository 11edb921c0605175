"""Lets a reward adapter read a trunk that is already in memory, so that the weights are held once.

While a policy is trained as an adapter, its base is frozen, and a reward adapter over the same base can read the same
weights. The two share only the tensors. Each has its own modules, which carry the adapters and the attention
implementation, so neither can change anything for the other, and they may run concurrently. The alternative, one model
that switches between adapters, would need a lock around every forward pass, and a missing lock would give wrong
rewards.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification


def alias(module: Any) -> Any:
    """A copy of the module over the same parameters and buffers in memory; its parameters require no gradient."""
    shared: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in module.buffers()}
    for parameter in module.parameters():
        shared[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, shared)


def decoder_layers(trunk: Any) -> torch.nn.ModuleList:
    """The layers of a decoder, wherever its architecture keeps them."""
    return next(
        part
        for part in trunk.modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == trunk.config.num_hidden_layers
    )


def keep_lowest_layers(config: Any, num_layers: int) -> None:
    """Changes a model's configuration to only its lowest `num_layers` layers."""
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


@dataclass(frozen=True, slots=True)
class SharedTrunk:
    """The trunk of the model in a directory or of a hub id; its weights must not change while others read them."""

    directory: str
    trunk: Any

    def is_of(self, directory: str) -> bool:
        """Whether this is the trunk of the model in that directory or of that hub id."""
        return Path(directory).resolve() == Path(self.directory).resolve()

    def classifier(self, num_layers: int | None) -> Any:
        """A sequence classifier with one label over the trunk or its lowest layers; its head is still to be loaded."""
        trunk = alias(self.trunk)
        config = trunk.config
        config.num_labels = 1
        if num_layers is not None:
            del decoder_layers(trunk)[num_layers:]
            keep_lowest_layers(config, num_layers)
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
        setattr(classifier, classifier.base_model_prefix, trunk)
        classifier.config = config
        classifier.score.to_empty(device=next(trunk.parameters()).device)
        return classifier
