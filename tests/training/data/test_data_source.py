import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from training.cli import train_app
from training.data.data_source import DataSourceError, read_records
from training.data.preferences import DataError, read_rows

PROMPT = [{"role": "user", "content": "hi"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": f"great {i}"}],
     "rejected": [{"role": "assistant", "content": f"dull {i}"}], "margin": float(i)}
    for i in range(3)
]  # fmt: skip


def test_the_same_rows_are_read_from_every_kind_of_source(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = Dataset.from_list(ROWS)
    data.to_parquet(parquet)
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    rows = read_rows(jsonl)
    assert [(row.line, row.margin, row.texts) for row in rows] == [
        (i + 1, float(i), (f"great {i}", f"dull {i}")) for i in range(3)
    ]
    assert read_rows(parquet) == rows
    assert read_rows(tmp_path / "saved") == rows
    assert read_rows(f"{tmp_path / 'splits'}:train") == rows
    assert read_rows(f"{tmp_path / 'splits'}:test") == rows[:1]


def test_a_bad_row_of_a_table_is_reported_with_its_number(tmp_path: Path) -> None:
    Dataset.from_list([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None}]).to_parquet(
        tmp_path / "x.parquet"
    )
    with pytest.raises(DataError, match=r"x\.parquet:2: the fields are chosen; a line has .* rejected"):
        read_rows(tmp_path / "x.parquet")


def test_empty_cells_of_a_table_count_as_missing_columns(tmp_path: Path) -> None:
    Dataset.from_list(
        [
            {"chosen": "a", "rejected": "b", "margin": 2.0, "text": None, "rating": None},
            {"chosen": None, "rejected": None, "margin": None, "text": "c", "rating": 1.0},
        ]
    ).to_parquet(tmp_path / "x.parquet")
    pair, rated = read_rows(tmp_path / "x.parquet")
    assert (pair.texts, pair.margin) == (("a", "b"), 2.0)
    assert (rated.texts, rated.ratings) == (("c",), (1.0,))


def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    options = ["--data", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out")]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a", "rating": 1}\n' + '{"text": "é", "rating": 2}'.encode("latin-1"))
    result = CliRunner().invoke(train_app, ["reward", *options])
    assert result.exit_code == 1
    assert "x.jsonl:2: not UTF-8" in result.output


def test_a_data_set_with_several_splits_needs_the_name_of_one(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataSourceError, match="has the splits train, test; name one, as in"):
        read_records(tmp_path / "splits")
    with pytest.raises(DataSourceError, match="has no split dev; it has train, test"):
        read_records(f"{tmp_path / 'splits'}:dev")


def test_a_missing_file_is_reported_without_a_request_to_the_hub(tmp_path: Path) -> None:
    options = ["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(train_app, ["reward", *options])
    assert result.exit_code == 1
    assert "there is no file or directory" in result.output


def test_a_parquet_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(DataSourceError, match="is not a table that can be read"):
        read_rows(tmp_path / "x.parquet")
