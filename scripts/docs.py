"""Generates the parts of README and docs/ that come from code and results.

    python -m scripts.docs            # or: make docs
    python -m scripts.docs --check    # fails and names the pages that are out of date (in make check)

A test compares the committed files with the same `pages()`.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from reranker.markdown import table
from scripts import dashboard, doc_tables
from server.app import create_app
from server.cli import app as command
from server.cli_options import DeferredCommand
from server.config import ENV_PREFIX, OTHER_VARIABLES, Settings, flag_of, is_secret, variable_of
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN

ROOT = Path(__file__).parent.parent
COLUMNS = "80"


def pages() -> dict[str, str]:
    """Path -> the text that the file should have."""
    return {
        "docs/cli.md": cli_page(),
        "docs/settings.md": settings_page(),
        "docs/metrics.md": metrics_page(),
        "docs/openapi.json": json.dumps(openapi(), indent=2) + "\n",
        dashboard.FILE: dashboard.page(),
        **{str(page.relative_to(doc_tables.ROOT)): doc_tables.filled(page) for page in doc_tables.PAGES},
    }


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of the group, then of every command below it."""
    yield path
    context = typer.Context(group)
    for name in group.list_commands(context):
        child = group.get_command(context, name)
        if isinstance(child, DeferredCommand):
            child = child.load()
        if hasattr(child, "list_commands"):
            yield from commands(child, (*path, name))
        else:
            yield (*path, name)


def cli_page() -> str:
    sections = ["# The command line\n\nWritten by `make docs` from `nbest --help`.\n"]
    for path in commands(typer.main.get_command(command)):
        help_text = CliRunner().invoke(command, [*path, "--help"], prog_name="nbest", env={"COLUMNS": COLUMNS}).output
        sections.append(f"## {' '.join(('nbest', *path))}\n\n```\n{help_text.strip()}\n```\n")
    return "\n".join(sections)


def settings_page() -> str:
    schema = Settings.model_json_schema()["properties"]
    rows = [
        (
            f"`{name}`",
            "none: a command line would expose a secret" if is_secret(field) else f"`{flag_of(name)}`",
            f"`{variable_of(name)}`",
            f"`{json.dumps(field.default)}`" if field.default is not None else "",
            allowed(schema[name]),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
    others = [(f"`{name}`", meaning) for name, meaning in OTHER_VARIABLES.items()]
    return f"""\
# Settings

Written by `make docs` from `server/config.py`. Each source wins over those before it: the defaults, the TOML file named
by `--config` or `NBEST_CONFIG`, the environment, the flags of `nbest serve`. In the environment `NBEST_REWARD_MODELS`
is a list of NAME=SPEC with spaces between; in the file it is a table.

{table(("TOML key", "flag", "variable", "default", "values", "meaning"), rows)}
Variables that are not settings of the server:

{table(("variable", "meaning"), others)}"""


def allowed(schema: dict[str, Any]) -> str:
    """The values that a setting accepts, from its JSON schema."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    (kind,) = kinds
    if choices := kind.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = [
        f"{sign} {kind[key]:g}"
        for key, sign in {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}.items()
        if key in kind
    ]
    return " ".join([{"object": "table of strings"}.get(kind["type"], kind["type"]), *bounds])


def metrics_page() -> str:
    metrics = Metrics()
    collectors: Iterable[Any] = metrics.registry._collector_to_names
    labels = {collector._name: collector._labelnames for collector in collectors}  # collect() has no label names
    rows = [
        (
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            ", ".join(f"`{label}`" for label in labels[family.name]),
            family.documentation,
        )
        for family in metrics.registry.collect()
    ]
    return f"""\
# Metrics

Written by `make docs` from `server/observability/metrics.py`; `GET /metrics` serves them in Prometheus' text format.

{table(("name", "type", "labels", "formula and unit"), rows)}"""


def openapi() -> dict[str, Any]:
    def never_started() -> AbstractAsyncContextManager[BestOfN]:
        raise AssertionError("describing the routes must not start the pipeline")

    return create_app(never_started, Settings(), Metrics()).openapi()


def main() -> None:
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]  # the pages describe the defaults, not the environment of this shell
    stale = {name: text for name, text in pages().items() if not same(ROOT / name, text)}
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"{name} is out of date; run `make docs` and commit it.", file=sys.stderr)
        sys.exit(bool(stale))
    for name, text in stale.items():
        (ROOT / name).write_text(text)
        print(f"wrote {name}")


def same(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


if __name__ == "__main__":
    main()
