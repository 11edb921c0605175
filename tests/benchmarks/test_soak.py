"""The soak's own checks: a server without fault passes them, and each planted fault is found."""

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
    *folders, last = path
    place = reply
    for folder in folders:
        place = place[folder]
    place[last] = to
    return dict(reply)


class Short(ScriptedGenerator):
    """Has a context, as the real model does, and its name."""

    model = MODEL

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        self.refusal = ContextLengthError("Too long.") if len(prompt.text or "") > 2000 else None
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


def test_a_right_answer_has_no_mistakes() -> None:
    assert mistakes_of(BODY, REPLY) == []


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (changed("choices", 0, "reward", to=1.0), "the winner has 1.0, the rewards are [1.0, 2.0]"),
        (changed("choices", 0, "text", to="fair"), "the winner has 2.0"),
        (changed("usage", "completion_tokens", to=7), "not the sum"),
        (changed("nbest", "failed", to=0), "not accounted for"),
        (changed("nbest", "candidates", to=CANDIDATES[1:]), "1 candidates came back of 2"),
        (changed("nbest", "stopped_by", to="deadline"), "nobody set"),
    ],
)
def test_a_wrong_answer_is_found(reply: dict[str, Any], found: str) -> None:
    assert any(found in mistake for mistake in mistakes_of(BODY, reply))


def test_a_stream_adds_up_to_the_reply_it_stands_for() -> None:
    chunks = [
        {"choices": [{"text": "go"}], "usage": None},
        {"choices": [{"text": "od"}], "usage": None},
        {"choices": [{"text": "", "reward": 2.0}], "nbest": REPLY["nbest"], "usage": None},
        {"choices": [], "usage": REPLY["usage"]},
    ]
    assert joined(chunks) == REPLY


def test_growth_compares_the_last_tenth_with_the_time_after_the_warm_up() -> None:
    memory = [{"at_s": float(at), "server_mib": mib} for at, mib in [(0, 900.0), (25, 400.0), (50, 900.0), (95, 410.0)]]
    assert growth(memory, 100) == {"after_warm_up_mib": 400, "at_the_end_mib": 410, "growth": pytest.approx(0.025)}


async def test_a_sound_server_passes() -> None:
    generator = Short(["one", "one two", "one two three"])
    served = BestOfN(generator, {"movie-sentiment": ScriptedScorer(), "likely": ScriptedScorer()})
    tally = Tally()
    async with address_of(app_over(served, max_best_of=16)) as url, httpx.AsyncClient(base_url=url) as http:
        client = Client(http, tally, "0")
        for _ in range(60):
            await client.one()
    assert (tally.wrong, tally.hung, tally.lost, tally.told_to_come_back) == ([], [], [], 0)
    assert {"plain 200", "stream 200", "score 200", "mistake 400"} <= tally.answers.keys()
