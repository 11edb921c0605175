"""The stages of the pipeline, each an `nbest` command, and the function that runs those without a result."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.rlhf_pipeline.size import Size
from training.errors import TrainingError
from training.policy.subcommands import Command

FILM_REWARD = "--reward-model film=OUT/reward/adapter"
SAMPLING = "--max-tokens {size.max_tokens} --temperature 1 --seed {seed} --dtype {dtype} --reward-dtype {dtype}"
LEARNING = "--merge --resume --holdout 0 --seed {seed} --dtype {dtype}"
FROM_SAMPLES = f"--model OUT/sft/model --epochs 4 --batch-size 8 {LEARNING}"
FROM_REWARD = f"""--prompts OUT/data/prompts.jsonl --model OUT/sft/model {FILM_REWARD} --max-tokens {{size.max_tokens}}
    --batch-size {{size.completions}} --samples-per-prompt 4 --kl-coef 0.1 {LEARNING}"""

TRAINING = (
    (
        "sft",
        "SmolLM2 is fine-tuned on well-rated sentences; the result is the start of all methods",
        "OUT/sft/model",
        f"train sft --data OUT/data/demonstrations.jsonl --out OUT/sft --epochs 1 --batch-size 16 {LEARNING}",
    ),
    (
        "reward",
        "the lower 18 layers of the start learn to predict which of two texts people rated higher (Bradley-Terry)",
        "OUT/reward/adapter",
        """train reward --data OUT/data/preferences.jsonl --out OUT/reward --model OUT/sft/model --style document
        --layers 18 --lora-layers 6 --batch-size 16 --learning-rate 5e-4 --resume --holdout 0 --seed {seed}
        --dtype {dtype}""",
    ),
    (
        "reward-test",
        "the reward model's agreement with people on held-out pairs of texts",
        "OUT/reward/evaluation/evaluation.png",
        """evaluate reward --data OUT/data/test-preferences.jsonl --reward-model OUT/reward/adapter
        --out OUT/reward/evaluation""",
    ),
    (
        "pool",
        "best-of-n of the start: one pool of candidates for each held-out prompt estimates it for every n",
        "OUT/pool/summary.json",
        f"""batch OUT/data/held-out-prompts.jsonl --out OUT/pool --model OUT/sft/model {FILM_REWARD}
        --best-of {{size.pool}} {SAMPLING}""",
    ),
    (
        "candidates",
        "the start samples continuations of the training prompts, and the reward model ranks them",
        "OUT/candidates/summary.json",
        f"""batch OUT/data/prompts.jsonl --out OUT/candidates --model OUT/sft/model {FILM_REWARD}
        --best-of {{size.candidates}} {SAMPLING}""",
    ),
    (
        "winners",
        "the best candidate of each prompt, for rejection sampling",
        "OUT/winners.jsonl",
        "export OUT/candidates --format sft --out OUT/winners.jsonl",
    ),
    (
        "pairs",
        "the best and the worst candidate of each prompt, for DPO",
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
        "REINFORCE: in every step the policy samples, the samples are scored, and the policy is updated",
        "OUT/reinforce/model",
        f"train reinforce --out OUT/reinforce --steps {{size.reinforce_steps}} --learning-rate 1e-3 {FROM_REWARD}",
    ),
    (
        "ppo",
        "PPO: the same with a value baseline and clipped probability ratios",
        "OUT/ppo/model",
        f"""train ppo --out OUT/ppo --steps {{size.ppo_steps}} --epochs 2 --minibatches 2 --learning-rate 3e-4
        {FROM_REWARD}""",
    ),
)
"""(name, description, the result that exists once the stage is done, the command without `nbest`).

OUT is replaced by the run's directory, and the fields in braces by the run's size, seed and dtype.
"""

POLICIES = ("rejection", "dpo", "reinforce", "ppo")
"""The trained policies, which are compared with the start at best_of=1."""

MEASURING = tuple(
    (
        f"{policy}-samples",
        "the policy's samples for the held-out prompts",
        f"OUT/{policy}/samples/summary.json",
        f"""batch OUT/data/held-out-prompts.jsonl --out OUT/{policy}/samples --model OUT/{policy}/model {FILM_REWARD}
        --best-of {{size.samples}} {SAMPLING}""",
    )
    for policy in POLICIES
)


@dataclass(frozen=True, slots=True)
class Stage:
    """An `nbest` command, and the file or directory that exists once it is done."""

    name: str
    description: str
    result: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(("nbest", *self.arguments))


def stages(out: Path, size: Size, *, dtype: str, seed: int) -> list[Stage]:
    def filled(word: str) -> str:
        return word.format(size=size, dtype=dtype, seed=seed).replace("OUT", str(out))

    return [
        Stage(name, description, Path(filled(result)), tuple(map(filled, command.split())))
        for name, description, result, command in (*TRAINING, *MEASURING)
    ]


def run_missing(stages: Sequence[Stage], run: Command, report: Callable[[str], None]) -> None:
    """Runs the stages whose results do not exist, in order; `report` is called with lines of progress.

    Raises:
        TrainingError: a stage failed or was stopped; the message names the stage.
    """
    for number, stage in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {stage.name}"
        if stage.result.exists():
            report(f"{label}: skipped, its result exists")
            continue
        report(f"{label}: {stage.description}\n$ {stage.command}")
        start_s = time.monotonic()
        try:
            run(stage.arguments)
        except TrainingError as error:
            raise TrainingError(f"stage {number} of {len(stages)}, {stage.name}: {error}") from error
        report(f"{label}: done in {time.monotonic() - start_s:.0f} s")
