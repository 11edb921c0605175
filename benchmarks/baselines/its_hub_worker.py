"""Best-of-N as its-hub 1.2.0 does it: N requests for one answer each, then the reward model on all of them.

It runs in its-hub's environment. The reward model is a served one, asked once with all answers of a prompt.
"""

import asyncio
import json
import sys
from typing import Any

import aiohttp
from its_hub import BestOfN, OpenAICompatibleLanguageModel
from its_hub.api import AbstractOutcomeRewardModel


class ServedRewardModel(AbstractOutcomeRewardModel):  # type: ignore[misc]  # it is not installed here
    """Rewards from POST /v1/score."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    def score(self, messages: Any, **kwargs: Any) -> list[float]:
        raise NotImplementedError("its-hub asks for ascore")

    async def ascore(self, messages: Any, orchestrator: Any = None, **kwargs: Any) -> list[float]:
        prompt = [{"role": one.role, "content": one.content} for one in messages[0][:-1]]
        body = {
            "messages": prompt,
            "candidates": [conversation[-1].content for conversation in messages],
            "reward_model": self.name,
        }
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/v1/score", json=body) as reply:
            reply.raise_for_status()
            return [one["score"] for one in (await reply.json())["data"]]


async def answer(question: dict[str, Any]) -> dict[str, Any]:
    lm = OpenAICompatibleLanguageModel(
        f"{question['url']}/v1",
        "unused",
        question["model"],
        max_tokens=question["max_tokens"],
        temperature=1.0,
    )
    best_of_n = BestOfN(ServedRewardModel(question["reward_url"], question["reward_model"]))
    try:
        found = await asyncio.gather(
            *(
                best_of_n.ainfer(lm, question["prompt"], question["n"], return_response_only=False)
                for _ in range(question["requests"])
            )
        )
    finally:
        await lm.close()
    return {"tokens": [one.usage.completion_tokens for one in found], "text": found[0].the_one["content"]}


def main() -> None:
    for line in sys.stdin:
        try:
            told = asyncio.run(answer(json.loads(line)))
        except Exception as error:  # noqa: BLE001 (whatever it is, the benchmark is told)
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
