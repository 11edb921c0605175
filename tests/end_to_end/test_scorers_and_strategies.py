"""Scorers beside the reward model, and the other strategies, on the real engine."""

import re
import statistics
from typing import Any

import openai
import pytest

from tests.end_to_end.test_best_of_n import complete

pytestmark = pytest.mark.engine


def test_logprob_prefers_what_the_policy_finds_likeliest(client: openai.OpenAI) -> None:
    reply = complete(client, best_of=4, nbest={"reward_model": "likely"})
    means = [one["cumulative_logprob"] / one["num_tokens"] for one in reply.nbest["candidates"]]
    assert [one["reward"] for one in reply.nbest["candidates"]] == pytest.approx(means)
    assert reply.choices[0].reward == pytest.approx(max(means))
    assert reply.nbest["scored_tokens"] == 0
    untold = complete(client, best_of=4, nbest={"reward_model": "likely", "return_candidates": False})
    assert untold.choices[0].reward < 0


def test_self_certainty_gets_the_logprobs_it_needs_and_keeps_them_to_itself(client: openai.OpenAI) -> None:
    reply = complete(client, best_of=4, nbest={"reward_model": "certain"})
    rewards = [one["reward"] for one in reply.nbest["candidates"]]
    assert reply.choices[0].reward == max(rewards)
    assert len(set(rewards)) > 1
    assert reply.choices[0].logprobs is None


def test_the_policy_can_be_its_own_judge(client: openai.OpenAI) -> None:
    """A small model is a poor judge; that its grades are grades is the structured output's doing."""
    reply = complete(client, best_of=2, nbest={"reward_model": "judge"})
    assert all(1 <= one["reward"] <= 10 for one in reply.nbest["candidates"])
    assert reply.nbest["scored_tokens"] > 0


def test_majority_elects_the_commonest_answer_without_a_reward_model(client: openai.OpenAI) -> None:
    extension = {
        "best_of": 5,
        "nbest": {"strategy": "majority", "selection": {"answer_regex": "([0-9]+)"}, "return_candidates": True},
    }
    reply: Any = client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "What is 2 + 2? Answer with one number."}],
        max_tokens=12,
        temperature=0.3,
        seed=1,
        extra_body=extension,
    )
    assert reply.nbest["ranked_by"] == "answer"
    assert reply.nbest["reward_model"] is None
    assert reply.choices[0].reward is None
    answers = [found[0] for one in reply.nbest["candidates"] if (found := re.findall("[0-9]+", one["text"]))]
    assert re.findall("[0-9]+", reply.choices[0].message.content)[0] == statistics.mode(answers)


def test_blocks_are_gone_on_from_token_by_token(client: openai.OpenAI) -> None:
    """Greedy, every block is what the whole would have had there."""
    whole = complete(client, best_of=1, max_tokens=30, temperature=0)
    blocks = complete(
        client, best_of=2, max_tokens=30, temperature=0, nbest={"strategy": "blockwise", "block_tokens": 7}
    )
    assert blocks.choices[0].text == whole.choices[0].text
    assert blocks.nbest["blocks"] == 5
    assert blocks.usage.prompt_tokens == whole.usage.prompt_tokens
    assert blocks.usage.completion_tokens == 2 * 30
    (prompt, text) = (blocks.usage.prompt_tokens, 30)
    assert blocks.nbest["scored_tokens"] <= prompt + 2 * text + 5 * 2 * 4  # no block anew but for how it was closed
    told, expected = (one.nbest["candidates"][0]["cumulative_logprob"] for one in (blocks, whole))
    assert told == pytest.approx(expected, abs=0.05)


def test_a_stream_brings_every_block_when_it_is_chosen(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "seed": 5,
        "best_of": 4,
        "max_tokens": 24,
        "nbest": {"strategy": "blockwise", "block_tokens": 8},
    }
    whole = complete(client, **asked)
    chunks = list(complete(client, stream=True, **asked))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len([piece for piece in pieces if piece]) == whole.nbest["blocks"] == 3
    assert "".join(pieces) == whole.choices[0].text
    assert chunks[-1].choices[0].reward == pytest.approx(whole.choices[0].reward, abs=1e-3)
