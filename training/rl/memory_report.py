"""What a run holds in memory: OUT/memory.json, written when the first step is done and everything is there.

Parameters are counted where they are, not where they should be: all that live in this process, and each place in memory
once, whoever refers to it. What is not the learner's is the reward's; a second copy of the base would be seen.
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
    """Of the tensors' elements, those of one place in memory once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def held_bytes(learner: Learner) -> dict[str, int]:
    """By what they are for; gradients and states of the optimiser are float32, as what learns is."""
    gc.collect()
    parts = {name: num_bytes(tensors) for name, tensors in learner.parameters.items()}
    everything = num_bytes(one for one in gc.get_objects() if issubclass(type(one), torch.nn.Parameter))
    parts["reward"] = everything - sum(parts.values())
    return parts | {
        "gradients": num_bytes(learner.learning),  # while a step is computed
        "optimiser": num_bytes(learner.optimiser_state),
    }


def write_memory(learner: Learner, out: Path) -> None:
    """OUT/memory.json, in bytes; the engine's processes are those below this one."""
    found = {
        "held": held_bytes(learner),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engine_rss": sum(map(_rss, psutil.Process().children(recursive=True))),
    }
    (out / "memory.json").write_text(json.dumps(found, indent=1) + "\n")


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0
