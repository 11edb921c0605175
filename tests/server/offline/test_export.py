"""From results to training data: which rows, in which columns, and what the card says of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.offline.errors import OfflineError
from server.offline.export import ExportOptions, run_export
from server.offline.filters import Filters
from server.offline.run_directory import locked

RUN = {
    "command": "batch",
    "source": "in.jsonl",
    "input": {"sha256": "abc", "rows": 3},
    "model": "policy",
    "reward_models": {"r": "movie-sentiment"},
    "seed": 7,
    "defaults": {"best_of": 3},
}


def result(line: int, rewards: list[float | None], texts: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    """A line of results.jsonl; the text of a candidate is as many letters as its reward unless it is given."""
    candidates = [
        {
            "index": index,
            "text": texts[index] if texts else f"{line}-{reward}",
            "reward": reward,
            "cumulative_logprob": None,
            "finish_reason": "stop",
            "num_tokens": 1,
        }
        for index, reward in enumerate(rewards)
    ]
    best = max(candidates, key=lambda one: -9 if one["reward"] is None else one["reward"])
    asked = {} if "messages" in fields else {"prompt": f"prompt {line}"}
    return {
        "custom_id": str(line),
        "line": line,
        **asked,
        "winner": best,
        "candidates": candidates,
        "best_of": len(rewards),
        "failed": 0,
        "model": "policy",
        "reward_model": "r",
        "strategy": "argmax",
        "ranked_by": "reward",
        "sampling": {},
        "seed": 1,
        "prompt_tokens": 1,
        "generated_tokens": 1,
        "scored_tokens": 1,
        **fields,
    }


def write_run(directory: Path, results: list[dict[str, Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"runs": [RUN]}))
    (directory / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in results))
    (directory / "failed.jsonl").write_text('{"custom_id": null, "line": 9, "reason": "bad", "param": null}\n')
    return directory


def exported(tmp_path: Path, results: list[dict[str, Any]], options: ExportOptions) -> list[dict[str, Any]]:
    out = tmp_path / "export.jsonl"
    run_export(write_run(tmp_path / "run", results), out, options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_sft_has_the_winners_in_the_order_of_the_input(tmp_path: Path) -> None:
    rows = exported(tmp_path, [result(2, [1, 3]), result(1, [5, 4])], ExportOptions("sft"))
    assert rows == [
        {"prompt": "prompt 1", "completion": "1-5", "finish_reason": "stop"},
        {"prompt": "prompt 2", "completion": "2-3", "finish_reason": "stop"},
    ]


def test_a_preference_is_the_best_against_the_worst(tmp_path: Path) -> None:
    (row,) = exported(tmp_path, [result(1, [2, 5, None, -1])], ExportOptions("preference"))
    assert row == {
        "prompt": "prompt 1",
        "chosen": "1-5",
        "rejected": "1--1",
        "chosen_score": 5,
        "rejected_score": -1,
        "margin": 6,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
    }


def test_the_best_against_a_random_one_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    results = [result(line, [0, 1, 2, 3, 9]) for line in range(1, 31)]
    drawn = [
        [
            row["rejected_score"]
            for row in exported(tmp_path, results, ExportOptions("preference", "best-random", seed=s))
        ]
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {0, 1, 2, 3}


def test_all_pairs_are_those_above_the_margin(tmp_path: Path) -> None:
    options = ExportOptions("preference", "all", filters=Filters(min_margin=2))
    rows = exported(tmp_path, [result(1, [0, 1, 3])], options)
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(3, 1), (3, 0)]


@pytest.mark.parametrize(
    "one", [result(1, [2, 2]), result(1, [2]), result(1, [None, None]), result(1, [2, 1], ["same", "same"])]
)
def test_equal_rewards_and_equal_texts_are_no_preference(one: dict[str, Any], tmp_path: Path) -> None:
    rows = exported(tmp_path, [one, result(2, [1, 0])], ExportOptions("preference"))
    assert [row["prompt"] for row in rows] == ["prompt 2"]


def test_raw_has_every_candidate(tmp_path: Path) -> None:
    rows = exported(tmp_path, [result(1, [2, None])], ExportOptions("raw"))
    assert [(row["custom_id"], row["index"], row["reward"], row["is_winner"]) for row in rows] == [
        ("1", 0, 2, True),
        ("1", 1, None, False),
    ]


def test_conversations_and_texts_are_turned_into_each_other(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "hi"}]
    talk, text = result(1, [1], messages=asked), result(2, [2])
    (row,) = exported(tmp_path, [talk], ExportOptions("sft"))
    assert (row["prompt"], row["completion"]) == (asked, [{"role": "assistant", "content": "1-1"}])
    rows = exported(tmp_path, [talk, text], ExportOptions("sft", form="conversational"))
    assert [row["prompt"] for row in rows] == [asked, [{"role": "user", "content": "prompt 2"}]]
    rows = exported(tmp_path, [talk, text], ExportOptions("sft", form="plain"))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("hi", "1-1"), ("prompt 2", "2-2")]
    with pytest.raises(OfflineError, match="Some prompts are conversations and some are texts"):
        exported(tmp_path, [talk, text], ExportOptions("sft"))


def test_a_minimum_reward_and_the_top_fraction_leave_the_best_rows(tmp_path: Path) -> None:
    results = [result(line, [reward]) for line, reward in enumerate([5, 1, 4, 2, 3], start=1)]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(min_reward=2)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4", "4-2", "5-3"]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(top_fraction=0.4)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4"]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(min_reward=2, top_fraction=0.5)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4"], "half of the four that are left"


def test_a_row_that_was_there_before_goes_unless_it_is_to_stay(tmp_path: Path) -> None:
    twice = [result(1, [1, 2], ["a", "b"], prompt="p"), result(2, [1, 2], ["a", "b"], prompt="p")]
    assert len(exported(tmp_path, twice, ExportOptions("sft"))) == 1
    assert len(exported(tmp_path, twice, ExportOptions("sft", filters=Filters(keep_duplicates=True)))) == 2


def test_length_balance_drops_the_closest_pairs_of_the_side_with_more(tmp_path: Path) -> None:
    """Three pairs have the longer text chosen, with margins 1, 3 and 2, and one the shorter; equal lengths stay."""
    results = [
        result(1, [1, 0], ["long", "s"]),
        result(2, [3, 0], ["long", "s"]),
        result(3, [2, 0], ["long", "s"]),
        result(4, [1, 0], ["s", "long"]),
        result(5, [1, 0], ["one", "two"]),
    ]
    rows = exported(tmp_path, results, ExportOptions("preference", filters=Filters(balance_length=True)))
    assert [row["prompt"] for row in rows] == ["prompt 2", "prompt 4", "prompt 5"]


@pytest.mark.parametrize("filters", [Filters(balance_length=True), Filters(min_margin=1.0)])
def test_filters_of_pairs_are_refused_where_there_are_none(filters: Filters, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="it goes with --format preference"):
        exported(tmp_path, [result(1, [1])], ExportOptions("sft", filters=filters))


def test_the_card_tells_source_models_sampling_counts_and_hashes(tmp_path: Path) -> None:
    filters = Filters(min_reward=2)
    exported(tmp_path, [result(1, [1]), result(2, [2]), result(3, [3])], ExportOptions("sft", filters=filters))
    card = (tmp_path / "export.card.md").read_text()
    digest = hashlib.sha256((tmp_path / "export.jsonl").read_bytes()).hexdigest()
    for told in (
        "from 3 answered lines; 1 lines failed",
        f"| sha256 | `{digest}` |",
        "| before the filters | 3 |",
        "| taken by min_reward | 1 |",
        "| written | 2 |",
        "| model | `policy` |",
        '| reward_models | `{"r": "movie-sentiment"}` |',
        '| input | `{"sha256": "abc", "rows": 3}` |',
        "| seed | `7` |",
        '| defaults | `{"best_of": 3}` |',
    ):
        assert told in card


def test_the_same_results_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    results = [result(line, [line % 7, line % 5, line % 3 + 0.5]) for line in range(1, 40)]
    options = ExportOptions("preference", "best-random", filters=Filters(balance_length=True, top_fraction=0.5))
    assert exported(tmp_path, results, options) == exported(tmp_path, results[::-1], options)


def test_nothing_left_writes_no_file_and_says_which_filter_took_it(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"Nothing of .* is left by the filters \(rows: 1, min_reward: 1\); loosen"):
        exported(tmp_path, [result(1, [1])], ExportOptions("sft", filters=Filters(min_reward=2)))
    assert not (tmp_path / "export.jsonl").exists()


def test_a_run_that_goes_on_is_not_exported(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [result(1, [1])])
    with locked(directory), pytest.raises(OfflineError, match="A run is writing to"):
        run_export(directory, tmp_path / "export.jsonl", ExportOptions("sft"))


def test_the_command_exports_and_is_plain_about_mistakes(tmp_path: Path) -> None:
    directory, out = write_run(tmp_path / "run", [result(1, [1, 2])]), tmp_path / "export.jsonl"
    done = CliRunner().invoke(app, ["export", str(directory), "--format", "preference", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert len(out.read_text().splitlines()) == 1
    wrong = CliRunner().invoke(app, ["export", str(tmp_path), "--format", "sft", "--out", str(out)])
    assert "is not the output of nbest batch or nbest rerank" in str(wrong.exception)
