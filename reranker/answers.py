"""The answer in a candidate's text, normalised so that equal answers are equal strings.

    text -> extract (regular expression, JSON pointer, or the whole text) -> canonical -> the string that gets the vote

Both the text and the pattern are untrusted. Patterns run on RE2, whose time is linear in the text and whose memory is
bounded, so no pattern can hang; in exchange RE2 has no lookaround and no backreferences. Numbers and formulas are
compared by their exact value (`expressions`), everything else by its letters.
"""

import json
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import re2

MAX_PATTERN_BYTES = 2**20
"""Most memory of RE2's compiled program; an ordinary pattern takes a few hundred bytes."""

Extract = Callable[[str], str | None]
"""Returns the answer in a text, or None if the text has none."""


class AnswerError(ValueError):
    """A pattern or pointer that cannot be used; the message is a clause with the reason."""


def by_regex(pattern: str) -> Extract:
    """Extracts the single group of a pattern at the pattern's first match.

    A pattern that begins with (?s:.*) extracts the last match instead.

    Raises:
        AnswerError: the pattern is not valid in RE2, is too large, or does not have exactly one group.
    """
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_PATTERN_BYTES
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        raise AnswerError(f"RE2 cannot read it ({error.args[0].decode(errors='replace')})") from None
    if compiled.groups != 1:
        raise AnswerError(f"it has {compiled.groups} groups, and it needs exactly one, which holds the answer")

    def extract(text: str) -> str | None:
        match = compiled.search(text)
        return match.group(1) if match else None

    return extract


def by_json_pointer(pointer: str) -> Extract:
    """Extracts the value at a JSON pointer (RFC 6901) from a text that is JSON; "" points at the whole document.

    The answer is the content of a string, and the JSON of any other value. null is no answer.

    Raises:
        AnswerError: the text is not a JSON pointer.
    """
    if not re.fullmatch(r"(/([^~]|~[01])*)?", pointer, re.DOTALL):
        raise AnswerError("a JSON pointer is empty or begins with /; within a name ~ is written ~0 and / is written ~1")
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]

    def extract(text: str) -> str | None:
        try:
            value = reduce(_child, steps, json.loads(text, parse_float=str, parse_int=str))
        except (ValueError, LookupError, RecursionError):
            return None
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)

    return extract


def whole_text(text: str) -> str:
    """Takes the whole text of a candidate as its answer."""
    return text


def canonical(answer: str) -> str | None:
    """The normal form of an answer: the exact value of a number or formula, otherwise its words.

    Dollar signs, LaTeX's brackets around text and formulas, outer brackets, a final full stop and the case of words do
    not count. Two answers with the same normal form are equal. None stands for an answer without content.
    """
    bare = re.sub(r"\\?\$|\\[()\[\]]", " ", answer)
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}", r"\1", bare)
    bare = re.sub(r"\\boxed ?\{([^{}]*)\}", r"\1", bare)  # after \text, because \boxed may enclose it
    bare = bare.strip().removesuffix(".").strip()
    from reranker.expressions import value_of  # imported here: SymPy takes half a second, and only voting needs it

    return value_of(bare) or " ".join(bare.casefold().strip("()").split()) or None


def _child(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value[step]
    if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]*", step, re.ASCII):
        return value[int(step)]
    raise LookupError(step)
