"""A trunk that is in memory already, read by a reward adapter too: its weights are there once, whoever reads them.

While a policy learns as an adapter, its base is frozen, and a reward adapter over the same base can be read from those
very weights. What the two have in common are the tensors. Modules, which carry adapters and the way attention is
computed, each has its own: neither can switch anything on or off for the other, and they may run at the same time. One
model whose adapters take turns would need a lock round every pass, and wherever it was forgotten wrong rewards.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification


def alias(module: Any) -> Any:
    """The module anew, over the same parameters and buffers in memory; through it they do not learn."""
    same: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in module.buffers()}
    for parameter in module.parameters():
        same[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, same)


def read_lowest(config: Any, num_layers: int) -> None:
    """Makes it the configuration of a model with so many of its layers, from below."""
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


@dataclass(frozen=True, slots=True)
class SharedTrunk:
    """The trunk of the model of that directory or hub id; its weights must not change while it is read."""

    directory: str
    trunk: Any

    def is_of(self, directory: str) -> bool:
        """Whether it is the trunk of that model."""
        return Path(directory).resolve() == Path(self.directory).resolve()

    def classifier(self, num_layers: int | None) -> Any:
        """A sequence classifier with one label that reads it, or its lowest layers; the head is left to be loaded."""
        trunk = alias(self.trunk)
        config = trunk.config
        config.num_labels = 1
        if num_layers is not None:
            read_lowest(config, num_layers)
            layers = next(part for part in trunk.children() if isinstance(part, torch.nn.ModuleList))
            del layers[num_layers:]
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
        setattr(classifier, classifier.base_model_prefix, trunk)
        classifier.config = config
        classifier.score.to_empty(device=next(trunk.parameters()).device)
        return classifier
