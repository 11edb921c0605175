"""SPEC -> scorer: the one table. What needs tensors is imported when it is asked for, and not before."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reranker.models.device import Device, Precision
from reranker.scorers.base import Scorer
from reranker.scorers.cached import CachedScorer
from reranker.scorers.cascade import CascadeScorer
from reranker.scorers.ensemble import EnsembleScorer
from reranker.scorers.judge import Ask, Judge, JudgeScorer
from reranker.scorers.logprob import LogprobScorer, SelfCertaintyScorer
from reranker.scorers.pairwise import PairwiseScorer
from reranker.scorers.spec import (
    OWN_POLICY,
    CascadeSpec,
    EndpointSpec,
    EnsembleSpec,
    FunctionSpec,
    JudgeSpec,
    LikelihoodSpec,
    OfOthers,
    RewardModelSpec,
    ScorerSpec,
    parse_all,
)
from reranker.scorers.verifier import VerifierScorer

if TYPE_CHECKING:
    from reranker.models.shared_trunk import SharedTrunk


@dataclass(frozen=True, slots=True)
class ScorerContext:
    """What scorers are made with. `ask_model` gives the way to ask the MODEL of a judge.

    `on_batch` hears the number of sequences and of padded tokens of every batch of a reward model. Reward adapters over
    the trunk that is `held` read that one. So many rewards as `cache_entries` are remembered by each scorer that reads
    texts alone, and `on_lookup` hears how many candidates of a call were, and how many were not.
    """

    ask_model: Callable[[str], Ask]
    device: Device = "auto"
    reward_dtype: Precision = "auto"
    trust_remote_code: bool = False
    max_batch_tokens: int = 4096
    max_wait_ms: float = 5.0
    verifier_timeout_s: float = 10.0
    on_batch: Callable[[int, int], None] | None = None
    held: "SharedTrunk | None" = None
    cache_entries: int = 0
    on_lookup: Callable[[int, int], None] | None = None


async def make_scorers(
    specs: Mapping[str, str], surroundings: ScorerContext, stack: AsyncExitStack
) -> dict[str, Scorer]:
    """The scorers by name, in order; `stack` closes them.

    Raises:
        reranker.scorers.spec.ScorerSpecError: a SPEC is wrong, or what it names is not there.
        reranker.models.reward_model.RewardModelError: a reward model cannot be loaded.
    """
    parsed = parse_all(specs)
    made: dict[str, Scorer] = {}
    for name in sorted(parsed, key=lambda name: isinstance(parsed[name], OfOthers)):  # their members come first
        scorer = await _make(name, parsed[name], made, surroundings)
        stack.push_async_callback(scorer.close)
        if surroundings.cache_entries and reads_texts_alone(parsed[name]):
            scorer = CachedScorer(scorer, surroundings.cache_entries, surroundings.on_lookup)
        made[name] = scorer
    return {name: made[name] for name in parsed}


def reads_texts_alone(spec: ScorerSpec) -> bool:
    """Whether a reward depends on prompt and text, and neither on other candidates nor on how it was drawn.

    Nor on which weights the served policy has at the moment: as the judge it is asked again.
    """
    match spec:
        case RewardModelSpec() | EndpointSpec() | FunctionSpec():
            return True
        case JudgeSpec(model, pairwise):
            return model != OWN_POLICY and not pairwise
        case _:
            return False


async def _make(name: str, spec: ScorerSpec, made: Mapping[str, Scorer], surroundings: ScorerContext) -> Scorer:
    match spec:
        case RewardModelSpec(source):
            from reranker.scorers.reward_model import RewardModelScorer

            return await RewardModelScorer.create(
                name,
                source,
                device=surroundings.device,
                dtype=surroundings.reward_dtype,
                trust_remote_code=surroundings.trust_remote_code,
                held=surroundings.held,
                max_batch_tokens=surroundings.max_batch_tokens,
                max_wait_ms=surroundings.max_wait_ms,
                on_batch=surroundings.on_batch,
            )
        case EndpointSpec():
            from reranker.scorers.pooling_endpoint import PoolingEndpointScorer

            return await PoolingEndpointScorer.connect(name, spec, trust_remote_code=surroundings.trust_remote_code)
        case JudgeSpec(model, pairwise):
            judge = Judge(surroundings.ask_model(model))
            return PairwiseScorer(name, judge.compare) if pairwise else JudgeScorer(name, judge)
        case FunctionSpec():
            return await VerifierScorer.create(name, spec, timeout_s=surroundings.verifier_timeout_s)
        case LikelihoodSpec(measure):
            return LogprobScorer(name) if measure == "logprob" else SelfCertaintyScorer(name)
        case EnsembleSpec(combination, members, k):
            return EnsembleScorer(name, [made[member] for member in members], combination, k)
        case CascadeSpec(keep, (cheap, dear)):
            return CascadeScorer(name, made[cheap], made[dear], keep)
