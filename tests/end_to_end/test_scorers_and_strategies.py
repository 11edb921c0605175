"""Scorers other than the reward model, and strategies other than argmax, with the real engine."""

import re
import statistics
from typing import Any

import openai
import pytest

from tests.end_to_end.test_best_of_n import complete

pytestmark = pytest.mark.engine


def test_the_logprob_reward_is_the_mean_logprob_per_token(client: openai.OpenAI) -> None:
    reply = complete(client, best_of=4, nbest={"reward_model": "likely"})
    candidates = reply.nbest["candidates"]
    means = [candidate["cumulative_logprob"] / candidate["num_tokens"] for candidate in candidates]
    assert [candidate["reward"] for candidate in candidates] == pytest.approx(means)
    assert reply.choices[0].reward == pytest.approx(max(means))
    assert reply.nbest["scored_tokens"] == 0
    without_candidates = complete(client, best_of=4, nbest={"reward_model": "likely", "return_candidates": False})
    assert without_candidates.choices[0].reward < 0


def test_self_certainty_gets_the_logprobs_it_needs_and_the_reply_omits_them(client: openai.OpenAI) -> None:
    reply = complete(client, best_of=4, nbest={"reward_model": "certain"})
    rewards = [candidate["reward"] for candidate in reply.nbest["candidates"]]
    assert reply.choices[0].reward == max(rewards)
    assert len(set(rewards)) > 1
    assert reply.choices[0].logprobs is None


def test_the_policy_can_be_its_own_judge(client: openai.OpenAI) -> None:
    """A small model is a poor judge; structured output makes its answers valid grades."""
    reply = complete(client, best_of=2, nbest={"reward_model": "judge"})
    assert all(1 <= candidate["reward"] <= 10 for candidate in reply.nbest["candidates"])
    assert reply.nbest["scored_tokens"] > 0


def test_majority_selects_the_most_frequent_answer_without_a_reward_model(client: openai.OpenAI) -> None:
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
    texts = [candidate["text"] for candidate in reply.nbest["candidates"]]
    answers = [numbers[0] for text in texts if (numbers := re.findall("[0-9]+", text))]
    assert re.findall("[0-9]+", reply.choices[0].message.content)[0] == statistics.mode(answers)


def test_greedy_blocks_equal_the_greedy_answer(client: openai.OpenAI) -> None:
    """Each block continues the previous one token by token, so greedy blocks join to the unblocked greedy answer."""
    whole = complete(client, best_of=1, max_tokens=30, temperature=0)
    blocks = complete(
        client, best_of=2, max_tokens=30, temperature=0, nbest={"strategy": "blockwise", "block_tokens": 7}
    )
    assert blocks.choices[0].text == whole.choices[0].text
    assert blocks.nbest["blocks"] == 5
    assert blocks.usage.prompt_tokens == whole.usage.prompt_tokens
    assert blocks.usage.completion_tokens == 2 * 30
    prompt_tokens, answer_tokens = blocks.usage.prompt_tokens, 30
    # No block is scored twice, except for up to 4 tokens that close each of the 5 blocks of both candidates.
    assert blocks.nbest["scored_tokens"] <= prompt_tokens + 2 * answer_tokens + 5 * 2 * 4
    logprob, expected = (reply.nbest["candidates"][0]["cumulative_logprob"] for reply in (blocks, whole))
    assert logprob == pytest.approx(expected, abs=0.05)


def test_a_stream_contains_every_block_when_it_is_chosen(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "seed": 5,
        "best_of": 4,
        "max_tokens": 24,
        "nbest": {"strategy": "blockwise", "block_tokens": 8},
    }
    whole = complete(client, **fields)
    chunks = list(complete(client, stream=True, **fields))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len([piece for piece in pieces if piece]) == whole.nbest["blocks"] == 3
    assert "".join(pieces) == whole.choices[0].text
    assert chunks[-1].choices[0].reward == pytest.approx(whole.choices[0].reward, abs=1e-3)
