"""The card beside an export: where its rows come from, and how to tell that they are those."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from reranker.fsio import sha256_of
from server.offline.run_directory import write_whole


def path_of(export: Path) -> Path:
    """FILE.jsonl has FILE.card.md."""
    return export.with_suffix(".card.md")


def write(
    path: Path,
    export: Path,
    results: Path,
    runs: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    counts: Mapping[str, int],
    answered: int,
    failed: int,
) -> None:
    """Writes the card; `runs` are the identities of the runs that the results come from, the latest last."""
    filters = options["filters"]
    chosen = {name: value for name, value in options.items() if name != "filters"}
    text = f"""\
# {export.name}

Written by `nbest export` (nbest {metadata.version("nbest")}) from {answered:,} answered lines; {failed:,} lines failed.

## Contents

{_table(chosen | {"rows": counts["written"], "sha256": sha256_of(export)})}
## Filters

{_table(filters)}
| | rows |
|---|---|
{"".join(f"| {_COUNTS.get(name, f'taken by {name}')} | {count:,} |" + chr(10) for name, count in counts.items())}
## Source

{_table({"results": results, "sha256": sha256_of(results)})}
{"".join(_run(number, run) for number, run in enumerate(runs, start=1))}"""
    write_whole(path, text.rstrip() + "\n")


_COUNTS = {"rows": "before the filters", "written": "written"}


def _run(number: int, run: Mapping[str, Any]) -> str:
    return f"### Run {number}\n\n{_table(run)}\n"


def _table(values: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |\n" for name, value in values.items() if value is not None]
    return "".join(["| | |\n|---|---|\n", *lines])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)
    return f"`{text.replace('|', chr(92) + '|')}`"
