"""The answer in a candidate's text, in a form in which equal answers are equal strings.

    text -> extract (regular expression, JSON pointer, or the whole text) -> canonical -> what is voted on

Both the text and the pattern come from outside. Patterns run on RE2, whose time is linear in the text and whose memory
is bounded, so that no pattern can hang; it has no lookaround and no backreferences in exchange. Numbers and formulas
are compared by their exact value (`expressions`), everything else by its letters.
"""

import json
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import re2

MAX_PATTERN_BYTES = 2**20
"""Of RE2's compiled program; an ordinary pattern takes a few hundred."""

Extract = Callable[[str], str | None]
"""Finds the answer in a text; None where there is none."""


class AnswerError(ValueError):
    """A pattern or pointer that cannot be used; the message is a clause that says why."""


def by_regex(pattern: str) -> Extract:
    """Finds what the one group of a pattern holds where the pattern first matches.

    For the last match let the pattern begin with (?s:.*).

    Raises:
        AnswerError: not a pattern of RE2, too large, or not with exactly one group.
    """
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_PATTERN_BYTES
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        raise AnswerError(f"RE2 cannot read it ({error.args[0].decode(errors='replace')})") from None
    if compiled.groups != 1:
        raise AnswerError(f"it has {compiled.groups} groups, and exactly one has to hold the answer")

    def extract(text: str) -> str | None:
        match = compiled.search(text)
        return match.group(1) if match else None

    return extract


def by_json_pointer(pointer: str) -> Extract:
    """Finds the value that a JSON pointer (RFC 6901) leads to in a text that is JSON; "" is the whole document.

    A string answers by its content, anything else by its JSON; null is no answer.

    Raises:
        AnswerError: not a JSON pointer.
    """
    if not re.fullmatch(r"(/([^~]|~[01])*)?", pointer, re.DOTALL):
        raise AnswerError("a JSON pointer is empty or begins with /, and names write ~ as ~0 and / as ~1")
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]

    def extract(text: str) -> str | None:
        try:
            value = reduce(_child, steps, json.loads(text, parse_float=str, parse_int=str))
        except (ValueError, LookupError, RecursionError):
            return None
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)

    return extract


def whole_text(text: str) -> str:
    """All of a candidate is its answer."""
    return text


def canonical(answer: str) -> str | None:
    """The normal form of an answer: the exact value of a number or formula, or else its words.

    Dollar signs, LaTeX's brackets round text and formulas, outer brackets and a final full stop do not count, nor does
    case in words. Two
    answers with the same normal form are equal; None is an answer without content.
    """
    bare = re.sub(r"\\?\$|\\[()\[\]]", " ", answer)
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}", r"\1", bare)
    bare = re.sub(r"\\boxed ?\{([^{}]*)\}", r"\1", bare)  # a second pass, since it may stand around the first
    bare = bare.strip().removesuffix(".").strip()
    from reranker.expressions import value_of  # SymPy takes half a second to import, and only voting needs it

    return value_of(bare) or " ".join(bare.casefold().strip("()").split()) or None


def _child(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value[step]
    if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]*", step, re.ASCII):
        return value[int(step)]
    raise LookupError(step)
