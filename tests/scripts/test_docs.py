"""The pages agree with the code: generated parts are up to date, and README's commands and links exist."""

import ast
import os
import re
from pathlib import Path

import pytest
import typer

from scripts import docs, reliability
from scripts.reliability import PROMISES
from server.cli import app
from server.config import Settings, flag_of, is_secret, variable_of
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = sorted(
    (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("reranker/**/*.md"))
)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NBEST_")]:
        monkeypatch.delenv(name)


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line.split(" #")[0].strip() for snippet in snippets("bash") for line in snippet.splitlines()]


def test_generated_pages_are_up_to_date() -> None:
    stale = [name for name, text in docs.pages().items() if (docs.ROOT / name).read_text() != text]
    assert not stale, "run `make docs`"


def test_a_stale_page_fails_the_check_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in docs.pages().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["docs", "--check"])
    with pytest.raises(SystemExit) as passed:
        docs.main()
    assert not passed.value.code
    (tmp_path / "docs" / "settings.md").write_text("something else")
    monkeypatch.setattr(docs, "pages", lambda: {"docs/settings.md": docs.settings_page()})
    with pytest.raises(SystemExit) as failed:
        docs.main()
    assert failed.value.code
    assert capsys.readouterr().err == "docs/settings.md is out of date; run `make docs` and commit it.\n"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_flag_a_variable_and_a_description(name: str) -> None:
    field = Settings.model_fields[name]
    page = (docs.ROOT / "docs" / "settings.md").read_text()
    assert f"`{variable_of(name)}`" in page
    assert field.description
    assert field.description in page
    serve_help = (docs.ROOT / "docs" / "cli.md").read_text().split("## nbest serve")[1].split("## ")[0]
    assert (f" {flag_of(name)} " in serve_help) is not is_secret(field)


@pytest.mark.parametrize("snippet", snippets("python"))
def test_readme_python_compiles(snippet: str) -> None:
    ast.parse(snippet)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)|<img src=\"([^\":]+)\"", page.read_text())
    missing = [link for pair in links for link in pair if link and not (page.parent / link).exists()]
    assert not missing


def test_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", " ".join([*shell_lines(), *re.findall(r"`(make .*?)`", README)])))
    assert {"serve", "test"} <= named
    assert named <= targets, f"README names make targets that do not exist: {named - targets}"


def test_readme_names_commands_that_exist() -> None:
    known = {" ".join(path) for path in docs.commands(typer.main.get_command(app))}
    lines = [*shell_lines(), *re.findall(r"`(nbest [^`]*)`", README)]
    for line in lines:
        if command := re.match(r"(?:\.venv/bin/)?nbest ((?:[a-z]+ ?)+)", line):
            words = command[1].split()
            assert any(" ".join(words[:length]) in known for length in range(len(words), 0, -1)), (
                f"README says `{line}`, and there is no such command"
            )


@pytest.mark.parametrize("test", [test for promise in PROMISES for test in promise.tests if "::" in test])
def test_every_promise_names_tests_that_exist(test: str) -> None:
    file, *_, name = test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_promises_without_a_result_say_so() -> None:
    assert reliability.NOT_YET in reliability.promises(lambda _: None)
