"""A reward model as a scorer: it renders in one thread and computes in another, never on the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

from reranker.candidate import Candidate, Prompt
from reranker.models.batching import PACKED, PADDED, Batcher
from reranker.models.device import Device, Precision
from reranker.models.rendering import Rendered
from reranker.models.rendering_style import RenderingStyle
from reranker.models.reward_model import ComputedReward, RewardModel
from reranker.models.shared_trunk import SharedTrunk
from reranker.scorers.base import Needs, Scores, ScoringError
from reranker.scorers.rendering_thread import RenderingThread, with_missing


class RewardModelScorer:
    """Scores candidates with a `RewardModel`, in batches of a token budget across concurrent requests."""

    needs = Needs()

    def __init__(
        self,
        name: str,
        model: RewardModel,
        *,
        max_batch_tokens: int,
        max_wait_ms: float,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name = name
        self._batcher: Batcher[Rendered, ComputedReward] = Batcher(
            model.compute,
            policy=PACKED if model.shares_prompts else PADDED,
            max_batch_tokens=max_batch_tokens,
            max_wait_ms=max_wait_ms,
            on_batch=on_batch,
        )
        self._rendering = RenderingThread(name, model.renderer)

    @classmethod
    async def create(
        cls,
        name: str,
        spec: str,
        *,
        device: Device,
        dtype: Precision,
        trust_remote_code: bool,
        shared_trunk: SharedTrunk | None = None,
        style: RenderingStyle | None = None,
        **batching: Any,
    ) -> Self:
        """Loads the reward model `spec` (a prepared name, directory or hub id) without blocking the event loop.

        Raises:
            reranker.models.reward_model.RewardModelError: it cannot be loaded.
        """
        model = await asyncio.to_thread(
            RewardModel.load,
            spec,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            shared_trunk=shared_trunk,
            style=style,
        )
        return cls(name, model, **batching)

    async def check(self, prompt: Prompt) -> None:
        """Raises `UnscorableError` if the model's chat template refuses the prompt."""
        await self._rendering.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Returns one reward per candidate; NaN for a candidate that does not fit the model's context.

        Raises:
            ScoringError: the model failed.
            UnscorableError: no candidate fits.
        """
        rendered_N = await self._rendering.render(prompt, candidates)
        fitting = [
            replace(rendered, is_beginning=candidate.is_beginning)
            for rendered, candidate in zip(rendered_N, candidates, strict=True)
            if rendered is not None
        ]
        try:
            results = await self._batcher.submit(fitting)
        except RuntimeError as error:  # torch raises it, for example when memory is exhausted
            raise ScoringError(f"{self.name} failed: {error}") from error
        computed_tokens = {  # by sequence, because equal ones are computed once
            rendered: result.computed_tokens for rendered, result in zip(fitting, results, strict=True)
        }
        return Scores(
            with_missing((result.reward for result in results), rendered_N),
            scored_tokens=sum(computed_tokens.values()),
            prompt_tokens_cut=max(rendered.cut_tokens for rendered in fitting),
        )

    async def close(self) -> None:
        await self._batcher.close()
        self._rendering.close()
