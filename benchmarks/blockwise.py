"""Blockwise best-of-N against plain best-of-N: time to the first token, tokens and reward.

Both continue openings of film reviews, alternately in one run, with the same best_of and the same max_tokens. Plain
best-of-N returns its first token with its last, after the winner is chosen. Measured are seconds to the first and to
the last token, tokens sampled, and the reward of the answer.

    python -m benchmarks.blockwise [--prompts 12] [--best-of 16] [--max-tokens 128] [--block-tokens 8 16 32]
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.film_reviews import OPENINGS
from benchmarks.provenance import provenance
from benchmarks.stats import mean_with_interval, paired_ratio, write_result
from reranker.candidate import Candidate, Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

BAR = 0.25
"""Maximum time to the first token, as a share of plain best-of-N's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's seconds to the first and last token, tokens sampled, reward, and number of blocks."""

    first_token_s: float
    total_s: float
    tokens: int
    reward: float
    blocks: int


async def plain(pipeline: BestOfN, prompt: Prompt, sampling: SamplingParams, best_of: int) -> Answer:
    start_s = time.perf_counter()
    result = await pipeline.run(BestOfNRequest(prompt, sampling, best_of))
    return _answered(result, start_s, time.perf_counter())


class BlockTimes(RunObserver):
    """When each block was chosen, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.chosen_s: list[float] = []

    def block(self, chosen: Candidate) -> None:
        self.chosen_s.append(time.perf_counter())


async def in_blocks(pipeline: BestOfN, prompt: Prompt, sampling: SamplingParams, best_of: int) -> Answer:
    blocks = BlockTimes()
    start_s = time.perf_counter()
    result = await pipeline.run(BestOfNRequest(prompt, sampling, best_of, strategy="blockwise"), blocks)
    return _answered(result, start_s, min(blocks.chosen_s, default=time.perf_counter()))


def _answered(result: BestOfNResult, start_s: float, first_token_s: float) -> Answer:
    return Answer(
        first_token_s=first_token_s - start_s,
        total_s=time.perf_counter() - start_s,
        tokens=result.generated_tokens,
        reward=result.selection.winner.reward,
        blocks=result.blocks,
    )


async def measure(openings: list[str], best_of: int, max_tokens: int, blocks: list[int]) -> dict[str, Any]:
    settings = Settings(max_model_len=2048)
    ways: list[int | None] = [None, *blocks]
    answers: dict[int | None, list[Answer]] = {way: [] for way in ways}
    async with factory.start(settings) as pipeline:
        for number in track(range(-1, len(openings)), "Answering", console=Console(stderr=True)):
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                sampling = SamplingParams(max_tokens=max_tokens, seed=10_000 * (number + 1), block_tokens=way)
                answer = await (in_blocks if way else plain)(pipeline, Prompt(text=openings[number]), sampling, best_of)
                if number >= 0:  # the first round warms up
                    answers[way].append(answer)
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "prompts": len(openings),
        "best_of": best_of,
        "max_tokens": max_tokens,
        "bar": BAR,
        "plain": means(answers[None]),
        "block_tokens": {
            str(way): means(answers[way]) | {"of_plain": compared(answers[way], answers[None])} for way in blocks
        },
    }


def means(answers: list[Answer]) -> dict[str, Any]:
    """Means over the prompts, with their intervals."""
    fields = ("first_token_s", "total_s", "tokens", "reward", "blocks")
    return {name: mean_with_interval([getattr(answer, name) for answer in answers]) for name in fields}


def compared(blocks: list[Answer], whole: list[Answer]) -> dict[str, Any]:
    """Ratios of blockwise to plain answers, prompt by prompt, and the mean difference of their rewards."""
    ratios = {
        name: paired_ratio([getattr(answer, name) for answer in blocks], [getattr(answer, name) for answer in whole])
        for name in ("first_token_s", "total_s", "tokens")
    }
    differences = [block.reward - plain.reward for block, plain in zip(blocks, whole, strict=True)]
    return {**ratios, "reward_difference": mean_with_interval(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="number of openings, at least two")
    parser.add_argument("--best-of", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[8, 16, 32], help="block sizes")
    flags = parser.parse_args()
    openings = list(OPENINGS[: flags.prompts])
    write_result("blockwise", asyncio.run(measure(openings, flags.best_of, flags.max_tokens, flags.block_tokens)))


if __name__ == "__main__":
    main()
