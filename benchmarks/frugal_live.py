"""What stopping policies save on the running engine: plain best-of-16 and each policy, with the same seeds.

The settings of the policies and what they know beforehand come from `benchmarks.frugal`, thus from other openings than
the thirty that are answered here. Every opening is answered by all in turn; rewards are compared pair by pair.

    python -m benchmarks.frugal_live [--seed 0] [--prompts 30]
"""

import argparse
import asyncio
import json
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.birth import RESULTS, birth_certificate
from benchmarks.film_reviews import OPENINGS
from benchmarks.frugal import BARS, PLAIN_N, ratio_with_interval
from benchmarks.stats import hand_in
from reranker.candidate import Prompt
from reranker.estimators import bootstrap_mean
from reranker.predictive import Prior
from reranker.stopping import AdaptiveN, Policy, SpeculativeRejection, Stopping
from server import assembly
from server.config import Settings
from server.generation.base import Sampling
from server.pipeline import BestOfNRequest, BestOfNResult

SEEDS_APART = 1000
"""Between the seeds of two openings: candidate i of an opening uses its seed + i."""
PLAIN = "plain"
MEASURED: tuple[Policy, ...] = ("adaptive", "speculative_rejection", "adaptive_rejection")


def policies(recorded: dict[str, Any], prior: Prior) -> dict[str, tuple[int, Stopping]]:
    """best_of and policy by name, as they were chosen on the first half of the recorded prompts."""
    found: dict[str, tuple[int, Stopping]] = {PLAIN: (PLAIN_N, Stopping())}
    most = recorded["pool"]
    for name in MEASURED:
        chosen = recorded["policies"]["film reviews"][name]["equal"]["chosen"][0]
        best_of = chosen.get("best_of", most)
        waves = rejection = None
        if "price_in_sd" in chosen:
            waves = AdaptiveN(best_of, price=chosen["price_in_sd"] * prior.sd, wave=chosen["wave"], prior=prior)
        if "checkpoints" in chosen:
            rejection = SpeculativeRejection(tuple(chosen["checkpoints"]), chosen["reject_share"])
        found[name] = (best_of, Stopping(name, waves=waves, rejection=rejection))
    return found


async def measure(first_seed: int, prompts: int) -> dict[str, Any]:
    recorded = json.loads((RESULTS / "frugal.json").read_text())
    max_tokens = json.loads((RESULTS / "reward_pools.json").read_text())["max_tokens"]
    prior = Prior(**recorded["prior"]["film reviews"])
    asked = policies(recorded, prior)
    settings = Settings(max_model_len=2048)
    results: dict[str, list[BestOfNResult]] = {name: [] for name in asked}
    async with assembly.start(settings) as pipeline:
        for place, opening in enumerate(track(OPENINGS[:prompts], "Answering", console=Console(stderr=True))):
            sampling = Sampling(max_tokens=max_tokens, seed=first_seed + SEEDS_APART * place)
            for name, (best_of, stopping) in asked.items():
                request = BestOfNRequest(Prompt(text=opening), sampling, best_of, stopping=stopping)
                results[name].append(await pipeline.run(request))
        reward_model = next(iter(pipeline.scorers))
    return {
        "birth": birth_certificate(flags=settings.model_dump(exclude={"api_key"}, mode="json")),
        "policy": settings.model,
        "reward_model": reward_model,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "first_seed": first_seed,
        "bars": BARS,
        "plain_n": PLAIN_N,
        "by_policy": {name: _told(found, results[PLAIN]) for name, found in results.items()},
    }


def _told(found: list[BestOfNResult], plain: list[BestOfNResult]) -> dict[str, Any]:
    rewards, of_plain = ([one.selection.winner.reward for one in some] for some in (found, plain))
    tokens, plain_tokens = (np.array([float(one.generated_tokens) for one in some]) for some in (found, plain))
    return {
        "reward": asdict(bootstrap_mean(rewards)),
        "reward_minus_plain": asdict(bootstrap_mean([a - b for a, b in zip(rewards, of_plain, strict=True)])),
        "token_share": ratio_with_interval(tokens, plain_tokens),
        "scored_tokens": fmean(one.scored_tokens for one in found),
        "completed": fmean(one.completed for one in found),
        "cancelled": fmean(one.cancelled for one in found),
        "not_drawn": fmean(one.not_drawn for one in found),
        "total_s": fmean(one.timings.total for one in found),
        "candidate_s": fmean(one.candidate_s for one in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first opening")
    parser.add_argument("--prompts", type=int, default=len(OPENINGS), help="how many openings to answer")
    arguments = parser.parse_args()
    hand_in("frugal_live", asyncio.run(measure(arguments.seed, arguments.prompts)))


if __name__ == "__main__":
    main()
