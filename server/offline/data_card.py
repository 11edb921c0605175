"""The data card beside an export: where its rows come from, and the digests by which that can be checked."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from reranker.fsio import sha256_of
from reranker.markdown import table
from server.offline.run_directory import write_text


def path_of(export: Path) -> Path:
    """The path of the card: FILE.card.md for FILE.jsonl."""
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
    """Writes the card. `runs` are the identities of the runs that wrote the results, the latest last.

    Raises:
        OfflineError: it cannot be written.
    """
    filters = options["filters"]
    contents = {name: value for name, value in options.items() if name != "filters"}
    text = f"""\
# {export.name}

Written by `nbest export` (nbest {metadata.version("nbest")}) from {answered:,} answered lines; {failed:,} lines failed.

## Contents

{_table(contents | {"rows": counts["written"], "sha256": sha256_of(export)})}
## Filters

{_table(filters)}
{table(("", "rows"), ((_COUNTS.get(name, f"removed by {name}"), f"{count:,}") for name, count in counts.items()))}
## Source

{_table({"results": results, "sha256": sha256_of(results)})}
{"".join(_run(number, run) for number, run in enumerate(runs, start=1))}"""
    write_text(path, text.rstrip() + "\n")


_COUNTS = {"rows": "before the filters", "written": "written"}


def _run(number: int, run: Mapping[str, Any]) -> str:
    return f"### Run {number}\n\n{_table(run)}\n"


def _table(values: Mapping[str, Any]) -> str:
    return table(("", ""), ((name, _cell(value)) for name, value in values.items() if value is not None))


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)
    return f"`{text}`"
