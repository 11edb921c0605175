"""Blockwise best-of-N against plain best-of-N: when the first words come, and what they cost.

Openings of film reviews are continued by both, in turn, in one run: the same best_of, the same most tokens. Plain
best-of-N has nothing to tell before it has chosen, so its first token comes with its last. Told are seconds to the
first token and to the last, tokens that were drawn, and the reward of the answer.

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
"""Most of plain best-of-N's time to the first token."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request: seconds to its first and last token, tokens drawn for it, and the reward of the answer."""

    first_token_s: float
    total_s: float
    tokens: int
    reward: float
    blocks: int


async def plain(pipeline: BestOfN, prompt: Prompt, sampling: SamplingParams, best_of: int) -> Answered:
    began_s = time.perf_counter()
    result = await pipeline.run(BestOfNRequest(prompt, sampling, best_of))
    return _answered(result, began_s, time.perf_counter())


class BlockTimes(RunObserver):
    """When each block was chosen, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.chosen_s: list[float] = []

    def block(self, chosen: Candidate) -> None:
        self.chosen_s.append(time.perf_counter())


async def in_blocks(pipeline: BestOfN, prompt: Prompt, sampling: SamplingParams, best_of: int) -> Answered:
    blocks = BlockTimes()
    began_s = time.perf_counter()
    result = await pipeline.run(BestOfNRequest(prompt, sampling, best_of, strategy="blockwise"), blocks)
    return _answered(result, began_s, min(blocks.chosen_s, default=time.perf_counter()))


def _answered(result: BestOfNResult, began_s: float, first_token_s: float) -> Answered:
    return Answered(
        first_token_s=first_token_s - began_s,
        total_s=time.perf_counter() - began_s,
        tokens=result.generated_tokens,
        reward=result.selection.winner.reward,
        blocks=result.blocks,
    )


async def measure(openings: list[str], best_of: int, max_tokens: int, blocks: list[int]) -> dict[str, Any]:
    settings = Settings(max_model_len=2048)
    ways: list[int | None] = [None, *blocks]
    answered: dict[int | None, list[Answered]] = {way: [] for way in ways}
    async with factory.start(settings) as pipeline:
        for number in track(range(-1, len(openings)), "Answering", console=Console(stderr=True)):
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                sampling = SamplingParams(max_tokens=max_tokens, seed=10_000 * (number + 1), block_tokens=way)
                one = await (in_blocks if way else plain)(pipeline, Prompt(text=openings[number]), sampling, best_of)
                if number >= 0:  # the first one warms up
                    answered[way].append(one)
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "prompts": len(openings),
        "best_of": best_of,
        "max_tokens": max_tokens,
        "bar": BAR,
        "plain": told(answered[None]),
        "block_tokens": {
            str(way): told(answered[way]) | {"of_plain": compared(answered[way], answered[None])} for way in blocks
        },
    }


def told(answers: list[Answered]) -> dict[str, Any]:
    """Means over the prompts, with their intervals."""
    fields = ("first_token_s", "total_s", "tokens", "reward", "blocks")
    return {name: mean_with_interval([getattr(one, name) for one in answers]) for name in fields}


def compared(blocks: list[Answered], whole: list[Answered]) -> dict[str, Any]:
    """Ratios prompt by prompt, and by how much the reward differs."""
    ratios = {
        name: paired_ratio([getattr(one, name) for one in blocks], [getattr(one, name) for one in whole])
        for name in ("first_token_s", "total_s", "tokens")
    }
    differences = [one.reward - other.reward for one, other in zip(blocks, whole, strict=True)]
    return {**ratios, "reward_difference": mean_with_interval(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="openings, at least two")
    parser.add_argument("--best-of", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[8, 16, 32], help="sizes to try")
    given = parser.parse_args()
    openings = list(OPENINGS[: given.prompts])
    write_result("blockwise", asyncio.run(measure(openings, given.best_of, given.max_tokens, given.block_tokens)))


if __name__ == "__main__":
    main()
