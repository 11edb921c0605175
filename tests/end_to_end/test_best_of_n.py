"""Best-of-N through the official client, with the real engine and the real reward model."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.end_to_end.served import Served
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

MODEL = "smollm2-135m-instruct"
OPENING = "This film is"
FILM: list[Any] = [{"role": "user", "content": "Write one sentence about a film you saw."}]


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """One completion of the opening, with every candidate in the reply."""
    extension = {"best_of": fields.pop("best_of", 8), "nbest": {"return_candidates": True, **fields.pop("nbest", {})}}
    fields = {"max_tokens": 12, **fields}
    return client.completions.create(model=MODEL, prompt=OPENING, extra_body=extension, **fields)


def texts_by_index(reply: Any) -> dict[int, str]:
    return {candidate["index"]: candidate["text"] for candidate in reply.nbest["candidates"]}


def rewards_by_index(reply: Any) -> dict[int, float]:
    return {candidate["index"]: candidate["reward"] for candidate in reply.nbest["candidates"]}


def test_the_winner_has_the_largest_reward(client: openai.OpenAI) -> None:
    reply = complete(client, n=3)
    candidates = reply.nbest["candidates"]
    rewards = sorted((candidate["reward"] for candidate in candidates), reverse=True)
    assert len(candidates) == 8
    assert len(set(rewards)) > 1, "all eight candidates have the same reward"
    assert [choice.reward for choice in reply.choices] == rewards[:3]
    best = max(candidates, key=lambda candidate: candidate["reward"])
    assert reply.choices[0].text == best["text"]
    assert reply.choices[0].index == 0
    assert [candidates[index]["reward"] for index in reply.nbest["ranking"]] == rewards


def test_usage_is_the_sum_over_all_candidates(client: openai.OpenAI) -> None:
    reply = complete(client)
    generated = sum(candidate["num_tokens"] for candidate in reply.nbest["candidates"])
    assert reply.usage.completion_tokens == generated == reply.nbest["generated_tokens"]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + generated
    assert (reply.nbest["completed"], reply.nbest["failed"], reply.nbest["cancelled"]) == (8, 0, 0)


def test_the_same_seed_gives_the_same_candidates(client: openai.OpenAI) -> None:
    first, again, other = (texts_by_index(complete(client, seed=seed)) for seed in (7, 7, 1007))
    assert first == again != other


def test_candidate_i_has_seed_plus_i(client: openai.OpenAI) -> None:
    texts = texts_by_index(complete(client, seed=50, best_of=4))
    assert texts[2] == complete(client, seed=52, best_of=1).choices[0].text


def test_streamed_candidates_equal_those_of_the_unstreamed_reply(client: openai.OpenAI) -> None:
    chunks = client.completions.create(
        model=MODEL,
        prompt=OPENING,
        max_tokens=12,
        seed=7,
        stream=True,
        extra_body={"best_of": 8, "nbest": {"stream_candidates": True}},
    )
    events: list[Any] = [chunk.model_extra and chunk.model_extra["nbest"] for chunk in chunks if not chunk.choices]
    texts = {event["index"]: event["text"] for event in events if event["event"] == "finished"}
    rewards = {event["index"]: event["reward"] for event in events if event["event"] == "scored"}
    reply = complete(client, seed=7)
    assert texts == texts_by_index(reply)
    assert rewards == pytest.approx(rewards_by_index(reply), abs=1e-4)


def test_an_adaptive_policy_samples_the_first_of_the_same_candidates(client: openai.OpenAI) -> None:
    """Every reward reaches the target, so only one wave of two is sampled."""
    stopping = {"policy": "adaptive", "target_reward": -1e6, "wave": 2}
    plain = complete(client, seed=60)
    stopped = complete(client, seed=60, nbest={"stopping": stopping})
    sampled, expected = (
        [(candidate["index"], candidate["text"], candidate["num_tokens"]) for candidate in reply.nbest["candidates"]]
        for reply in (stopped, plain)
    )
    assert sampled == expected[:2]
    assert (stopped.nbest["completed"], stopped.nbest["not_drawn"]) == (2, 6)
    assert stopped.nbest["stopped_by"] == "adaptive"
    assert stopped.usage.completion_tokens == sum(num_tokens for _, _, num_tokens in sampled)


def test_waves_continue_the_seeds(client: openai.OpenAI) -> None:
    stopping = {"policy": "adaptive", "target_reward": 1e6, "wave": 3}
    in_waves = complete(client, seed=60, nbest={"stopping": stopping})
    texts = [candidate["text"] for candidate in complete(client, seed=60).nbest["candidates"]]
    assert [candidate["text"] for candidate in in_waves.nbest["candidates"]] == texts
    assert (in_waves.nbest["completed"], in_waves.nbest["stopped_by"]) == (8, "all")


def test_rejected_candidates_are_stopped_in_the_engine(client: openai.OpenAI, served: Served) -> None:
    cancelled_before = served.generator.cancelled_total
    stopping = {"policy": "speculative_rejection", "checkpoints": [4, 16], "reject_share": 0.5}
    reply = complete(client, seed=60, max_tokens=48, nbest={"stopping": stopping})
    nbest = reply.nbest
    assert nbest["cancelled"] >= 4  # half of 8 and half of 4, less those that had already ended
    assert nbest["completed"] + nbest["cancelled"] == 8
    assert nbest["stopped_by"] == "speculative_rejection"
    # A candidate that ends while its beginning is scored counts as cancelled too, but the engine has nothing to stop.
    assert 0 < served.generator.cancelled_total - cancelled_before <= nbest["cancelled"]
    completed_tokens = sum(candidate["num_tokens"] for candidate in nbest["candidates"])
    assert completed_tokens < reply.usage.completion_tokens < 8 * 48
    assert eventually(lambda: served.generator.unfinished == 0, 5)


def test_the_score_endpoint_gives_the_same_rewards(client: openai.OpenAI, served: Served) -> None:
    candidates = complete(client).nbest["candidates"]
    body = {"prompt": OPENING, "candidates": [candidate["text"] for candidate in candidates]}
    scores = httpx.post(f"{served.url}/v1/score", json=body, timeout=60).json()["data"]
    rewards = [candidate["reward"] for candidate in candidates]
    assert [score["score"] for score in scores] == pytest.approx(rewards, abs=1e-4)


def test_the_reward_model_prefers_praise(served: Served) -> None:
    praise, blame = "a wonderful, moving film with superb acting.", "a dull, badly acted film and a waste of time."
    body = {"prompt": "It was", "candidates": [f" {blame}", f" {praise}"]}
    blame_score, praise_score = httpx.post(f"{served.url}/v1/score", json=body, timeout=60).json()["data"]
    assert praise_score["score"] > blame_score["score"] + 1


def test_chat_uses_the_chat_template(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    reply = client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=10)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"


def test_one_candidate_is_streamed_token_by_token(client: openai.OpenAI) -> None:
    extension = {"best_of": 1}
    plain = client.chat.completions.create(model=MODEL, messages=FILM, seed=3, max_tokens=12, extra_body=extension)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=FILM, seed=3, max_tokens=12, stream=True, extra_body=extension
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == plain.choices[0].message.content
    last: Any = next(chunk for chunk in reversed(chunks) if chunk.choices)
    assert last.choices[0].finish_reason == plain.choices[0].finish_reason
    assert last.nbest["completed"] == 1


def test_the_winner_of_several_is_streamed_once_chosen(client: openai.OpenAI) -> None:
    chunks: list[Any] = list(
        client.completions.create(
            model=MODEL,
            prompt=OPENING,
            max_tokens=12,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"best_of": 8},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    reply = complete(client, seed=11)
    assert text == reply.choices[0].text
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens


def test_stop_and_logprobs_are_honoured(client: openai.OpenAI) -> None:
    reply = complete(client, best_of=2, max_tokens=40, stop=["."], logprobs=2)
    assert all("." not in candidate["text"] for candidate in reply.nbest["candidates"])
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) > 0
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_a_disconnect_cancels_candidates_in_the_engine(served: Served) -> None:
    before = served.generator.cancelled_total
    body = {"model": MODEL, "prompt": OPENING, "best_of": 8, "max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body, timeout=2)
    # 900 tokens take the engine most of a minute; it is idle within seconds only if the candidates were aborted.
    assert eventually(lambda: served.generator.cancelled_total == before + 8, 5)
    assert eventually(lambda: served.generator.unfinished == 0, 5)
    assert eventually(lambda: served.generator.load.running == 0, 5)
    assert served.metric("nbest_candidates_in_flight") == 0


def test_a_disconnect_during_a_stream_cancels_too(served: Served) -> None:
    before = served.generator.cancelled_total
    body = {"model": MODEL, "prompt": OPENING, "best_of": 1, "max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
    assert eventually(lambda: served.generator.cancelled_total == before + 1, 5)


def test_a_deadline_before_any_candidate_finishes_is_a_504(client: openai.OpenAI, served: Served) -> None:
    """No candidate finishes 900 tokens in half a second; the engine is idle afterwards."""
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, best_of=4, max_tokens=900, logit_bias={"2": -100, "0": -100}, nbest={"deadline_s": 0.5})
    assert caught.value.status_code == 504
    assert eventually(lambda: served.generator.unfinished == 0, 5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param('{"model": ', 400, "JSON", id="malformed JSON"),
        pytest.param({"prompt": 5}, 400, "prompt", id="wrong type"),
        pytest.param({"best_of": 0}, 400, "best_of", id="best_of 0"),
        pytest.param({"best_of": 33}, 400, "32", id="best_of above the limit"),
        pytest.param({"n": 3, "best_of": 2}, 400, "n", id="n above best_of"),
        pytest.param({"prompt": "word " * 2000}, 400, "1024", id="longer than the context"),
        pytest.param({"nbest": {"reward_model": "taste"}}, 400, "movie-sentiment", id="unknown reward model"),
        pytest.param({"colour": "red"}, 400, "colour", id="unknown field"),
        pytest.param(f'{{"model": "{MODEL}", "prompt": "a", "temperature": NaN}}', 400, "JSON", id="NaN temperature"),
        pytest.param({"model": "gpt-9"}, 404, MODEL, id="unknown model"),
        pytest.param({"prompt": "x" * 10_000_000}, 413, "", id="a body of 10 MB"),
    ],
)
def test_bad_input_is_refused_and_the_next_request_works(
    served: Served, client: openai.OpenAI, body: Any, status: int, message: str
) -> None:
    content = body if isinstance(body, str) else json.dumps({"model": MODEL, "prompt": OPENING, **body})
    refused = httpx.post(f"{served.url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]
    assert complete(client, best_of=1, max_tokens=1).choices[0].finish_reason == "length"
