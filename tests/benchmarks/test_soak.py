"""The checks of the soak test: a correct server passes, and each planted fault is reported."""

from copy import deepcopy
from typing import Any

import httpx
import pytest

from benchmarks.soak import MODEL, Client, Tally, growth, joined, mistakes_of
from reranker.candidate import Prompt
from server.errors import ContextLengthError
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer
from tests.support.serving import address_of, app_over

BODY = {"best_of": 3, "nbest": {}}
CANDIDATES = [
    {"index": 0, "text": "fair", "reward": 1.0, "num_tokens": 5},
    {"index": 1, "text": "good", "reward": 2.0, "num_tokens": 7},
]
REPLY: dict[str, Any] = {
    "choices": [{"text": "good", "reward": 2.0}],
    "usage": {"completion_tokens": 12},
    "nbest": {"candidates": CANDIDATES, "completed": 2, "failed": 1, "cancelled": 0, "stopped_by": "all"},
}


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    reply: Any = deepcopy(REPLY)
    *parents, last = path
    container = reply
    for key in parents:
        container = container[key]
    container[last] = to
    return dict(reply)


class LimitedContextGenerator(ScriptedGenerator):
    """Has the real model's name, and refuses prompts of more than 2000 characters as too long for its context."""

    model = MODEL

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        self.refusal = ContextLengthError("Too long.") if len(prompt.text or "") > 2000 else None
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


def test_a_correct_answer_has_no_mistakes() -> None:
    assert mistakes_of(BODY, REPLY) == []


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (changed("choices", 0, "reward", to=1.0), "the winner has reward 1.0, the rewards are [1.0, 2.0]"),
        (changed("choices", 0, "text", to="fair"), "the winner has reward 2.0"),
        (changed("usage", "completion_tokens", to=7), "not the sum"),
        (changed("nbest", "failed", to=0), "do not add up to best_of 3"),
        (changed("nbest", "candidates", to=CANDIDATES[1:]), "1 candidates were returned of 2 completed"),
        (changed("nbest", "stopped_by", to="deadline"), "a deadline that the request did not set"),
    ],
)
def test_a_wrong_answer_is_reported(reply: dict[str, Any], message: str) -> None:
    assert any(message in mistake for mistake in mistakes_of(BODY, reply))


def test_the_chunks_of_a_stream_are_joined_to_a_reply() -> None:
    chunks = [
        {"choices": [{"text": "go"}], "usage": None},
        {"choices": [{"text": "od"}], "usage": None},
        {"choices": [{"text": "", "reward": 2.0}], "nbest": REPLY["nbest"], "usage": None},
        {"choices": [], "usage": REPLY["usage"]},
    ]
    assert joined(chunks) == REPLY


def test_growth_compares_the_last_tenth_with_the_time_after_the_warm_up() -> None:
    samples = [(0.0, 900.0), (25.0, 400.0), (50.0, 900.0), (95.0, 410.0)]
    memory = [{"at_s": at_s, "server_mib": mib} for at_s, mib in samples]
    assert growth(memory, 100) == {"after_warm_up_mib": 400, "at_the_end_mib": 410, "growth": pytest.approx(0.025)}


async def test_a_correct_server_passes() -> None:
    generator = LimitedContextGenerator(["one", "one two", "one two three"])
    served = BestOfN(generator, {"movie-sentiment": ScriptedScorer(), "likely": ScriptedScorer()})
    tally = Tally()
    async with address_of(app_over(served, max_best_of=16)) as url, httpx.AsyncClient(base_url=url) as http:
        client = Client(http, tally, "0")
        for _ in range(60):
            await client.request()
    assert (tally.wrong, tally.hung, tally.lost, tally.retries) == ([], [], [], 0)
    assert {"plain 200", "stream 200", "score 200", "mistake 400"} <= tally.answers.keys()
