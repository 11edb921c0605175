"""What stopping policies save on the running engine, and reward against cost: plain best-of-n, each policy, blocks.

The settings of the policies and what they know beforehand come from `benchmarks.stopping`, thus from other openings
than the thirty that are answered here: the one that was chosen there is compared with plain best-of-16, and some on the
way from its cheapest to its most expensive make a curve, as blockwise best-of-n does over n. Every opening is answered
by all in turn, one request at a time, with the same seeds; rewards are compared pair by pair.

    python -m benchmarks.stopping_live [--seed 0] [--prompts 30] [--price-per-hour 0.1] [--price-per-million 0 0 0]
"""

import argparse
import asyncio
import json
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.film_reviews import OPENINGS
from benchmarks.prices import Prices
from benchmarks.provenance import RESULTS, provenance
from benchmarks.stats import write_result
from benchmarks.stopping import BARS, PLAIN_N, frontier, ratio_with_interval
from reranker.candidate import Prompt
from reranker.estimators import bootstrap_mean
from reranker.reward_posterior import Prior
from reranker.stopping import AdaptiveN, Policy, SpeculativeRejection, Stopping
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline import blockwise
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult

SEEDS_APART = 1000
"""Between the seeds of two openings: candidate i of an opening uses its seed + i."""
PLAIN = "plain"
N = (1, 2, 4, 8, 16, 32)
BLOCKWISE: Literal["blockwise"] = "blockwise"
BLOCKWISE_N = (2, 4, 8, 16)
MEASURED: tuple[Policy, ...] = ("adaptive", "speculative_rejection", "adaptive_rejection")
ON_CURVE = 4
"""Settings of each policy beside the chosen one."""


@dataclass(frozen=True, slots=True)
class Way:
    """A policy in one setting; `curve` is the policy's name, and `is_compared` the setting chosen for it."""

    curve: str
    best_of: int
    stopping: Stopping = field(default_factory=Stopping)
    is_compared: bool = False

    async def answer(self, pipeline: BestOfN, prompt: Prompt, sampling: SamplingParams) -> BestOfNResult:
        request = BestOfNRequest(prompt, sampling, self.best_of, stopping=self.stopping)
        if self.curve != BLOCKWISE:
            return await pipeline.run(request)
        in_blocks = replace(sampling, block_tokens=blockwise.DEFAULT_BLOCK_TOKENS)
        return await pipeline.run(replace(request, sampling=in_blocks, strategy=BLOCKWISE))


def ways(recorded: dict[str, Any], prior: Prior) -> list[Way]:
    """Plain best-of-n for every N, and each policy as recorded pools have it."""
    most = recorded["pool"]
    found = [Way(PLAIN, n, is_compared=n == PLAIN_N) for n in N]
    for name in MEASURED:
        policy = recorded["policies"]["film reviews"][name]
        best = frontier(policy["curve"])
        settings = [best[round(place * (len(best) - 1) / (ON_CURVE - 1))] for place in range(ON_CURVE)]
        found += [_way(name, one, most, prior) for one in settings]
        found.append(replace(_way(name, policy["equal"]["chosen"][0], most, prior), is_compared=True))
    return found + [Way(BLOCKWISE, n) for n in BLOCKWISE_N]


def _way(name: Policy, setting: dict[str, Any], most: int, prior: Prior) -> Way:
    best_of = setting.get("best_of", most)
    waves = rejection = None
    if "price_in_sd" in setting:
        waves = AdaptiveN(best_of, price=setting["price_in_sd"] * prior.sd, wave=setting["wave"], prior=prior)
    if "checkpoints" in setting:
        rejection = SpeculativeRejection(tuple(setting["checkpoints"]), setting["reject_share"])
    return Way(name, best_of, Stopping(name, waves=waves, rejection=rejection))


async def measure(first_seed: int, prompts: int, prices: Prices) -> dict[str, Any]:
    recorded = json.loads((RESULTS / "stopping.json").read_text())
    max_tokens = json.loads((RESULTS / "reward_pools.json").read_text())["max_tokens"]
    prior = Prior(**recorded["prior"]["film reviews"])
    asked = ways(recorded, prior)
    settings = Settings(max_model_len=2048)
    results: list[list[BestOfNResult]] = [[] for _ in asked]
    async with factory.start(settings) as pipeline:
        for place, opening in enumerate(track(OPENINGS[:prompts], "Answering", console=Console(stderr=True))):
            sampling = SamplingParams(max_tokens=max_tokens, seed=first_seed + SEEDS_APART * place, likelihood=False)
            for way, of_way in zip(asked, results, strict=True):
                of_way.append(await way.answer(pipeline, Prompt(text=opening), sampling))
        reward_model = next(iter(pipeline.scorers))
    compared = {way.curve: of_way for way, of_way in zip(asked, results, strict=True) if way.is_compared}
    curves: dict[str, list[dict[str, Any]]] = {way.curve: [] for way in asked}
    for way, of_way in zip(asked, results, strict=True):
        curves[way.curve].append({"best_of": way.best_of} | cost(of_way, prices))
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key"}, mode="json")),
        "policy": settings.model,
        "reward_model": reward_model,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "first_seed": first_seed,
        "prices": asdict(prices),
        "bars": BARS,
        "plain_n": PLAIN_N,
        "by_policy": {name: _told(found, compared[PLAIN], prices) for name, found in compared.items()},
        "curves": curves,
    }


def cost(found: list[BestOfNResult], prices: Prices) -> dict[str, Any]:
    """Reward of the winner, and means a request."""
    total_s = fmean(one.timings.total for one in found)
    prompt, generated, scored = (
        fmean(counts)
        for counts in zip(*((one.prompt_tokens, one.generated_tokens, one.scored_tokens) for one in found), strict=True)
    )
    return {
        "reward": asdict(bootstrap_mean([one.selection.winner.reward for one in found])),
        "tokens": generated,
        "scored_tokens": scored,
        "total_s": total_s,
        "price": prices.of(total_s, prompt, generated, scored),
    }


def _told(found: list[BestOfNResult], plain: list[BestOfNResult], prices: Prices) -> dict[str, Any]:
    rewards, of_plain = ([one.selection.winner.reward for one in some] for some in (found, plain))
    tokens, plain_tokens = (np.array([float(one.generated_tokens) for one in some]) for some in (found, plain))
    return cost(found, prices) | {
        "reward_minus_plain": asdict(bootstrap_mean([a - b for a, b in zip(rewards, of_plain, strict=True)])),
        "token_share": ratio_with_interval(tokens, plain_tokens),
        "completed": fmean(one.completed for one in found),
        "cancelled": fmean(one.cancelled for one in found),
        "not_drawn": fmean(one.not_drawn for one in found),
        "candidate_s": fmean(one.candidate_s for one in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first opening")
    parser.add_argument("--prompts", type=int, default=len(OPENINGS), help="how many openings to answer")
    Prices.add_flags(parser)
    given = parser.parse_args()
    write_result("stopping_live", asyncio.run(measure(given.seed, given.prompts, Prices.given(given))))


if __name__ == "__main__":
    main()
