"""README's commands work as written: `nbest serve`, the curl and Python snippets, Ctrl-C."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.process import nbest_serve

pytestmark = pytest.mark.engine

README = (Path(__file__).parents[2] / "README.md").read_text()
DEFAULT_ADDRESS = "127.0.0.1:8000"


def snippets(language: str, containing: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if containing in block]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of `nbest serve`; at the end Ctrl-C must stop it and its child processes."""
    with nbest_serve() as served:
        yield served.url.removeprefix("http://")
        code, left = served.stop(signal.SIGINT)
        assert code in {0, 130}
        assert not left


@pytest.mark.parametrize("snippet", snippets("bash", "curl"))
def test_the_curl_snippets_work(snippet: str, address: str) -> None:
    result = subprocess.run(
        ["bash", "-ec", snippet.replace(DEFAULT_ADDRESS, address)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert '"reward":' in result.stdout.replace(" ", ""), result.stdout


@pytest.mark.parametrize("snippet", snippets("python", "openai"))
def test_the_python_snippets_work(snippet: str, address: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", snippet.replace(DEFAULT_ADDRESS, address)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_readme_has_both_kinds_of_snippet() -> None:
    assert snippets("bash", "curl")
    assert any("stream=True" in snippet for snippet in snippets("python", "openai"))
