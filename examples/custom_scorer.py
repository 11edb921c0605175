"""A scoring function of your own, given to best-of-N as a `python:FILE:FUNCTION` scorer.

    python -m examples.custom_scorer

The function gets the prompt and the texts of some candidates, and returns one number for each text; higher is better.
It runs in a separate process, which is restarted if the function crashes or takes too long (docs/scorers.md). The same
function works with the server: `nbest serve --reward-model words=python:examples/custom_scorer.py:mentions`.
"""

import asyncio
import re

from reranker.candidate import Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.types import BestOfNRequest, BestOfNResult

PROMPT = "Use the words story, actor and music in a sentence about a film.\nSentence:"
SETTINGS = Settings(reward_models={"words": f"python:{__file__}:mentions"}, max_model_len=1024)


def mentions(prompt: str, completions: list[str]) -> list[float]:
    """The share of the words requested by the prompt that each completion has."""
    first, second, third = re.findall(r"words (\w+), (\w+) and (\w+)", prompt)[0]
    return [sum(word in completion.lower() for word in (first, second, third)) / 3 for completion in completions]


async def answer(settings: Settings, best_of: int, max_tokens: int = 40) -> BestOfNResult:
    """Answers PROMPT with the candidate that has the most of the words; ties go to the lowest index."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, stop=("\n",))
    async with factory.start(settings) as pipeline:
        return await pipeline.run(BestOfNRequest(Prompt(text=PROMPT), sampling, best_of))


def main() -> None:
    for scored in asyncio.run(answer(SETTINGS, best_of=16)).selection.ranking:
        print(f"{scored.reward:5.2f}  {scored.candidate.text!r}")


if __name__ == "__main__":
    main()
