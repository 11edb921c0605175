"""Best-of-N in this process: the pipeline of `nbest serve`, called from Python instead of over HTTP.

    python -m examples.best_of_n_in_process ["PROMPT"] [--best-of 8]

`factory.start` loads the models that the settings name, yields the pipeline, and frees everything when the block ends.
The settings are those of `nbest serve` (docs/settings.md).
"""

import argparse
import asyncio

from reranker.candidate import Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.types import BestOfNRequest, BestOfNResult


async def answer(settings: Settings, prompt: str, best_of: int, max_tokens: int = 40) -> BestOfNResult:
    """Answers one prompt with the best of `best_of` candidates."""
    async with factory.start(settings) as pipeline:
        return await pipeline.run(
            BestOfNRequest(Prompt(text=prompt), SamplingParams(max_tokens=max_tokens, seed=0), best_of)
        )


def report(result: BestOfNResult) -> str:
    """A line for each candidate, the winner first, and the cost of the request."""
    lines = [f"{scored.reward:7.2f}  {scored.candidate.text!r}" for scored in result.selection.ranking]
    cost = f"{result.generated_tokens} tokens generated, {result.scored_tokens} scored, {result.timings.total:.1f} s"
    return "\n".join([*lines, cost])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="I saw this movie last night and", help="text to continue")
    parser.add_argument("--best-of", type=int, default=8, help="number of candidates")
    arguments = parser.parse_args()
    print(report(asyncio.run(answer(Settings(max_model_len=1024), arguments.prompt, arguments.best_of))))


if __name__ == "__main__":
    main()
