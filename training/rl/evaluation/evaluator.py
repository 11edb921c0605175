"""Evaluates the policy on held-out prompts during training.

At step 0, every `evaluate_every` steps and at the end, the policy answers each held-out prompt once, always with the
same seeds and at the temperature of the run. The scorer and the judge score the answers, and the learner computes the
log-probabilities of policy and reference. The results are written to OUT (`training.rl.evaluation.log`).
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from reranker.candidate import Prompt
from training.errors import TrainingError
from training.policy.tokens import TokenisedRow
from training.rl.backend import Backend
from training.rl.config import RLTraining
from training.rl.evaluation.log import EvaluationLog
from training.rl.evaluation.metrics import Evaluation, EvaluationSample, repetition
from training.rl.learner import Learner
from training.rl.prompts import prompts_of_step, seeds_of_step
from training.rl.rewards import ScoreScale
from training.rl.rollout import RolloutWorker
from training.rl.trajectories import Completion

MOST_PROMPTS = 64
"""With these, an evaluation samples as many completions as a step with the default batch."""
ORDER_SEED = 0
"""Fixed, so that runs with different seeds are evaluated on the same prompts and can be compared."""


class Evaluator:
    """Evaluates the policy whenever an evaluation is due; without held-out prompts it does nothing."""

    def __init__(
        self,
        backend: Backend,
        learner: Learner,
        held_out: Sequence[TokenisedRow],
        settings: RLTraining,
        out: Path,
        *,
        after_step: int,
    ) -> None:
        """A resumed run continues after `after_step`.

        Raises:
            TrainingError: the judge cannot score a single completion.
        """
        if backend.judge and backend.judge.needs.all_candidates:
            raise TrainingError(
                f"{backend.judge.name} compares candidates, but an evaluation samples one per prompt; choose another"
            )
        self._learner = learner
        self._settings = settings
        self._prompts = prompts_of_step([*held_out], 0, min(len(held_out), MOST_PROMPTS), ORDER_SEED)
        self._seeds = seeds_of_step("evaluation", len(self._prompts), settings.seed)
        self._worker = RolloutWorker(
            backend.generator,
            backend.scorer,
            samples=1,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            truncation_penalty=0.0,
            judge=backend.judge,
        )
        judge = backend.judge.name if backend.judge else None
        self._log = EvaluationLog(out, backend.scorer.name, judge, after_step=after_step) if held_out else None

    async def __call__(self, step: int, version: str, warn: Callable[[str], None]) -> None:
        """Evaluates the weights of that version if an evaluation is due after `step` steps; calls `warn` with warnings.

        Raises:
            TrainingError: no completion has a reward.
        """
        is_due = step % self._settings.evaluate_every == 0 or step == self._settings.steps
        if not (self._log and is_due):
            return
        batch = await self._worker.sample(self._prompts, self._seeds, version, ScoreScale())
        if batch.lost:
            warn(f"{batch.lost} of {len(self._prompts)} held-out completions have no reward: {batch.reason}")
        if batch.judge_failure:
            warn(f"the judge gave some held-out completions no reward: {batch.judge_failure}")
        samples = await asyncio.to_thread(self._samples, batch.completions)
        for alarm in self._log.add(Evaluation(step, tuple(samples))):
            warn(f"{alarm.message}; read {self._log.samples_path(step)}")

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _samples(self, completions: Sequence[Completion]) -> list[EvaluationSample]:
        measures = self._learner.measure(completions)
        reference_N, policy_N = (
            (logprobs_N_T * measures.mask_N_T).sum(-1).tolist()
            for logprobs_N_T in (measures.ref_logprobs_N_T, measures.logprobs_N_T)
        )
        return [
            EvaluationSample(
                prompt_index=completion.group,
                prompt=_plain(self._prompts[completion.group].row.prompt),
                completion=completion.text,
                reward=completion.reward,
                judge=completion.judged if math.isfinite(completion.judged) else None,
                kl=policy - reference,
                length=len(completion.token_ids),
                cut=completion.is_cut,
                repetition=repetition(completion.token_ids),
                reference_nats=reference,
            )
            for completion, policy, reference in zip(completions, policy_N, reference_N, strict=True)
        ]


def _plain(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt.text if prompt.text is not None else [asdict(message) for message in prompt.messages]
