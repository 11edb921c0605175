"""What a row of the input becomes."""

from typing import Any

import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.stopping import AdaptiveN, Stopping
from server.config import Settings
from server.offline.custom_ids import CustomIds, LineSet
from server.offline.inputs import Row
from server.offline.records import Failure
from server.offline.tasks import SEED_STRIDE, BatchTasks, Kind, RerankTasks, Task, read_task

SETTINGS = Settings()
DRAWING = BatchTasks(SETTINGS, "policy", seed=5, defaults={"best_of": 6, "max_tokens": 9})
RERANKING = RerankTasks(SETTINGS)
HI = [{"role": "user", "content": "hi"}]


def read(row: Row, kind: Kind = DRAWING, line: int = 1, names: CustomIds | None = None) -> Task | Failure:
    return read_task(line, row, kind, names or CustomIds(), max_line_bytes=200)


def task(row: Row, kind: Kind = DRAWING, line: int = 1) -> Task:
    found = read(row, kind, line)
    assert isinstance(found, Task), found
    return found


def reason(row: Row, kind: Kind = DRAWING) -> str:
    found = read(row, kind)
    assert isinstance(found, Failure), found
    return found.reason


def test_the_forms_of_a_row_ask_for_the_same() -> None:
    own = task({"messages": HI, "custom_id": "a", "temperature": 0.5})
    batch_file = task(
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "policy", "messages": HI, "temperature": 0.5},
        }
    )
    line = task(b'{"messages": [{"role": "user", "content": "hi"}], "custom_id": "a", "temperature": 0.5}\n')
    assert own == batch_file == line
    assert own.request.prompt == Prompt(messages=(Message("user", "hi"),))
    assert own.request.sampling.temperature == 0.5


def test_what_a_row_leaves_open_comes_from_the_run() -> None:
    left_open, said = task({"prompt": "p"}).request, task({"prompt": "p", "best_of": 2, "max_tokens": 3}).request
    assert (left_open.best_of, left_open.sampling.max_tokens) == (6, 9)
    assert (said.best_of, said.sampling.max_tokens) == (2, 3)
    assert task({"messages": HI, "max_completion_tokens": 4}).request.sampling.max_tokens == 4


def test_a_run_keeps_the_likelihood_of_every_candidate() -> None:
    asked = task({"prompt": "p"})
    assert asked.request.sampling.likelihood
    assert set(asked.sampling) == {"max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"}


def test_a_row_can_have_a_stopping_policy() -> None:
    row = {"prompt": "p", "nbest": {"stopping": {"policy": "adaptive", "price": 0.5}}}
    assert task(row).request.stopping == Stopping("adaptive", waves=AdaptiveN(6, price=0.5))


def test_a_line_has_a_seed_of_its_own_unless_it_says_one() -> None:
    assert task({"prompt": "p"}).request.sampling.seed == 5
    assert task({"prompt": "p"}, line=3).request.sampling.seed == 5 + 2 * SEED_STRIDE == 131077
    assert task({"prompt": "p", "seed": 8}, line=3).request.sampling.seed == 8


def test_an_empty_cell_of_a_table_is_left_open() -> None:
    assert task({"prompt": "p", "messages": None, "best_of": None}).request.best_of == 6


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{", "The line is not valid JSON"),
        (b"[]", "The line is not a JSON object"),
        (b'{"prompt": "' + b"x" * 200 + b'"}', "The line is over 200 bytes; shorten it"),
        ({"prompt": "p", "messages": HI}, "Give either messages or prompt"),
        ({}, "Give either messages or prompt"),
        ({"prompt": "p", "tempature": 1}, "tempature is not a field of this request"),
        ({"prompt": "p", "temperature": 3}, "temperature: input should be less than or equal to 2."),
        ({"prompt": "p", "best_of": 65}, "best_of is over the 64 candidates"),
        ({"prompt": "p", "stream": True}, "Nothing is streamed offline"),
        ({"prompt": "p", "logprobs": 1}, "Results tell no token's log-probability"),
        ({"prompt": "p", "model": "other"}, "The model 'other' is not the one here, policy."),
        ({"prompt": "p", "candidates": ["a"]}, "use nbest rerank"),
        ({"prompt": "p", "custom_id": 7}, "custom_id: give a string"),
        ({"url": "/v1/embeddings", "body": {}}, "url: give /v1/chat/completions or /v1/completions."),
        ({"url": "/v1/completions", "method": "GET", "body": {}}, "method: only POST"),
        ({"url": "/v1/completions", "body": []}, "body: give an object"),
        ({"url": "/v1/completions", "body": {"prompt": "p"}, "prompt": "q"}, "prompt is not a field of a batch file's"),
    ],
)
def test_a_bad_row_is_told_in_a_sentence(row: Row, told: str) -> None:
    assert reason(row).startswith(told) or told in reason(row)


def test_a_name_is_given_once_and_a_line_without_one_is_called_by_its_number() -> None:
    names = CustomIds()
    found = [
        read({"prompt": "p", **given}, line=line, names=names)
        for line, given in enumerate([{"custom_id": "a"}, {}, {"custom_id": "a"}, {"custom_id": "2"}], start=1)
    ]
    assert [one.custom_id for one in found] == ["a", "2", "a", "2"]
    assert [isinstance(one, Failure) for one in found] == [False, False, True, True]
    assert "custom_id a was given before" in str(found[2])


def test_a_number_that_was_given_as_a_name_is_no_other_lines() -> None:
    names = CustomIds()
    assert names.take("2", line=1)
    assert not names.take(None, line=2)
    assert names.take("02", line=3)


def test_a_set_of_lines_holds_what_was_added_and_nothing_else() -> None:
    lines = LineSet()
    for line in (1, 8, 9, 64, 9):
        lines.add(line)
    assert [line for line in range(200) if line in lines] == [1, 8, 9, 64]
    assert len(lines) == 4


def test_given_candidates_are_texts_or_what_results_tell_of_them() -> None:
    told = {
        "index": 1,
        "text": "b",
        "reward": 3.0,
        "cumulative_logprob": -4.0,
        "finish_reason": "length",
        "num_tokens": 2,
    }
    given = task({"prompt": "p", "candidates": ["a", told]}, RERANKING).given
    assert given == (
        Candidate(0, "a", num_tokens=0, finish_reason="stop"),
        Candidate(1, "b", num_tokens=2, cumulative_logprob=-4.0, finish_reason="length"),
    )


def test_a_line_of_results_can_be_ranked_again_and_keeps_its_origin() -> None:
    line: dict[str, Any] = {
        "custom_id": "a", "line": 7, "prompt": "p", "winner": {}, "candidates": [{"text": "a", "reward": None}],
        "best_of": 1, "failed": 0, "model": "policy", "reward_model": "old", "strategy": "argmax",
        "ranked_by": "reward", "sampling": {"max_tokens": 9}, "seed": 3, "prompt_tokens": 1, "generated_tokens": 1,
        "scored_tokens": 1,
    }  # fmt: skip
    again = task(line, RERANKING)
    assert (again.model, again.sampling, again.request.sampling.seed) == ("policy", {"max_tokens": 9}, 3)
    assert again.request.reward_model is None
    assert (again.custom_id, again.line) == ("a", 1)


def test_a_row_to_rerank_chooses_its_strategy_and_its_reward_model() -> None:
    row = {"messages": HI, "candidates": ["a"], "nbest": {"strategy": "soft"}, "reward_model": "mine"}
    request = task(row, RERANKING).request
    assert (request.strategy, request.reward_model, request.best_of) == ("soft", "mine", 1)
    batch_file = {"url": "/v1/score", "body": {"messages": HI, "candidates": ["a"], "reward_model": "mine"}}
    assert task(batch_file, RERANKING).request.reward_model == "mine"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "candidates is required."),
        ({"prompt": "p", "candidates": []}, "candidates: list should have at least 1 item"),
        ({"prompt": "p", "candidates": [1]}, "candidates[0]: input should be a valid string"),
        ({"prompt": "p", "candidates": [{"txt": "a"}]}, "text is required."),
        ({"prompt": "p", "messages": HI, "candidates": ["a"]}, "Give either messages or prompt"),
        ({"prompt": "p", "candidates": ["a"], "nbest": {"stopping": {"policy": "adaptive"}}}, "none can be spared"),
    ],
)
def test_bad_candidates_are_told_in_a_sentence(row: Row, told: str) -> None:
    assert told in reason(row, RERANKING)
