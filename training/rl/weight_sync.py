"""Brings what was learnt into the engine, and proves that it has arrived.

Each version of the weights goes in under a name of its own (`Generator.load_adapter`, or `reload_weights` where all
weights learn). Then the canary: the engine draws a few completions of a fixed prompt with a fixed seed, the learner
reads the same tokens, and the two must give them the same log-probabilities. A stale adapter, a wrong scale or a prefix
that was computed with other weights makes them differ, and the run ends with both numbers instead of learning from
somebody else's samples. The prompt is the longest there is, for the engine shares only whole blocks of a prompt.

Of several replicas on Ray all load it, or none, and the canary meets one of them. That the others have it too is seen
by the versions of what they draw.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from reranker.candidate import Candidate
from server.generation.base import Generator, SamplingParams
from training.errors import TrainingError
from training.policy.tokens import TokenisedRow
from training.rl.learner import Learner
from training.rl.rollout import check_version, drawn_logprobs_of
from training.rl.trajectories import Completion

TOLERANCE_FLOAT32, TOLERANCE_BFLOAT16 = 1e-3, 0.15
"""Nats a token, in the mean, that engine and learner may be apart by rounding alone.

In bfloat16 logits of 16 and more are an eighth apart, and SmolLM2 is off by .04 to .05 where all is well. A fault of
that size hides there until what was learnt has outgrown it; meanwhile the importance weights make up for it.
"""


class SyncError(TrainingError):
    """The engine does not draw with the weights of the learner."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the canary sings."""

    prompt: TokenisedRow
    sampling: SamplingParams
    samples: int = 4


@dataclass(frozen=True, slots=True)
class Synced:
    """The version that the engine now draws with, and the mean difference from the learner in nats a token."""

    version: str
    difference: float


class WeightSync:
    """From the learner to the engine, by way of `directory`."""

    def __init__(
        self, generator: Generator, learner: Learner, directory: Path, probe: Probe, tolerance: float | None
    ) -> None:
        self._generator = generator
        self._learner = learner
        self._directory = directory
        self._probe = probe
        by_rounding = TOLERANCE_BFLOAT16 if learner.computes_bfloat16 else TOLERANCE_FLOAT32
        self._tolerance = by_rounding if tolerance is None else tolerance

    async def __call__(self) -> Synced:
        """Loads the weights as they are now.

        Raises:
            SyncError: the engine draws with others.
            server.errors.NbestError: it cannot load them.
        """
        written = await asyncio.to_thread(self._learner.write_for_engine, self._directory)
        full = written.name == "model"
        load = self._generator.reload_weights if full else self._generator.load_adapter
        version = await load(str(written.resolve()))
        return Synced(version, await self._difference(version))

    async def _difference(self, version: str) -> float:
        prompt, samples = self._probe.prompt, self._probe.samples
        async with self._generator.generate(prompt.row.prompt, self._probe.sampling, samples) as generation:
            drawn = [one async for finished in generation for one in finished if isinstance(one, Candidate)]
        if not drawn:
            raise SyncError("the engine drew nothing of the probe, so its weights cannot be compared; look at its log")
        for one in drawn:
            check_version(one, version)
        completions = [
            Completion(prompt.prompt_ids, one.token_ids, drawn_logprobs_of(one), one.text, 0.0, 0.0, 0, is_cut=False)
            for one in drawn
        ]
        measured = await asyncio.to_thread(self._learner.measure, completions)
        engine = [logprob for one in completions for logprob in one.drawn_logprobs]
        learner = measured.logprobs_N_T[measured.mask_N_T.bool()].tolist()
        difference = fmean(abs(one - other) for one, other in zip(engine, learner, strict=True))
        if not difference <= self._tolerance:
            raise SyncError(
                f"the engine does not draw with the weights that were loaded: the probe has {fmean(engine):.4f} nats a "
                f"token by the engine and {fmean(learner):.4f} by the learner, {difference:.4f} apart where "
                f"{self._tolerance:g} is allowed; if they compute in different precisions, raise --sync-tolerance"
            )
        return difference
