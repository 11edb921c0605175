"""Weight sync: loads the learner's weights into the engine, and verifies that the engine samples with them.

Each version of the weights is loaded under a name of its own (`Generator.load_adapter`, or `reload_weights` with
`full`). Then a probe verifies it: the engine samples a few completions of a fixed prompt with a fixed seed, the learner
computes the log-probabilities of the same tokens, and the two must agree. A stale adapter, a wrong scale or a cached
prefix of other weights makes them differ; the run then ends with both numbers, instead of learning from samples of
another policy. The prompt is the longest of the run, since the engine caches only whole blocks of a prompt.

Of several replicas on Ray, all load a version or none does, and the probe reaches one of them. The version on each
candidate shows that the other replicas have it too.
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
"""Mean difference between engine and learner, in nats per token, that rounding alone can explain.

In bfloat16, logits from 16 up are rounded to eighths, and with SmolLM2 the difference is .04 to .05 without any fault.
A fault of that size goes unnoticed until the trained difference outgrows it; until then the importance weights correct
for it.
"""


class SyncError(TrainingError):
    """The engine does not sample with the weights of the learner."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The fixed prompt and sampling that verify a weight sync."""

    prompt: TokenisedRow
    sampling: SamplingParams
    samples: int = 4


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The version that the engine now samples with, and its mean difference from the learner in nats per token."""

    version: str
    difference: float


class WeightSync:
    """Loads the learner's weights into the engine through files in `directory`."""

    def __init__(
        self, generator: Generator, learner: Learner, directory: Path, probe: Probe, tolerance: float | None
    ) -> None:
        self._generator = generator
        self._learner = learner
        self._directory = directory
        self._probe = probe
        default = TOLERANCE_BFLOAT16 if learner.computes_bfloat16 else TOLERANCE_FLOAT32
        self._tolerance = default if tolerance is None else tolerance

    async def __call__(self) -> SyncResult:
        """Loads the learner's current weights and verifies them.

        Raises:
            SyncError: the engine samples with other weights.
            server.errors.NbestError: the engine cannot load them.
        """
        written = await asyncio.to_thread(self._learner.write_for_engine, self._directory)
        full = written.name == "model"
        load = self._generator.reload_weights if full else self._generator.load_adapter
        version = await load(str(written.resolve()))
        return SyncResult(version, await self._difference(version))

    async def _difference(self, version: str) -> float:
        prompt, samples = self._probe.prompt, self._probe.samples
        async with self._generator.generate(prompt.row.prompt, self._probe.sampling, samples) as generation:
            candidates = [
                outcome async for finished in generation for outcome in finished if isinstance(outcome, Candidate)
            ]
        if not candidates:
            raise SyncError("the engine returned nothing for the probe, so its weights are not verified; see its log")
        for candidate in candidates:
            check_version(candidate, version)
        completions = [
            Completion(
                prompt.prompt_ids,
                candidate.token_ids,
                drawn_logprobs_of(candidate),
                candidate.text,
                reward=0.0,
                score=0.0,
                group=0,
                is_cut=False,
            )
            for candidate in candidates
        ]
        measures = await asyncio.to_thread(self._learner.measure, completions)
        engine = [logprob for completion in completions for logprob in completion.drawn_logprobs]
        learner = measures.logprobs_N_T[measures.mask_N_T.bool()].tolist()
        difference = fmean(abs(logprob - other) for logprob, other in zip(engine, learner, strict=True))
        if not difference <= self._tolerance:
            raise SyncError(
                f"the engine does not sample with the weights that were loaded: the probe has {fmean(engine):.4f} "
                f"nats a token by the engine and {fmean(learner):.4f} by the learner, a difference of {difference:.4f} "
                f"where {self._tolerance:g} is allowed; if they compute in different precisions, raise --sync-tolerance"
            )
        return difference
