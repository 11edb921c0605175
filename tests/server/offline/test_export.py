"""Exports: the rows and columns of each format, the filters, and the data card."""

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
    """A line of results.jsonl; without `texts`, the text of a candidate is "line-reward"."""
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
    best = max(candidates, key=lambda candidate: -9 if candidate["reward"] is None else candidate["reward"])
    prompt = {} if "messages" in fields else {"prompt": f"prompt {line}"}
    return {
        "custom_id": str(line),
        "line": line,
        **prompt,
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
    (directory / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in results))
    (directory / "failed.jsonl").write_text('{"custom_id": null, "line": 9, "reason": "bad", "param": null}\n')
    return directory


def exported(tmp_path: Path, results: list[dict[str, Any]], options: ExportOptions) -> list[dict[str, Any]]:
    out = tmp_path / "export.jsonl"
    run_export(write_run(tmp_path / "run", results), out, options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_sft_rows_are_the_winners_in_the_order_of_the_input(tmp_path: Path) -> None:
    rows = exported(tmp_path, [result(2, [1, 3]), result(1, [5, 4])], ExportOptions("sft"))
    assert rows == [
        {"prompt": "prompt 1", "completion": "1-5", "finish_reason": "stop"},
        {"prompt": "prompt 2", "completion": "2-3", "finish_reason": "stop"},
    ]


def test_a_preference_pairs_the_best_with_the_worst_candidate(tmp_path: Path) -> None:
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


def test_best_random_draws_the_same_rejected_candidates_for_the_same_seed(tmp_path: Path) -> None:
    results = [result(line, [0, 1, 2, 3, 9]) for line in range(1, 31)]
    drawn = [
        [
            row["rejected_score"]
            for row in exported(tmp_path, results, ExportOptions("preference", "best-random", seed=seed))
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {0, 1, 2, 3}


def test_all_pairs_are_exported_down_to_the_least_margin(tmp_path: Path) -> None:
    options = ExportOptions("preference", "all", filters=Filters(min_margin=2))
    rows = exported(tmp_path, [result(1, [0, 1, 3])], options)
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(3, 1), (3, 0)]


@pytest.mark.parametrize(
    "unpaired", [result(1, [2, 2]), result(1, [2]), result(1, [None, None]), result(1, [2, 1], ["same", "same"])]
)
def test_equal_rewards_or_equal_texts_make_no_pair(unpaired: dict[str, Any], tmp_path: Path) -> None:
    rows = exported(tmp_path, [unpaired, result(2, [1, 0])], ExportOptions("preference"))
    assert [row["prompt"] for row in rows] == ["prompt 2"]


def test_raw_rows_are_all_candidates(tmp_path: Path) -> None:
    rows = exported(tmp_path, [result(1, [2, None])], ExportOptions("raw"))
    assert [(row["custom_id"], row["index"], row["reward"], row["is_winner"]) for row in rows] == [
        ("1", 0, 2, True),
        ("1", 1, None, False),
    ]


def test_conversations_and_texts_are_converted_to_one_form(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat, text = result(1, [1], messages=messages), result(2, [2])
    (row,) = exported(tmp_path, [chat], ExportOptions("sft"))
    assert (row["prompt"], row["completion"]) == (messages, [{"role": "assistant", "content": "1-1"}])
    rows = exported(tmp_path, [chat, text], ExportOptions("sft", form="conversational"))
    assert [row["prompt"] for row in rows] == [messages, [{"role": "user", "content": "prompt 2"}]]
    rows = exported(tmp_path, [chat, text], ExportOptions("sft", form="plain"))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("hi", "1-1"), ("prompt 2", "2-2")]
    with pytest.raises(OfflineError, match="Some prompts are conversations and some are texts"):
        exported(tmp_path, [chat, text], ExportOptions("sft"))


def test_min_reward_and_top_fraction_keep_the_rows_of_the_highest_reward(tmp_path: Path) -> None:
    results = [result(line, [reward]) for line, reward in enumerate([5, 1, 4, 2, 3], start=1)]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(min_reward=2)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4", "4-2", "5-3"]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(top_fraction=0.4)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4"]
    rows = exported(tmp_path, results, ExportOptions("sft", filters=Filters(min_reward=2, top_fraction=0.5)))
    assert [row["completion"] for row in rows] == ["1-5", "3-4"], "half of the four rows that min_reward keeps"


def test_duplicate_rows_are_removed_unless_keep_duplicates(tmp_path: Path) -> None:
    duplicates = [result(1, [1, 2], ["a", "b"], prompt="p"), result(2, [1, 2], ["a", "b"], prompt="p")]
    assert len(exported(tmp_path, duplicates, ExportOptions("sft"))) == 1
    assert len(exported(tmp_path, duplicates, ExportOptions("sft", filters=Filters(keep_duplicates=True)))) == 2


def test_balance_length_removes_the_smallest_margins_of_the_more_frequent_kind(tmp_path: Path) -> None:
    """Three pairs have the longer text chosen, with margins 1, 3 and 2, and one pair has the shorter text chosen.

    The pair of equal lengths stays.
    """
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
def test_filters_of_pairs_are_refused_for_other_formats(filters: Filters, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="use it with --format preference"):
        exported(tmp_path, [result(1, [1])], ExportOptions("sft", filters=filters))


def test_the_card_has_the_source_models_sampling_counts_and_digests(tmp_path: Path) -> None:
    filters = Filters(min_reward=2)
    exported(tmp_path, [result(1, [1]), result(2, [2]), result(3, [3])], ExportOptions("sft", filters=filters))
    card = (tmp_path / "export.card.md").read_text()
    digest = hashlib.sha256((tmp_path / "export.jsonl").read_bytes()).hexdigest()
    for text in (
        "from 3 answered lines; 1 lines failed",
        f"| sha256 | `{digest}` |",
        "| before the filters | 3 |",
        "| removed by min_reward | 1 |",
        "| written | 2 |",
        "| model | `policy` |",
        '| reward_models | `{"r": "movie-sentiment"}` |',
        '| input | `{"sha256": "abc", "rows": 3}` |',
        "| seed | `7` |",
        '| defaults | `{"best_of": 3}` |',
    ):
        assert text in card


def test_the_order_of_the_results_does_not_change_the_export(tmp_path: Path) -> None:
    results = [result(line, [line % 7, line % 5, line % 3 + 0.5]) for line in range(1, 40)]
    options = ExportOptions("preference", "best-random", filters=Filters(balance_length=True, top_fraction=0.5))
    assert exported(tmp_path, results, options) == exported(tmp_path, results[::-1], options)


def test_an_empty_export_writes_no_file_and_names_the_filter_that_removed_the_rows(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"The filters remove every row of .* \(rows: 1, min_reward: 1\); loosen"):
        exported(tmp_path, [result(1, [1])], ExportOptions("sft", filters=Filters(min_reward=2)))
    assert not (tmp_path / "export.jsonl").exists()


def test_a_running_run_is_not_exported(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [result(1, [1])])
    with locked(directory), pytest.raises(OfflineError, match="A run is writing to"):
        run_export(directory, tmp_path / "export.jsonl", ExportOptions("sft"))


def test_the_command_exports_a_run_and_refuses_another_directory(tmp_path: Path) -> None:
    directory, out = write_run(tmp_path / "run", [result(1, [1, 2])]), tmp_path / "export.jsonl"
    succeeded = CliRunner().invoke(app, ["export", str(directory), "--format", "preference", "--out", str(out)])
    assert succeeded.exit_code == 0, succeeded.output
    assert len(out.read_text().splitlines()) == 1
    failed = CliRunner().invoke(app, ["export", str(tmp_path), "--format", "sft", "--out", str(out)])
    assert "is not the output of nbest batch or nbest rerank" in str(failed.exception)
