"""Measures the policy on prompts that nothing is learnt from, while it learns.

At step 0, every `evaluate_every` steps and at the end it answers each held-out prompt once, always with the same seeds,
at the temperature of the run. The scorer and the judge say what they think, and the learner computes what policy and
reference thought of each token. What becomes of it is in OUT (`training.rl.evaluation.log`).
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from reranker.candidate import Prompt
from training.errors import TrainingError
from training.policy.tokens import TokenisedRow
from training.rl.backend import Actors
from training.rl.config import RLTraining
from training.rl.evaluation.log import EvaluationLog
from training.rl.evaluation.measures import Evaluation, EvaluationSample, repetition
from training.rl.learner import Learner
from training.rl.prompts import of_step, seeds_of_step
from training.rl.rewards import ScoreScale
from training.rl.rollout import RolloutWorker
from training.rl.trajectories import Completion

MOST_PROMPTS = 64
"""Evaluating then costs as much drawing as one step of the default batch."""
ORDER_SEED = 0
"""Whatever the seed of the run, the same prompts are taken: runs can be compared."""


class Evaluator:
    """Answers the held-out prompts whenever it is due; where there are none, it never is."""

    def __init__(
        self,
        actors: Actors,
        learner: Learner,
        held_out: Sequence[TokenisedRow],
        settings: RLTraining,
        out: Path,
        *,
        after_step: int,
    ) -> None:
        """Goes on after the step that the run goes on after.

        Raises:
            TrainingError: the judge can say nothing of a completion alone.
        """
        if actors.judge and actors.judge.needs.all_candidates:
            raise TrainingError(f"{actors.judge.name} compares candidates and an evaluation draws one; choose another")
        self._learner = learner
        self._settings = settings
        self._prompts = of_step([*held_out], 0, min(len(held_out), MOST_PROMPTS), ORDER_SEED)
        self._seeds = seeds_of_step("evaluation", len(self._prompts), settings.seed)
        self._worker = RolloutWorker(
            actors.generator,
            actors.scorer,
            samples=1,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            truncation_penalty=0.0,
            judge=actors.judge,
        )
        judge = actors.judge.name if actors.judge else None
        self._log = EvaluationLog(out, actors.scorer.name, judge, after_step=after_step) if held_out else None

    async def __call__(self, step: int, version: str, warn: Callable[[str], None]) -> None:
        """Evaluates the weights of that version, if it is due after so many steps; what is odd, `warn` is told.

        Raises:
            TrainingError: not one completion has a reward.
        """
        is_due = step % self._settings.evaluate_every == 0 or step == self._settings.steps
        if not (self._log and is_due):
            return
        rollouts = await self._worker.draw(self._prompts, self._seeds, version, ScoreScale())
        if rollouts.lost:
            warn(f"{rollouts.lost} of {len(self._prompts)} held-out completions have no reward: {rollouts.reason}")
        if rollouts.judge_failure:
            warn(f"the judge has nothing to say of some held-out completions: {rollouts.judge_failure}")
        samples = await asyncio.to_thread(self._samples, rollouts.completions)
        for alarm in self._log.add(Evaluation(step, tuple(samples))):
            warn(f"{alarm.told}; read {self._log.samples_of(step)}")

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _samples(self, completions: Sequence[Completion]) -> list[EvaluationSample]:
        measured = self._learner.measure(completions)
        reference_N, policy_N = (
            (logprobs * measured.mask_N_T).sum(-1).tolist()
            for logprobs in (measured.ref_logprobs_N_T, measured.logprobs_N_T)
        )
        return [
            EvaluationSample(
                place=one.group,
                prompt=_plain(self._prompts[one.group].row.prompt),
                completion=one.text,
                reward=one.reward,
                judge=one.judged if math.isfinite(one.judged) else None,
                kl=policy - reference,
                length=len(one.token_ids),
                cut=one.is_cut,
                repetition=repetition(one.token_ids),
                reference_nats=reference,
            )
            for one, policy, reference in zip(completions, policy_N, reference_N, strict=True)
        ]


def _plain(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt.text if prompt.text is not None else [asdict(message) for message in prompt.messages]
