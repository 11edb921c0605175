"""The cache of rewards in front of a scorer."""

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


def candidates_of(*texts: str) -> list[Candidate]:
    return [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]


async def test_only_uncached_candidates_are_scored() -> None:
    scorer = ScriptedScorer({"a": 1, "b": 2, "c": 3})
    cached = CachedScorer(scorer, 10)
    assert (await cached.score(PROMPT, candidates_of("a", "b"))).rewards_N == (1.0, 2.0)
    again = await cached.score(PROMPT, candidates_of("b", "c", "a"))
    assert again.rewards_N == (2.0, 3.0, 1.0)
    assert again.scored_tokens == 1
    known = await cached.score(PROMPT, candidates_of("c"))
    assert (known.rewards_N, known.scored_tokens) == ((3,), 0)
    assert scorer.groups == [2, 1]


async def test_the_same_text_for_another_prompt_is_scored_again() -> None:
    scorer = ScriptedScorer({"a": 1})
    cached = CachedScorer(scorer, 10)
    for prompt in (PROMPT, Prompt(text="It is"), Prompt(messages=(Message("user", "It was"),))):
        await cached.score(prompt, candidates_of("a"))
    assert scorer.groups == [1, 1, 1]


async def test_the_least_recently_used_reward_is_evicted() -> None:
    scorer = ScriptedScorer()
    cached = CachedScorer(scorer, 2)
    await cached.score(PROMPT, candidates_of("a", "b"))
    await cached.score(PROMPT, candidates_of("a"))
    await cached.score(PROMPT, candidates_of("c"))
    await cached.score(PROMPT, candidates_of("a", "b"))
    assert scorer.groups == [2, 1, 1]


async def test_a_failure_and_a_missing_reward_are_not_cached() -> None:
    scorer = ScriptedScorer({"a": math.nan})
    cached = CachedScorer(scorer, 10)
    scorer.fails = True
    with pytest.raises(ScoringError):
        await cached.score(PROMPT, candidates_of("a"))
    scorer.fails = False
    assert math.isnan((await cached.score(PROMPT, candidates_of("a"))).rewards_N[0])
    scorer.rewards = {"a": 5.0}
    assert (await cached.score(PROMPT, candidates_of("a"))).rewards_N == (5.0,)


async def test_equal_texts_in_a_call_are_scored_once() -> None:
    scorer = ScriptedScorer({"a": 1, "b": 2})
    scores = await CachedScorer(scorer, 10).score(PROMPT, candidates_of("a", "b", "a"))
    assert (scores.rewards_N, scorer.groups) == ((1, 2, 1), [2])


async def test_rewards_of_a_call_with_a_cut_prompt_are_not_cached() -> None:
    class Cutting(ScriptedScorer):
        async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
            cut = max(3 if candidate.text == "long" else 0 for candidate in candidates)
            return replace(await super().score(prompt, candidates), prompt_tokens_cut=cut)

    cached = CachedScorer(Cutting(), 10)
    calls = [candidates_of("long", "a"), candidates_of("a"), candidates_of("long")]
    assert [(await cached.score(PROMPT, candidates)).prompt_tokens_cut for candidates in calls] == [3, 0, 3]


async def test_a_call_with_more_texts_than_entries_returns_all_rewards() -> None:
    scores = await CachedScorer(ScriptedScorer({"a": 1, "b": 2, "c": 3}), 1).score(
        PROMPT, candidates_of("a", "b", "c", "a")
    )
    assert scores.rewards_N == (1, 2, 3, 1)


def test_the_digest_separates_prompt_and_text() -> None:
    first, second = (Prompt(messages=(Message("user", text),)) for text in ("ab", "a"))
    assert digest(first, "c") != digest(second, "bc")
    assert digest(Prompt(text=""), "x") != digest(first, "x")


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_only_rewards_of_prompt_and_text_alone_are_cacheable(text: str, expected: bool) -> None:
    assert is_cacheable(parse(text)) is expected


async def test_a_cached_reward_model_gives_the_same_rewards_also_as_a_member(tmp_path: Path) -> None:
    specs = {"model": str(save_tiny_reward_model(tmp_path)), "policy": "logprob", "both": "ensemble:min:model,policy"}
    candidates = [
        replace(candidate, cumulative_logprob=-1.0)
        for candidate in candidates_of("great fun", "dull", "great fun", "a film")
    ]
    lookups: list[tuple[int, int]] = []
    context = ScorerContext(
        lambda model: pytest.fail(f"the judge {model} was requested"),
        device="cpu",
        cache_entries=100,
        on_lookup=lambda hits, misses: lookups.append((hits, misses)),
    )
    async with AsyncExitStack() as stack:
        scorers = await make_scorers(specs, context, stack)
        first, again, _ = [await scorers[name].score(PROMPT, candidates) for name in ("model", "model", "both")]
    assert again == replace(first, scored_tokens=0)
    assert lookups == [(0, 4), (4, 0), (4, 0)]


async def test_a_repeated_request_has_the_same_rewards_and_scores_no_tokens() -> None:
    cached = CachedScorer(ScriptedScorer({"dull": -1.0, "great fun": 2.0}), 10)
    served = BestOfN(ScriptedGenerator(["dull", "great fun"]), {cached.name: cached})
    async with client_of(app_over(served)) as client:
        first, again = [(await client.post("/v1/chat/completions", json=HELLO | {"best_of": 2})).json() for _ in "ab"]
    assert again["choices"] == first["choices"]
    assert (first["nbest"]["scored_tokens"], again["nbest"]["scored_tokens"]) == (3, 0)
