"""Tokens saved by stopping policies on the running engine, and reward against cost for every policy.

The settings and the prior of the policies come from `benchmarks.stopping`, which used other openings than the thirty
that are answered here. The setting chosen there is compared with plain best-of-16. Further settings, from the cheapest
to the most expensive, make a curve of reward against cost, as plain and blockwise best-of-n do over n. All of them
answer every opening, one request at a time, with the same seeds; rewards are compared opening by opening.

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
"""Distance between the seeds of two openings: candidate i of an opening uses its seed + i."""
PLAIN = "plain"
N = (1, 2, 4, 8, 16, 32)
BLOCKWISE: Literal["blockwise"] = "blockwise"
BLOCKWISE_N = (2, 4, 8, 16)
MEASURED: tuple[Policy, ...] = ("adaptive", "speculative_rejection", "adaptive_rejection")
ON_CURVE = 4
"""Number of settings of each policy on its curve, besides the chosen setting."""


@dataclass(frozen=True, slots=True)
class Way:
    """A policy with one setting. `curve` is the policy's name; `is_compared` marks its chosen setting."""

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
    """Plain and blockwise best-of-n for every n, and each policy with settings of the recorded result."""
    most = recorded["pool"]
    plain = [Way(PLAIN, n, is_compared=n == PLAIN_N) for n in N]
    policies: list[Way] = []
    for name in MEASURED:
        policy = recorded["policies"]["film reviews"][name]
        best = frontier(policy["curve"])
        settings = [best[round(step * (len(best) - 1) / (ON_CURVE - 1))] for step in range(ON_CURVE)]
        policies += [_way(name, setting, most, prior) for setting in settings]
        policies.append(replace(_way(name, policy["equal"]["chosen"][0], most, prior), is_compared=True))
    return [*plain, *policies, *(Way(BLOCKWISE, n) for n in BLOCKWISE_N)]


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
    all_ways = ways(recorded, prior)
    settings = Settings(max_model_len=2048)
    results: list[list[BestOfNResult]] = [[] for _ in all_ways]
    async with factory.start(settings) as pipeline:
        for number, opening in enumerate(track(OPENINGS[:prompts], "Answering", console=Console(stderr=True))):
            sampling = SamplingParams(max_tokens=max_tokens, seed=first_seed + SEEDS_APART * number, likelihood=False)
            for way, way_results in zip(all_ways, results, strict=True):
                way_results.append(await way.answer(pipeline, Prompt(text=opening), sampling))
        reward_model = next(iter(pipeline.scorers))
    compared = {way.curve: way_results for way, way_results in zip(all_ways, results, strict=True) if way.is_compared}
    curves: dict[str, list[dict[str, Any]]] = {way.curve: [] for way in all_ways}
    for way, way_results in zip(all_ways, results, strict=True):
        curves[way.curve].append({"best_of": way.best_of} | cost(way_results, prices))
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
        "by_policy": {name: _summary(results, compared[PLAIN], prices) for name, results in compared.items()},
        "curves": curves,
    }


def cost(results: list[BestOfNResult], prices: Prices) -> dict[str, Any]:
    """Mean reward of the winner with its interval, and mean tokens, seconds and price of a request."""
    total_s = fmean(result.timings.total for result in results)
    prompt = fmean(result.prompt_tokens for result in results)
    generated = fmean(result.generated_tokens for result in results)
    scored = fmean(result.scored_tokens for result in results)
    return {
        "reward": asdict(bootstrap_mean([result.selection.winner.reward for result in results])),
        "tokens": generated,
        "scored_tokens": scored,
        "total_s": total_s,
        "price": prices.of(total_s, prompt, generated, scored),
    }


def _summary(results: list[BestOfNResult], plain: list[BestOfNResult], prices: Prices) -> dict[str, Any]:
    """The cost of a policy, compared with plain best-of-16 opening by opening."""
    rewards_P, plain_rewards_P = (
        [result.selection.winner.reward for result in results_P] for results_P in (results, plain)
    )
    tokens_P, plain_tokens_P = (
        np.array([float(result.generated_tokens) for result in results_P]) for results_P in (results, plain)
    )
    differences_P = [reward - plain_reward for reward, plain_reward in zip(rewards_P, plain_rewards_P, strict=True)]
    return cost(results, prices) | {
        "reward_minus_plain": asdict(bootstrap_mean(differences_P)),
        "token_share": ratio_with_interval(tokens_P, plain_tokens_P),
        "completed": fmean(result.completed for result in results),
        "cancelled": fmean(result.cancelled for result in results),
        "not_drawn": fmean(result.not_drawn for result in results),
        "candidate_s": fmean(result.candidate_s for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first opening")
    parser.add_argument("--prompts", type=int, default=len(OPENINGS), help="number of openings")
    Prices.add_flags(parser)
    flags = parser.parse_args()
    write_result("stopping_live", asyncio.run(measure(flags.seed, flags.prompts, Prices.from_flags(flags))))


if __name__ == "__main__":
    main()
