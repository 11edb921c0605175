"""Best-of-N by its-hub 1.2.0: N requests with one answer each, then the reward model scores all of them.

This script runs in its-hub's environment. The reward model is served: one POST /v1/score has all answers of a prompt.
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
        prompt = [{"role": message.role, "content": message.content} for message in messages[0][:-1]]
        body = {
            "messages": prompt,
            "candidates": [conversation[-1].content for conversation in messages],
            "reward_model": self.name,
        }
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/v1/score", json=body) as reply:
            reply.raise_for_status()
            return [line["score"] for line in (await reply.json())["data"]]


async def answer(request: dict[str, Any]) -> dict[str, Any]:
    lm = OpenAICompatibleLanguageModel(
        f"{request['url']}/v1",
        "unused",
        request["model"],
        max_tokens=request["max_tokens"],
        temperature=1.0,
    )
    best_of_n = BestOfN(ServedRewardModel(request["reward_url"], request["reward_model"]))
    try:
        results = await asyncio.gather(
            *(
                best_of_n.ainfer(lm, request["prompt"], request["n"], return_response_only=False)
                for _ in range(request["requests"])
            )
        )
    finally:
        await lm.close()
    return {"tokens": [result.usage.completion_tokens for result in results], "text": results[0].the_one["content"]}


def main() -> None:
    for line in sys.stdin:
        try:
            reply = asyncio.run(answer(json.loads(line)))
        except Exception as error:  # noqa: BLE001 (every failure is reported to the benchmark)
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
