"""Draws completions from the generator that serves and has them scored by the scorer that serves.

Every candidate of a step is on its way at once, so the engine is kept full; a prompt's candidates are scored together
as soon as the last of them has ended. Tokens and their log-probabilities are taken as the engine drew them, for a
text might tokenise to others. Only the scorer reads the text.

A candidate that failed, or that the scorer could not score, is left out and counted. One that other weights drew than
those that were loaded last ends the run.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reranker.candidate import Candidate
from reranker.scorers.base import Scorer, ScoringError
from server.generation.base import Generator, SamplingParams
from training.errors import TrainingError
from training.policy.tokens import TokenisedRow
from training.rl.rewards import ScoreScale
from training.rl.trajectories import Completion


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What was drawn, and how many more candidates have no reward, with the reason of one of them.

    `judge_failure` is why the judge has nothing to say of some that have one. `seconds` it took to draw and score all.
    """

    completions: list[Completion]
    lost: int = 0
    reason: str = ""
    judge_failure: str = ""
    seconds: float = 0.0

    @property
    def rewards(self) -> list[float]:
        return [one.reward for one in self.completions]

    @property
    def num_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.completions)


class RolloutWorker:
    """`samples` completions a prompt, with rewards; what the judge says is only looked at, and may be missing."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        truncation_penalty: float,
        judge: Scorer | None = None,
    ) -> None:
        self._generator = generator
        self._scorer = scorer
        self._judge = judge
        self._samples = samples
        # All of the distribution, as the learner has it: no top_p, no penalties.
        top = max(one.needs.top_logprobs for one in (scorer, judge) if one is not None)
        self._sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, logprobs=top)
        self._truncation_penalty = truncation_penalty

    async def draw(
        self, prompts: Sequence[TokenisedRow], seeds: Sequence[int], version: str | None, scale: ScoreScale
    ) -> Rollouts:
        """Completions in the order of the prompts; candidate i of a prompt has its seed + i.

        Raises:
            TrainingError: no candidate has a reward, or other weights than `version` drew one.
            server.errors.NotReadyError: the engine is not there.
        """
        begun_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._of_prompt(place, prompt, seed, version, scale))
                    for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # one is enough to tell; the others were cancelled
        found = [task.result() for task in tasks]
        whole = Rollouts(
            [one for part in found for one in part.completions],
            sum(one.lost for one in found),
            next((one.reason for one in found if one.reason), ""),
            next((one.judge_failure for one in found if one.judge_failure), ""),
            time.perf_counter() - begun_s,
        )
        if not whole.completions:
            raise TrainingError(f"none of the {whole.lost} completions of a step has a reward: {whole.reason}")
        return whole

    async def _of_prompt(
        self, place: int, prompt: TokenisedRow, seed: int, version: str | None, scale: ScoreScale
    ) -> Rollouts:
        sampling = replace(self._sampling, seed=seed)
        async with self._generator.generate(prompt.row.prompt, sampling, self._samples) as generation:
            outcomes = [one async for finished in generation for one in finished]
        candidates = sorted((one for one in outcomes if isinstance(one, Candidate)), key=lambda one: one.index)
        reason = next((one.reason for one in outcomes if not isinstance(one, Candidate)), "")
        for one in candidates:
            check_version(one, version)
        rewards: tuple[float, ...] = ()
        if candidates:
            try:
                rewards = (await self._scorer.score(prompt.row.prompt, candidates)).rewards_N
            except ScoringError as error:
                return Rollouts([], self._samples, str(error))
        judged, judge_failure = await self._judged(prompt, candidates)
        completions = [
            self._completion(place, prompt, candidate, reward, judgement, scale)
            for candidate, reward, judgement in zip(candidates, rewards, judged, strict=True)
            if math.isfinite(reward)
        ]
        if len(completions) < len(candidates):
            reason = f"{self._scorer.name} gave a reward that is no number"
        return Rollouts(completions, self._samples - len(completions), reason, judge_failure)

    async def _judged(self, prompt: TokenisedRow, candidates: Sequence[Candidate]) -> tuple[Sequence[float], str]:
        """What the judge says of each, and why it has nothing to say where that is NaN."""
        nothing = [math.nan] * len(candidates)
        if self._judge is None or not candidates:
            return nothing, ""
        try:
            judged = (await self._judge.score(prompt.row.prompt, candidates)).rewards_N
        except ScoringError as error:
            return nothing, str(error)
        return judged, "" if all(map(math.isfinite, judged)) else "what it says is no number"

    def _completion(
        self,
        place: int,
        prompt: TokenisedRow,
        candidate: Candidate,
        reward: float,
        judged: float,
        scale: ScoreScale,
    ) -> Completion:
        is_cut = candidate.finish_reason == "length"
        return Completion(
            prompt_ids=prompt.prompt_ids,
            token_ids=candidate.token_ids,
            drawn_logprobs=drawn_logprobs_of(candidate),
            text=candidate.text,
            reward=reward,
            score=scale(reward) - self._truncation_penalty * is_cut,
            group=place,
            is_cut=is_cut,
            judged=judged,
        )


def check_version(candidate: Candidate, version: str | None) -> None:
    """Whether the weights drew it that were loaded last.

    Raises:
        TrainingError: others did.
    """
    if candidate.weights_version != version:
        raise TrainingError(
            f"the engine drew with the weights {candidate.weights_version}, and {version} were loaded last; does "
            "anybody else load weights into it?"
        )


def drawn_logprobs_of(candidate: Candidate) -> tuple[float, ...]:
    """Of each token, as the engine drew it.

    Raises:
        TrainingError: the generator does not tell them.
    """
    if candidate.logprobs is None or len(candidate.logprobs) != len(candidate.token_ids):
        raise TrainingError("the engine tells no log-probability of each token; train with the embedded one")
    return tuple(one.logprob for one in candidate.logprobs)
