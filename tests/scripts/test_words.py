"""The check for banned words finds them in names and text, and leaves other uses alone."""

import pytest

from scripts.words import uses_in_code, uses_in_text


def words_in_code(source: str) -> list[str]:
    return [use.word for use in uses_in_code("module.py", source)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rewards = [one.reward for one in scored]\n", ["one", "one"]),
        ("told_as = 1\n", ["told"]),
        ("# What the caller is told.\n", ["told"]),
        ('help_text = "goes on where it ended"\n', ["goes on"]),
        ("placeholder = newest = someone = 1\n", []),
        ("# one candidate was found in its place\n", []),
        ("# the label `told`\n", []),
    ],
)
def test_banned_words_are_found_in_names_and_text(source: str, words: list[str]) -> None:
    assert words_in_code(source) == words


def test_a_use_has_its_line_and_its_replacement() -> None:
    (use,) = uses_in_text("page.md", 10, "A first line.\nIt Goes On here.")
    assert (use.path, use.line, use.word, use.replacement) == ("page.md", 11, "goes on", "continues")
