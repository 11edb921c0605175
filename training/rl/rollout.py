"""Samples completions from the serving generator and scores them with the serving scorer.

All candidates of a step are requested at once, which keeps the engine's batch full. A prompt's candidates are scored
together as soon as the last of them has ended. Tokens and their log-probabilities are the engine's own, since the text
might tokenise differently; only the scorer reads the text.

A candidate that failed, or that the scorer could not score, is left out and counted. A candidate that was sampled with
other weights than those loaded last ends the run.
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
class RolloutBatch:
    """Scored completions. `lost` counts the candidates without a reward; `reason` is the reason of one of them.

    `judge_failure` says why the judge gave some completions no reward. `seconds` is the time of sampling and scoring.
    """

    completions: list[Completion]
    lost: int = 0
    reason: str = ""
    judge_failure: str = ""
    seconds: float = 0.0

    @property
    def rewards(self) -> list[float]:
        return [completion.reward for completion in self.completions]

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, without their prompts."""
        return sum(len(completion.token_ids) for completion in self.completions)


class RolloutWorker:
    """Samples and scores `samples` completions per prompt; the judge's rewards are only recorded and may be missing."""

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
        # The full distribution, as the learner computes it: no top_p, no penalties.
        top = max(reader.needs.top_logprobs for reader in (scorer, judge) if reader is not None)
        self._sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, logprobs=top)
        self._truncation_penalty = truncation_penalty

    async def sample(
        self, prompts: Sequence[TokenisedRow], seeds: Sequence[int], version: str | None, scale: ScoreScale
    ) -> RolloutBatch:
        """Completions in the order of the prompts; candidate i of a prompt has the prompt's seed + i.

        Raises:
            TrainingError: no candidate has a reward, or a candidate was sampled with other weights than `version`.
            server.errors.NotReadyError: the engine is not ready.
        """
        started_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._of_prompt(index, prompt, seed, version, scale))
                    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first error is enough; the other tasks were cancelled
        parts = [task.result() for task in tasks]
        batch = RolloutBatch(
            [completion for part in parts for completion in part.completions],
            sum(part.lost for part in parts),
            next((part.reason for part in parts if part.reason), ""),
            next((part.judge_failure for part in parts if part.judge_failure), ""),
            time.perf_counter() - started_s,
        )
        if not batch.completions:
            raise TrainingError(f"none of the {batch.lost} completions of a step has a reward: {batch.reason}")
        return batch

    async def _of_prompt(
        self, index: int, prompt: TokenisedRow, seed: int, version: str | None, scale: ScoreScale
    ) -> RolloutBatch:
        sampling = replace(self._sampling, seed=seed)
        async with self._generator.generate(prompt.row.prompt, sampling, self._samples) as generation:
            outcomes = [outcome async for finished in generation for outcome in finished]
        candidates = sorted(
            (outcome for outcome in outcomes if isinstance(outcome, Candidate)), key=lambda candidate: candidate.index
        )
        reason = next((outcome.reason for outcome in outcomes if not isinstance(outcome, Candidate)), "")
        for candidate in candidates:
            check_version(candidate, version)
        rewards: tuple[float, ...] = ()
        if candidates:
            try:
                rewards = (await self._scorer.score(prompt.row.prompt, candidates)).rewards_N
            except ScoringError as error:
                return RolloutBatch([], self._samples, str(error))
        judge_rewards, judge_failure = await self._judge_rewards(prompt, candidates)
        completions = [
            self._completion(index, prompt, candidate, reward, judge_reward, scale)
            for candidate, reward, judge_reward in zip(candidates, rewards, judge_rewards, strict=True)
            if math.isfinite(reward)
        ]
        if len(completions) < len(candidates):
            reason = f"{self._scorer.name} returned a reward that is not finite"
        return RolloutBatch(completions, self._samples - len(completions), reason, judge_failure)

    async def _judge_rewards(
        self, prompt: TokenisedRow, candidates: Sequence[Candidate]
    ) -> tuple[Sequence[float], str]:
        """(the judge's reward of each candidate or NaN, the reason if some are NaN although there is a judge)."""
        missing = [math.nan] * len(candidates)
        if self._judge is None or not candidates:
            return missing, ""
        try:
            rewards_N = (await self._judge.score(prompt.row.prompt, candidates)).rewards_N
        except ScoringError as error:
            return missing, str(error)
        return rewards_N, "" if all(map(math.isfinite, rewards_N)) else "its reward is not finite"

    def _completion(
        self,
        index: int,
        prompt: TokenisedRow,
        candidate: Candidate,
        reward: float,
        judge_reward: float,
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
            group=index,
            is_cut=is_cut,
            judged=judge_reward,
        )


def check_version(candidate: Candidate, version: str | None) -> None:
    """Checks that the candidate was sampled with the weights loaded last.

    Raises:
        TrainingError: it was sampled with other weights.
    """
    if candidate.weights_version != version:
        raise TrainingError(
            f"the engine sampled with the weights {candidate.weights_version}, but {version} were loaded last; check "
            "that nothing else loads weights into it"
        )


def drawn_logprobs_of(candidate: Candidate) -> tuple[float, ...]:
    """The engine's log-probability of each token, in nats.

    Raises:
        TrainingError: the generator does not return them.
    """
    if candidate.logprobs is None or len(candidate.logprobs) != len(candidate.token_ids):
        raise TrainingError("the engine returns no log-probability of each token; train with the embedded engine")
    return tuple(token.logprob for token in candidate.logprobs)
