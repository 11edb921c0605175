"""The stages of the road, each one `nbest` command, and what runs those that are not done yet."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.rlhf_pipeline.size import Size
from training.errors import TrainingError
from training.policy.subcommands import Command

FILM_REWARD = "--reward-model film=OUT/reward/adapter"
DRAWN = "--max-tokens {size.max_tokens} --temperature 1 --seed {seed} --dtype {dtype} --reward-dtype {dtype}"
LEARNT = "--merge --resume --holdout 0 --seed {seed} --dtype {dtype}"
FROM_SAMPLES = f"--model OUT/sft/model --epochs 4 --batch-size 8 {LEARNT}"
FROM_REWARD = f"""--prompts OUT/data/prompts.jsonl --model OUT/sft/model {FILM_REWARD} --max-tokens {{size.max_tokens}}
    --batch-size {{size.completions}} --samples-per-prompt 4 --kl-coef 0.1 {LEARNT}"""

TRAINING = (
    (
        "sft",
        "what people rated well is shown to SmolLM2; what comes of it is the start of all that follows",
        "OUT/sft/model",
        f"train sft --data OUT/data/demonstrations.jsonl --out OUT/sft --epochs 1 --batch-size 16 {LEARNT}",
    ),
    (
        "reward",
        "the start, cut to its lower 18 layers, learns which of two texts people rated higher (Bradley and Terry)",
        "OUT/reward/adapter",
        """train reward --data OUT/data/preferences.jsonl --out OUT/reward --model OUT/sft/model --style document
        --layers 18 --lora-layers 6 --batch-size 16 --learning-rate 5e-4 --resume --holdout 0 --seed {seed}
        --dtype {dtype}""",
    ),
    (
        "reward-test",
        "how often it agrees with people about texts that it has not seen",
        "OUT/reward/evaluation/evaluation.png",
        """evaluate reward --data OUT/data/test-preferences.jsonl --reward-model OUT/reward/adapter
        --out OUT/reward/evaluation""",
    ),
    (
        "pool",
        "best-of-n of the start: one pool of candidates for each held-out prompt tells it for every n",
        "OUT/pool/summary.json",
        f"""batch OUT/data/held-out-prompts.jsonl --out OUT/pool --model OUT/sft/model {FILM_REWARD}
        --best-of {{size.pool}} {DRAWN}""",
    ),
    (
        "candidates",
        "the start continues the training prompts, and the reward model ranks what it says",
        "OUT/candidates/summary.json",
        f"""batch OUT/data/prompts.jsonl --out OUT/candidates --model OUT/sft/model {FILM_REWARD}
        --best-of {{size.candidates}} {DRAWN}""",
    ),
    (
        "winners",
        "the best candidate of each prompt, to be imitated",
        "OUT/winners.jsonl",
        "export OUT/candidates --format sft --out OUT/winners.jsonl",
    ),
    (
        "pairs",
        "the best and the worst candidate of each prompt, to be told apart",
        "OUT/pairs.jsonl",
        "export OUT/candidates --format preference --out OUT/pairs.jsonl",
    ),
    (
        "rejection",
        "rejection sampling: the start is fine-tuned on the winners",
        "OUT/rejection/model",
        f"train sft --data OUT/winners.jsonl --out OUT/rejection --learning-rate 5e-4 {FROM_SAMPLES}",
    ),
    (
        "dpo",
        "DPO: the start is fine-tuned on the pairs",
        "OUT/dpo/model",
        f"train dpo --data OUT/pairs.jsonl --out OUT/dpo --beta 0.1 --learning-rate 2e-4 {FROM_SAMPLES}",
    ),
    (
        "reinforce",
        "REINFORCE: the start writes, is rewarded and learns, step by step",
        "OUT/reinforce/model",
        f"train reinforce --out OUT/reinforce --steps {{size.reinforce_steps}} --learning-rate 1e-3 {FROM_REWARD}",
    ),
    (
        "ppo",
        "PPO: the same, with values for a baseline and ratios that are clipped",
        "OUT/ppo/model",
        f"""train ppo --out OUT/ppo --steps {{size.ppo_steps}} --epochs 2 --minibatches 2 --learning-rate 3e-4
        {FROM_REWARD}""",
    ),
)
"""Name, what it does, the result by which it is known to be done, and the command without `nbest`.

OUT is the run's directory; what stands in braces is filled in, too.
"""

POLICIES = ("rejection", "dpo", "reinforce", "ppo")
"""What is measured beside the start, each at best_of=1."""

MEASURING = tuple(
    (
        f"{policy}-samples",
        "what it says to the held-out prompts",
        f"OUT/{policy}/samples/summary.json",
        f"""batch OUT/data/held-out-prompts.jsonl --out OUT/{policy}/samples --model OUT/{policy}/model {FILM_REWARD}
        --best-of {{size.samples}} {DRAWN}""",
    )
    for policy in POLICIES
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A command of `nbest`, and the file or directory that is there when it is done."""

    name: str
    what: str
    result: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As one types it."""
        return shlex.join(("nbest", *self.arguments))


def stages(out: Path, size: Size, *, dtype: str, seed: int) -> list[Stage]:
    def filled(word: str) -> str:
        return word.format(size=size, dtype=dtype, seed=seed).replace("OUT", str(out))

    return [
        Stage(name, what, Path(filled(result)), tuple(map(filled, command.split())))
        for name, what, result, command in (*TRAINING, *MEASURING)
    ]


def run_missing(stages: Sequence[Stage], run: Command, tell: Callable[[str], None]) -> None:
    """Runs in turn the stages whose results are not there.

    Raises:
        TrainingError: one failed or was stopped; the message names it.
    """
    for number, stage in enumerate(stages, start=1):
        here = f"[{number}/{len(stages)}] {stage.name}"
        if stage.result.exists():
            tell(f"{here}: is there already")
            continue
        tell(f"{here}: {stage.what}\n$ {stage.command}")
        begun = time.monotonic()
        try:
            run(stage.arguments)
        except TrainingError as error:
            raise TrainingError(f"stage {number} of {len(stages)}, {stage.name}: {error}") from error
        tell(f"{here}: done in {time.monotonic() - begun:.0f} s")
