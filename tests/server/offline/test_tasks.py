"""Rows of the input become tasks, or failures that say what is wrong with them."""

from typing import Any

import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.stopping import AdaptiveN, Stopping
from server.config import Settings
from server.offline.custom_ids import CustomIds, LineSet
from server.offline.inputs import Row
from server.offline.records import Failure
from server.offline.tasks import SEED_STRIDE, BatchTaskParser, RerankTaskParser, Task, TaskParser, read_task

SETTINGS = Settings()
BATCH = BatchTaskParser(SETTINGS, "policy", seed=5, defaults={"best_of": 6, "max_tokens": 9})
RERANK = RerankTaskParser(SETTINGS)
HI = [{"role": "user", "content": "hi"}]


def read(row: Row, parser: TaskParser = BATCH, line: int = 1, custom_ids: CustomIds | None = None) -> Task | Failure:
    return read_task(line, row, parser, custom_ids or CustomIds(), max_line_bytes=200)


def task(row: Row, parser: TaskParser = BATCH, line: int = 1) -> Task:
    parsed = read(row, parser, line)
    assert isinstance(parsed, Task), parsed
    return parsed


def reason(row: Row, parser: TaskParser = BATCH) -> str:
    parsed = read(row, parser)
    assert isinstance(parsed, Failure), parsed
    return parsed.reason


def test_all_forms_of_a_row_give_the_same_task() -> None:
    own_form = task({"messages": HI, "custom_id": "a", "temperature": 0.5})
    batch_file = task(
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "policy", "messages": HI, "temperature": 0.5},
        }
    )
    line = task(b'{"messages": [{"role": "user", "content": "hi"}], "custom_id": "a", "temperature": 0.5}\n')
    assert own_form == batch_file == line
    assert own_form.request.prompt == Prompt(messages=(Message("user", "hi"),))
    assert own_form.request.sampling.temperature == 0.5


def test_fields_that_a_row_leaves_out_come_from_the_run() -> None:
    without = task({"prompt": "p"}).request
    given = task({"prompt": "p", "best_of": 2, "max_tokens": 3}).request
    assert (without.best_of, without.sampling.max_tokens) == (6, 9)
    assert (given.best_of, given.sampling.max_tokens) == (2, 3)
    assert task({"messages": HI, "max_completion_tokens": 4}).request.sampling.max_tokens == 4


def test_the_likelihood_of_every_candidate_is_kept() -> None:
    parsed = task({"prompt": "p"})
    assert parsed.request.sampling.likelihood
    assert set(parsed.sampling) == {"max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"}


def test_a_row_can_have_a_stopping_policy() -> None:
    row = {"prompt": "p", "nbest": {"stopping": {"policy": "adaptive", "price": 0.5}}}
    assert task(row).request.stopping == Stopping("adaptive", waves=AdaptiveN(6, price=0.5))


def test_a_line_without_a_seed_gets_one_from_its_number() -> None:
    assert task({"prompt": "p"}).request.sampling.seed == 5
    assert task({"prompt": "p"}, line=3).request.sampling.seed == 5 + 2 * SEED_STRIDE == 131077
    assert task({"prompt": "p", "seed": 8}, line=3).request.sampling.seed == 8


def test_an_empty_cell_of_a_table_is_a_missing_field() -> None:
    assert task({"prompt": "p", "messages": None, "best_of": None}).request.best_of == 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "The line is not valid JSON"),
        (b"[]", "The line is not a JSON object"),
        (b'{"prompt": "' + b"x" * 200 + b'"}', "The line is over 200 bytes; shorten it"),
        ({"prompt": "p", "messages": HI}, "Give exactly one of messages and prompt."),
        ({}, "Give exactly one of messages and prompt."),
        ({"prompt": "p", "tempature": 1}, "tempature is not a field of this request"),
        ({"prompt": "p", "temperature": 3}, "temperature: input should be less than or equal to 2."),
        ({"prompt": "p", "best_of": 65}, "best_of is over the 64 candidates"),
        ({"prompt": "p", "stream": True}, "Offline runs do not stream"),
        ({"prompt": "p", "logprobs": 1}, "Results hold no log-probabilities of tokens"),
        ({"prompt": "p", "model": "other"}, "The model 'other' is not the model of this run, policy."),
        ({"prompt": "p", "candidates": ["a"]}, "use nbest rerank"),
        ({"prompt": "p", "custom_id": 7}, "custom_id: give a string"),
        ({"url": "/v1/embeddings", "body": {}}, "url: give /v1/chat/completions or /v1/completions."),
        ({"url": "/v1/completions", "method": "GET", "body": {}}, "method: only POST"),
        ({"url": "/v1/completions", "body": []}, "body: give an object"),
        ({"url": "/v1/completions", "body": {"prompt": "p"}, "prompt": "q"}, "prompt is not a field of a batch file's"),
    ],
)
def test_an_invalid_row_fails_with_a_sentence(row: Row, message: str) -> None:
    assert message in reason(row)


def test_a_custom_id_may_occur_once_and_a_line_without_one_is_named_by_its_number() -> None:
    custom_ids = CustomIds()
    rows = [
        read({"prompt": "p", **fields}, line=line, custom_ids=custom_ids)
        for line, fields in enumerate([{"custom_id": "a"}, {}, {"custom_id": "a"}, {"custom_id": "2"}], start=1)
    ]
    assert [row.custom_id for row in rows] == ["a", "2", "a", "2"]
    assert [isinstance(row, Failure) for row in rows] == [False, False, True, True]
    assert "The custom_id a is that of an earlier line" in str(rows[2])


def test_a_number_that_is_an_earlier_custom_id_cannot_name_a_line() -> None:
    custom_ids = CustomIds()
    assert custom_ids.claim("2", line=1)
    assert not custom_ids.claim(None, line=2)
    assert custom_ids.claim("02", line=3)


def test_a_number_with_other_digits_is_another_custom_id() -> None:
    custom_ids = CustomIds()
    assert custom_ids.claim(None, line=1)
    assert not custom_ids.claim("1", line=2)
    assert custom_ids.claim("01", line=3)
    assert custom_ids.claim("١", line=4)  # noqa: RUF001 (ARABIC-INDIC DIGIT ONE)
    assert custom_ids.claim("1" * 5000, line=5)  # int() refuses more than 4,300 digits


def test_a_line_set_contains_exactly_the_added_lines() -> None:
    lines = LineSet()
    for line in (1, 8, 9, 64, 9):
        lines.add(line)
    assert [line for line in range(200) if line in lines] == [1, 8, 9, 64]
    assert len(lines) == 4


def test_given_candidates_are_texts_or_objects_as_in_results() -> None:
    detailed = {
        "index": 1,
        "text": "b",
        "reward": 3.0,
        "cumulative_logprob": -4.0,
        "finish_reason": "length",
        "num_tokens": 2,
    }
    candidates = task({"prompt": "p", "candidates": ["a", detailed]}, RERANK).candidates
    assert candidates == (
        Candidate(0, "a", num_tokens=0, finish_reason="stop"),
        Candidate(1, "b", num_tokens=2, cumulative_logprob=-4.0, finish_reason="length"),
    )


def test_a_line_of_results_can_be_reranked_and_keeps_its_origin() -> None:
    line: dict[str, Any] = {
        "custom_id": "a", "line": 7, "prompt": "p", "winner": {}, "candidates": [{"text": "a", "reward": None}],
        "best_of": 1, "failed": 0, "model": "policy", "reward_model": "old", "strategy": "argmax",
        "ranked_by": "reward", "sampling": {"max_tokens": 9}, "seed": 3, "prompt_tokens": 1, "generated_tokens": 1,
        "scored_tokens": 1,
    }  # fmt: skip
    reranked = task(line, RERANK)
    assert (reranked.model, reranked.sampling, reranked.request.sampling.seed) == ("policy", {"max_tokens": 9}, 3)
    assert reranked.request.reward_model is None
    assert (reranked.custom_id, reranked.line) == ("a", 1)


def test_a_row_to_rerank_chooses_its_strategy_and_its_reward_model() -> None:
    row = {"messages": HI, "candidates": ["a"], "nbest": {"strategy": "soft"}, "reward_model": "mine"}
    request = task(row, RERANK).request
    assert (request.strategy, request.reward_model, request.best_of) == ("soft", "mine", 1)
    batch_file = {"url": "/v1/score", "body": {"messages": HI, "candidates": ["a"], "reward_model": "mine"}}
    assert task(batch_file, RERANK).request.reward_model == "mine"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "candidates is required."),
        ({"prompt": "p", "candidates": []}, "candidates: list should have at least 1 item"),
        ({"prompt": "p", "candidates": [1]}, "candidates[0]: input should be a valid string"),
        ({"prompt": "p", "candidates": [{"txt": "a"}]}, "text is required."),
        ({"prompt": "p", "messages": HI, "candidates": ["a"]}, "Give exactly one of messages and prompt."),
        (
            {"prompt": "p", "candidates": ["a"], "nbest": {"stopping": {"policy": "adaptive"}}},
            "a stopping policy saves nothing",
        ),
    ],
)
def test_invalid_candidates_fail_with_a_sentence(row: Row, message: str) -> None:
    assert message in reason(row, RERANK)
