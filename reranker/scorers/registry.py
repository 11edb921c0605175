"""Makes the scorer of each SPEC; a scorer that needs torch or transformers is imported only when it is made."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reranker.models.device import Device, Precision
from reranker.scorers import spec
from reranker.scorers.base import Scorer
from reranker.scorers.cached import CachedScorer
from reranker.scorers.cascade import CascadeScorer
from reranker.scorers.ensemble import EnsembleScorer
from reranker.scorers.judge import Judge, JudgeModel, JudgeScorer
from reranker.scorers.logprob import LogprobScorer, SelfCertaintyScorer
from reranker.scorers.pairwise import PairwiseScorer
from reranker.scorers.verifier import VerifierScorer

if TYPE_CHECKING:
    from reranker.models.shared_trunk import SharedTrunk


@dataclass(frozen=True, slots=True)
class ScorerContext:
    """Settings and resources that scorers are made with.

    `judge_model` returns the model that a judge calls, for the MODEL of its SPEC. `on_batch` is called for every batch
    of a reward model, with the number of sequences and the number of tokens, padding included. Reward adapters over the
    same base as `shared_trunk` read its weights instead of loading their own. Each scorer whose reward depends only on
    prompt and text caches up to `cache_entries` rewards; `on_lookup` is called for each of its calls, with the numbers
    of cached and of uncached candidates.
    """

    judge_model: Callable[[str], JudgeModel]
    device: Device = "auto"
    reward_dtype: Precision = "auto"
    trust_remote_code: bool = False
    max_batch_tokens: int = 4096
    max_wait_ms: float = 5.0
    verifier_timeout_s: float = 10.0
    on_batch: Callable[[int, int], None] | None = None
    shared_trunk: "SharedTrunk | None" = None
    cache_entries: int = 0
    on_lookup: Callable[[int, int], None] | None = None


async def make_scorers(
    specs: Mapping[str, str], context: ScorerContext, exit_stack: AsyncExitStack
) -> dict[str, Scorer]:
    """Makes the scorers from their SPECs, by name and in order; `exit_stack` closes them.

    Raises:
        reranker.scorers.spec.ScorerSpecError: a SPEC is wrong, or what it names does not exist.
        reranker.models.reward_model.RewardModelError: a reward model cannot be loaded.
    """
    parsed = spec.parse_all(specs)
    scorers: dict[str, Scorer] = {}
    members_first = sorted(parsed, key=lambda name: isinstance(parsed[name], spec.CompositeSpec))
    for name in members_first:
        scorer = await _make(name, parsed[name], scorers, context)
        exit_stack.push_async_callback(scorer.close)
        if context.cache_entries and is_cacheable(parsed[name]):
            scorer = CachedScorer(scorer, context.cache_entries, context.on_lookup)
        scorers[name] = scorer
    return {name: scorers[name] for name in parsed}


def is_cacheable(scorer_spec: spec.ScorerSpec) -> bool:
    """Whether the reward depends only on prompt and text.

    It must not depend on the other candidates, on how the candidate was sampled, or on the current weights of the
    served policy, which rules out the policy as its own judge.
    """
    match scorer_spec:
        case spec.RewardModelSpec() | spec.EndpointSpec() | spec.FunctionSpec():
            return True
        case spec.JudgeSpec(model, pairwise):
            return model != spec.OWN_POLICY and not pairwise
        case _:
            return False


async def _make(
    name: str, scorer_spec: spec.ScorerSpec, scorers: Mapping[str, Scorer], context: ScorerContext
) -> Scorer:
    """Makes one scorer; `scorers` holds those it may have as members."""
    match scorer_spec:
        case spec.RewardModelSpec(source, style):
            from reranker.scorers.reward_model import RewardModelScorer

            return await RewardModelScorer.create(
                name,
                source,
                device=context.device,
                dtype=context.reward_dtype,
                trust_remote_code=context.trust_remote_code,
                shared_trunk=context.shared_trunk,
                style=style,
                max_batch_tokens=context.max_batch_tokens,
                max_wait_ms=context.max_wait_ms,
                on_batch=context.on_batch,
            )
        case spec.EndpointSpec():
            from reranker.scorers.pooling_endpoint import PoolingEndpointScorer

            return await PoolingEndpointScorer.connect(name, scorer_spec, trust_remote_code=context.trust_remote_code)
        case spec.JudgeSpec(model, pairwise):
            judge = Judge(context.judge_model(model))
            return PairwiseScorer(name, judge.compare) if pairwise else JudgeScorer(name, judge)
        case spec.FunctionSpec():
            return await VerifierScorer.create(name, scorer_spec, timeout_s=context.verifier_timeout_s)
        case spec.LogprobSpec(measure):
            return LogprobScorer(name) if measure == "logprob" else SelfCertaintyScorer(name)
        case spec.EnsembleSpec(combination, members, k):
            return EnsembleScorer(name, [scorers[member] for member in members], combination, k)
        case spec.CascadeSpec(keep, (cheap, expensive)):
            return CascadeScorer(name, scorers[cheap], scorers[expensive], keep)
