"""The memory of a run: OUT/memory.json, written after the first step, when everything is allocated.

All parameters that exist in this process are counted, each address once, whatever refers to it. Parameters that are not
the learner's count as the reward model's, so a second copy of the base would show there.
"""

import contextlib
import gc
import json
import resource
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from training.rl.learner import Learner


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements; tensors at the same address count once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def held_bytes(learner: Learner) -> dict[str, int]:
    """Bytes by purpose; gradients and optimiser states are float32, as the trained parameters are."""
    gc.collect()
    parts = {name: num_bytes(tensors) for name, tensors in learner.parameters.items()}
    everything = num_bytes(held for held in gc.get_objects() if issubclass(type(held), torch.nn.Parameter))
    parts["reward"] = everything - sum(parts.values())
    return parts | {
        "gradients": num_bytes(learner.trained_parameters),  # while a step is computed
        "optimiser": num_bytes(learner.optimiser_state),
    }


def write_memory(learner: Learner, out: Path) -> None:
    """Writes OUT/memory.json, in bytes; the children of this process are the engine's."""
    memory = {
        "held": held_bytes(learner),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engine_rss": sum(map(_rss, psutil.Process().children(recursive=True))),
    }
    (out / "memory.json").write_text(json.dumps(memory, indent=1) + "\n")


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0
