"""Reward of the winner against N, on 30 openings of film reviews.

Every opening is answered at best_of 1, 4 and 16 by the pipeline that serves, with the real engine and reward model.
Each winner also gets a score from the VADER lexicon, which the reward model was not trained on. Every N samples its own
candidates, with different seeds, so the three means are independent of each other.

    python -m benchmarks.quality [--seed 0]
"""

import argparse
import asyncio
import statistics
from typing import Any

from rich.console import Console
from rich.progress import track
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.film_reviews import OPENINGS
from benchmarks.provenance import provenance
from benchmarks.stats import mean_with_interval, write_result
from reranker.candidate import Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult

BEST_OF = (1, 4, 16)
MAX_TOKENS = 40
SEEDS_APART = 1000
"""Distance between the seeds of two requests: candidate i of a request uses its seed + i."""


async def answer(pipeline: BestOfN, opening: str, best_of: int, seed: int) -> BestOfNResult:
    return await pipeline.run(
        BestOfNRequest(Prompt(text=opening), SamplingParams(max_tokens=MAX_TOKENS, seed=seed), best_of)
    )


async def measure(first_seed: int) -> dict[str, Any]:
    settings = Settings(max_model_len=2048)
    vader = SentimentIntensityAnalyzer()
    winners: dict[int, list[dict[str, Any]]] = {best_of: [] for best_of in BEST_OF}
    single_rewards: list[list[float]] = []
    async with factory.start(settings) as pipeline:
        jobs = [(best_of, opening) for best_of in BEST_OF for opening in OPENINGS]
        for job, (best_of, opening) in enumerate(track(jobs, "Answering", console=Console(stderr=True))):
            seed = first_seed + SEEDS_APART * job
            result = await answer(pipeline, opening, best_of, seed)
            winner = result.selection.winner
            text = opening + winner.candidate.text
            winners[best_of].append(
                {
                    "text": text,
                    "seed": seed + winner.candidate.index,
                    "reward": winner.reward,
                    "vader": vader.polarity_scores(text)["compound"],
                    "finish_reason": winner.candidate.finish_reason,
                    "total_s": result.timings.total,
                }
            )
            if best_of == max(BEST_OF):
                single_rewards.append([candidate.reward for candidate in result.selection.ranking])
        reward_model = next(iter(pipeline.scorers))
    pooled = [reward for rewards in single_rewards for reward in rewards]
    single_sd = statistics.stdev(pooled)
    means = {best_of: statistics.fmean(winner["reward"] for winner in winners[best_of]) for best_of in BEST_OF}
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key"}, mode="json")),
        "policy": settings.model,
        "reward_model": reward_model,
        "prompts": len(OPENINGS),
        "max_tokens": MAX_TOKENS,
        "first_seed": first_seed,
        "winner_reward": {str(n): mean_with_interval([winner["reward"] for winner in winners[n]]) for n in BEST_OF},
        "winner_vader": {str(n): mean_with_interval([winner["vader"] for winner in winners[n]]) for n in BEST_OF},
        "single_sample_reward": {"mean": statistics.fmean(pooled), "sd": single_sd, "n": len(pooled)},
        "gain_of_16_over_1_in_single_sample_sd": (means[16] - means[1]) / single_sd,
        "samples": {str(n): winners[n] for n in BEST_OF},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first request")
    arguments = parser.parse_args()
    write_result("quality", asyncio.run(measure(arguments.seed)))


if __name__ == "__main__":
    main()
