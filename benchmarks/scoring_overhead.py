"""Overhead of scoring: seconds of best_of=16 with scoring against the same 16 generations without, alternately.

Both ways sample the same candidates (same seed) from the same engine; one runs the whole pipeline, the other only reads
the generator. The order alternates from round to round, so that drift of the machine affects both equally. The stages
are taken from the pipeline's timings.

    python -m benchmarks.scoring_overhead [--rounds 7] [--max-tokens 64]
"""

import argparse
import asyncio
import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.film_reviews import OPENINGS
from benchmarks.provenance import provenance
from benchmarks.stats import paired_ratio, write_result
from reranker.candidate import Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, Timings

BEST_OF = 16
PROMPT = Prompt(text="A review of a film I saw at the festival this year. " * 9 + OPENINGS[0])
"""About 120 tokens."""


async def generate_only(pipeline: BestOfN, sampling: SamplingParams) -> float:
    start_s = time.perf_counter()
    async with pipeline.generator.generate(PROMPT, sampling, BEST_OF) as generation:
        async for _ in generation:
            pass
    return time.perf_counter() - start_s


async def best_of_n(pipeline: BestOfN, sampling: SamplingParams) -> Timings:
    return (await pipeline.run(BestOfNRequest(PROMPT, sampling, BEST_OF))).timings


async def measure(rounds: int, max_tokens: int) -> dict[str, Any]:
    settings = Settings(max_model_len=2048)
    bare_s: list[float] = []
    full: list[Timings] = []
    async with factory.start(settings) as pipeline:
        for number in track(range(-1, rounds), "Measuring", console=Console(stderr=True)):
            sampling = SamplingParams(max_tokens=max_tokens, seed=1000 * (number + 1), likelihood=False)
            if number % 2:
                bare, timings = await generate_only(pipeline, sampling), await best_of_n(pipeline, sampling)
            else:
                timings, bare = await best_of_n(pipeline, sampling), await generate_only(pipeline, sampling)
            if number >= 0:  # the first round warms up
                bare_s.append(bare)
                full.append(timings)
        async with pipeline.generator.generate(PROMPT, SamplingParams(max_tokens=1), 1) as generation:
            async for _ in generation:
                pass
            prompt_tokens = generation.prompt_tokens
    stages = ("queue", "generate", "score", "select", "total")
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key"}, mode="json")),
        "best_of": BEST_OF,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "with_scoring_over_without": paired_ratio([timings.total for timings in full], bare_s),
        "without_scoring_s": {"median": statistics.median(bare_s), "low": min(bare_s), "high": max(bare_s)},
        "with_scoring_s": {stage: statistics.median(getattr(timings, stage) for timings in full) for stage in stages},
        "after_the_last_candidate_s": statistics.median(t.total - t.queue - t.generate for t in full),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    write_result("scoring_overhead", asyncio.run(measure(arguments.rounds, arguments.max_tokens)))


if __name__ == "__main__":
    main()
