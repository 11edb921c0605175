"""Rewards that are asked for once."""

import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.scorers.base import Scores, ScoringError
from reranker.scorers.cached import CachedScorer, digest
from reranker.scorers.registry import ScorerContext, is_cacheable, make_scorers
from reranker.scorers.spec import parse
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, app_over, client_of
from tests.support.tiny_models import save_tiny_reward_model

PROMPT = Prompt(text="It was")


def texts(*said: str) -> list[Candidate]:
    return [Candidate(index, text, num_tokens=1) for index, text in enumerate(said)]


async def test_only_what_is_new_is_asked_for() -> None:
    scorer = ScriptedScorer({"a": 1, "b": 2, "c": 3})
    remembering = CachedScorer(scorer, 10)
    assert (await remembering.score(PROMPT, texts("a", "b"))).rewards_N == (1.0, 2.0)
    again = await remembering.score(PROMPT, texts("b", "c", "a"))
    assert again.rewards_N == (2.0, 3.0, 1.0)
    assert again.scored_tokens == 1
    known = await remembering.score(PROMPT, texts("c"))
    assert (known.rewards_N, known.scored_tokens) == ((3,), 0)
    assert scorer.groups == [2, 1]


async def test_another_prompt_is_another_question() -> None:
    scorer = ScriptedScorer({"a": 1})
    remembering = CachedScorer(scorer, 10)
    for prompt in (PROMPT, Prompt(text="It is"), Prompt(messages=(Message("user", "It was"),))):
        await remembering.score(prompt, texts("a"))
    assert scorer.groups == [1, 1, 1]


async def test_what_was_asked_for_least_recently_is_forgotten() -> None:
    scorer = ScriptedScorer()
    remembering = CachedScorer(scorer, 2)
    await remembering.score(PROMPT, texts("a", "b"))
    await remembering.score(PROMPT, texts("a"))
    await remembering.score(PROMPT, texts("c"))
    await remembering.score(PROMPT, texts("a", "b"))
    assert scorer.groups == [2, 1, 1]


async def test_a_failure_and_a_missing_reward_are_not_remembered() -> None:
    scorer = ScriptedScorer({"a": math.nan})
    remembering = CachedScorer(scorer, 10)
    scorer.fails = True
    with pytest.raises(ScoringError):
        await remembering.score(PROMPT, texts("a"))
    scorer.fails = False
    assert math.isnan((await remembering.score(PROMPT, texts("a"))).rewards_N[0])
    scorer.rewards = {"a": 5.0}
    assert (await remembering.score(PROMPT, texts("a"))).rewards_N == (5.0,)


async def test_equal_texts_of_one_call_are_asked_about_once() -> None:
    scorer = ScriptedScorer({"a": 1, "b": 2})
    scores = await CachedScorer(scorer, 10).score(PROMPT, texts("a", "b", "a"))
    assert (scores.rewards_N, scorer.groups) == ((1, 2, 1), [2])


async def test_a_prompt_that_was_cut_is_told_of_those_that_were_cut_alone() -> None:
    class Cutting(ScriptedScorer):
        async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
            cut = max(3 if one.text == "long" else 0 for one in candidates)
            return replace(await super().score(prompt, candidates), prompt_tokens_cut=cut)

    remembering = CachedScorer(Cutting(), 10)
    cuts = [
        (await remembering.score(PROMPT, texts(*said))).prompt_tokens_cut for said in (("long", "a"), "a", ["long"])
    ]
    assert cuts == [3, 0, 3]


async def test_more_new_texts_than_are_remembered_are_all_answered() -> None:
    scores = await CachedScorer(ScriptedScorer({"a": 1, "b": 2, "c": 3}), 1).score(PROMPT, texts("a", "b", "c", "a"))
    assert scores.rewards_N == (1, 2, 3, 1)


def test_parts_do_not_run_into_each_other() -> None:
    one, other = (Prompt(messages=(Message("user", text),)) for text in ("ab", "a"))
    assert digest(one, "c") != digest(other, "bc")
    assert digest(Prompt(text=""), "x") != digest(one, "x")


@pytest.mark.parametrize(
    ("spec", "alone"),
    [
        ("movie-sentiment", True),
        ("vllm:http://up", True),
        ("python:a.py:f", True),
        ("judge:large", True),
        ("judge:self", False),
        ("pairwise:judge:large", False),
        ("logprob", False),
        ("self_certainty", False),
        ("ensemble:min:a,b", False),
        ("cascade:2:a,b", False),
    ],
)
def test_only_scorers_of_texts_alone_remember(spec: str, alone: bool) -> None:
    assert is_cacheable(parse(spec)) is alone


async def test_a_reward_model_says_the_same_again_and_as_the_member_of_others(tmp_path: Path) -> None:
    specs = {"one": str(save_tiny_reward_model(tmp_path)), "two": "logprob", "both": "ensemble:min:one,two"}
    candidates = [replace(one, cumulative_logprob=-1.0) for one in texts("great fun", "dull", "great fun", "a film")]
    lookups: list[tuple[int, int]] = []
    surroundings = ScorerContext(
        lambda model: pytest.fail(f"{model} is asked"),
        device="cpu",
        cache_entries=100,
        on_lookup=lambda *found: lookups.append(found),
    )
    async with AsyncExitStack() as stack:
        scorers = await make_scorers(specs, surroundings, stack)
        first, again, _ = [await scorers[name].score(PROMPT, candidates) for name in ("one", "one", "both")]
    assert again == replace(first, scored_tokens=0)
    assert lookups == [(0, 4), (4, 0), (4, 0)]


async def test_a_request_sent_again_has_the_same_rewards_and_reads_nothing_for_them() -> None:
    remembering = CachedScorer(ScriptedScorer({"dull": -1.0, "great fun": 2.0}), 10)
    served = BestOfN(ScriptedGenerator(["dull", "great fun"]), {remembering.name: remembering})
    async with client_of(app_over(served)) as client:
        first, again = [(await client.post("/v1/chat/completions", json=HELLO | {"best_of": 2})).json() for _ in "ab"]
    assert again["choices"] == first["choices"]
    assert (first["nbest"]["scored_tokens"], again["nbest"]["scored_tokens"]) == (3, 0)
