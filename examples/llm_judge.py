"""A language model as the judge of candidates: a `judge:MODEL` scorer, here with the policy as its own judge.

    python -m examples.llm_judge

The judge grades each candidate from 1 to 10 in a request of its own, restricted to a JSON schema (docs/scorers.md).
`judge:self` is the served policy, which needs no second model; a small policy is a poor judge. For another model set
`judge_base_url` to an OpenAI-compatible server and name its model: `judge:MODEL`.
"""

import asyncio

from reranker.candidate import Message, Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.types import BestOfNRequest, BestOfNResult

SETTINGS = Settings(reward_models={"judge": "judge:self"}, max_model_len=2048)
QUESTION = "What should I look at when I choose a film for the evening?"


async def answer(settings: Settings, question: str, best_of: int, max_tokens: int = 60) -> BestOfNResult:
    """Answers a question with the candidate that the judge grades highest; equal grades go to the lowest index."""
    prompt = Prompt(messages=(Message("user", question),))
    async with factory.start(settings) as pipeline:
        return await pipeline.run(BestOfNRequest(prompt, SamplingParams(max_tokens=max_tokens, seed=0), best_of))


def main() -> None:
    result = asyncio.run(answer(SETTINGS, QUESTION, best_of=4))
    for scored in result.selection.ranking:
        print(f"grade {scored.reward:g}: {scored.candidate.text!r}")
    print(f"{result.generated_tokens} tokens generated, {result.scored_tokens} read and written by the judge")


if __name__ == "__main__":
    main()
