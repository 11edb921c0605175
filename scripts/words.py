"""Lists uses of words that are banned from code and docs because they read badly, each with its replacement.

    python -m scripts.words             lists every use and exits with 1 if there is any
    python -m scripts.words --count     counts the uses of each word
    python -m scripts.words PATH ...    checks only these files or folders

`IDENTIFIERS` applies to names in code, `TEXT` to comments, docstrings, strings and pages.
"""

import argparse
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {".md", ".html", ".js", ".css", ".toml", ".yaml", ".yml", ".sh"}
SKIPPED = ("benchmarks/results/", "docs/openapi.json", "scripts/words.py", "tests/scripts/test_words.py")

IDENTIFIERS = {
    "one": "the noun: candidate, outcome, line, row",
    "told": "message, text, reported",
    "heard": "on_outcome, on_event, received",
    "asked": "request",
    "found": "result, match, or the noun",
    "place": "index, position, path",
    "news": "event, outcomes",
}
PARTS = ("told", "heard", "asked", "news")
"""Identifiers that are also banned as a part of a name, as in told_as."""

TEXT = {
    "told": "said, reported, returned, logged, given",
    "heard": "received, called with",
    "hears": "receives, is called with",
    "hear": "receive",
    "birth": "provenance",
    "births": "provenance",
    "dear": "expensive",
    "dearer": "more expensive",
    "dearest": "most expensive",
    "whoever": "who, the caller, the client",
    "so many": "that many, the number",
    "goes on": "continues",
    "go on": "continue",
    "went on": "continued",
    "going on": "continuing",
    "gone on": "continued",
    "handed on": "yielded, passed on",
    "hands on": "yields, passes on",
    "hand on": "yield, pass on",
    "none of ours": "unknown",
    "is had": "is available",
    "to be had": "available",
    "in its way": "in its path",
    "by itself": "on its own",
    "likewise": "too, in the same way",
    "beneath": "below, under",
    "midst": "during",
    "all the same": "still, anyway",
}
_LONGEST_FIRST = "|".join(map(re.escape, sorted(TEXT, key=len, reverse=True)))
_TEXT = re.compile(rf"(?<![\w`])({_LONGEST_FIRST})(?![\w`])", re.IGNORECASE)


class Use(NamedTuple):
    """A banned word at its path and line."""

    path: str
    line: int
    word: str
    replacement: str


def uses_in_text(path: str, first_line: int, text: str) -> Iterator[Use]:
    """The banned words in a comment, string or page whose first line has the number `first_line`."""
    for number, line in enumerate(text.split("\n"), first_line):
        for match in _TEXT.finditer(line):
            word = match[1].lower()
            yield Use(path, number, word, TEXT[word])


def uses_in_code(path: str, source: str) -> Iterator[Use]:
    """The banned words in the names and the text of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            word = token.string.lower()
            parts = [part for part in word.split("_") if part in PARTS]
            for name in {word} & IDENTIFIERS.keys() or set(parts):
                yield Use(path, token.start[0], name, IDENTIFIERS[name])
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from uses_in_text(path, token.start[0], token.string)


def uses(paths: Iterable[str]) -> Iterator[Use]:
    """Every use of a banned word in these files."""
    for path in paths:
        file = ROOT / path
        if path.startswith(SKIPPED) or not file.is_file():
            continue
        if file.suffix == ".py":
            yield from uses_in_code(path, file.read_text())
        elif file.suffix in PAGES or file.name in ("Makefile", "Dockerfile"):
            yield from uses_in_text(path, 1, file.read_text())


def _files(wanted: list[str]) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *wanted]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("paths", nargs="*", help="files or folders; default: the whole checkout")
    parser.add_argument("--count", action="store_true", help="print the number of uses of each word")
    arguments = parser.parse_args()
    banned = list(uses(_files(arguments.paths)))
    if arguments.count:
        for word, count in Counter(use.word for use in banned).most_common():
            print(f"{count:5} {word}")
    else:
        for use in banned:
            print(f"{use.path}:{use.line}: {use.word}: write {use.replacement}")
    sys.exit(bool(banned))


if __name__ == "__main__":
    main()
