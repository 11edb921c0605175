"""The checkpoint of a PPO or REINFORCE run: OUT/checkpoints/checkpoint-STEP.

It holds the trained weights, the value head, the optimiser and its schedule, beta, and the scale of the rewards.
Nothing else has a state: what a step samples depends on the seed and the number of the step (`training.rl.prompts`),
and the version of the weights on the weights. With overlap, however, the next batch was sampled by weights that no
longer exist at the time of the checkpoint, so the batch itself is kept. `trainer_state.json` is written last; a
checkpoint without it is ignored (`training.checkpoints`).
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.rl.kl import KLController
from training.rl.learner import Learner
from training.rl.rewards import ScoreScale
from training.rl.rollout import RolloutBatch
from training.rl.trajectories import Completion

STATE, LAST = "state.pt", "trainer_state.json"


@dataclass(slots=True)
class RunState:
    """The state of a run beside its learner, after `step` steps.

    `scale` is None until it is measured. `ahead` is the batch of the next step, if it has been sampled already.
    """

    kl: KLController
    step: int = 0
    scale: ScoreScale | None = None
    ahead: RolloutBatch | None = None

    def save(self, directory: Path, learner: Learner) -> None:
        """Writes a checkpoint into `directory`, and then removes the older ones."""
        older = list(directory.glob("checkpoint-*"))
        checkpoint = directory / f"checkpoint-{self.step}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        torch.save(learner.state(), checkpoint / STATE)
        saved = {"step": self.step, "beta": self.kl.beta, "scale": _fields(self.scale), "ahead": _fields(self.ahead)}
        (checkpoint / LAST).write_text(json.dumps(saved))
        for path in older:
            if path != checkpoint:
                shutil.rmtree(path)

    def restore(self, checkpoint: Path, learner: Learner) -> None:
        """Restores this state and the learner from a checkpoint."""
        learner.restore(torch.load(checkpoint / STATE, map_location=learner.device, weights_only=True))
        saved = json.loads((checkpoint / LAST).read_text())
        self.step, self.kl.beta = saved["step"], saved["beta"]
        self.scale = None if saved["scale"] is None else ScoreScale(**saved["scale"])
        self.ahead = None if saved["ahead"] is None else _rollout_batch(saved["ahead"])


def _fields(part: ScoreScale | RolloutBatch | None) -> dict[str, Any] | None:
    return None if part is None else asdict(part)


def _rollout_batch(fields: dict[str, Any]) -> RolloutBatch:
    return RolloutBatch(**fields | {"completions": [Completion(**completion) for completion in fields["completions"]]})
