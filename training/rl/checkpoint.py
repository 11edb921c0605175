"""What a run of PPO or REINFORCE keeps to go on from: OUT/checkpoints/checkpoint-STEP.

Weights, values, the optimiser with its schedule, beta, and the scale of the rewards. Nothing else has a state: what a
step draws depends on the seed and its number (`training.rl.prompts`), and the version of the weights on the weights.
But where a batch is drawn ahead, the weights that drew it are gone by the time of the checkpoint; so it is kept itself.
`trainer_state.json` is written last; without it a checkpoint does not count (`training.checkpoints`).
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
from training.rl.rollout import Rollouts
from training.rl.trajectories import Completion

STATE, LAST = "state.pt", "trainer_state.json"


@dataclass(slots=True)
class RunState:
    """Where a run is, beside its learner: `step` steps are done; `scale` is None until it is measured.

    `ahead` is the batch of the next step, where it has been drawn already.
    """

    kl: KLController
    step: int = 0
    scale: ScoreScale | None = None
    ahead: Rollouts | None = None

    def save(self, directory: Path, learner: Learner) -> None:
        """The newest checkpoint in `directory`, and the only one when it is written."""
        older = list(directory.glob("checkpoint-*"))
        place = directory / f"checkpoint-{self.step}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        torch.save(learner.state(), place / STATE)
        saved = {"step": self.step, "beta": self.kl.beta, "scale": _fields(self.scale), "ahead": _fields(self.ahead)}
        (place / LAST).write_text(json.dumps(saved))
        for one in older:
            if one != place:
                shutil.rmtree(one)

    def restore(self, checkpoint: Path, learner: Learner) -> None:
        """Goes back to a checkpoint, learner included."""
        learner.restore(torch.load(checkpoint / STATE, map_location=learner.device, weights_only=True))
        saved = json.loads((checkpoint / LAST).read_text())
        self.step, self.kl.beta = saved["step"], saved["beta"]
        self.scale = None if saved["scale"] is None else ScoreScale(**saved["scale"])
        self.ahead = None if saved["ahead"] is None else _rollouts(saved["ahead"])


def _fields(part: ScoreScale | Rollouts | None) -> dict[str, Any] | None:
    return None if part is None else asdict(part)


def _rollouts(fields: dict[str, Any]) -> Rollouts:
    return Rollouts(**fields | {"completions": [Completion(**one) for one in fields["completions"]]})
