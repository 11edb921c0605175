"""The answer in a candidate's text, normalised so that equal answers are equal strings.

    text -> extract (regular expression, JSON pointer, or whole text) -> normal form -> the string that gets the vote

Both the text and the pattern are untrusted. Patterns run on RE2, whose time is linear in the text and whose memory is
bounded, so no pattern can hang; in exchange RE2 has no lookaround and no backreferences. `reranker.answer_forms` says
which answers are equal.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import re2

if TYPE_CHECKING:
    from reranker.answer_forms import NormalForm

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


def canonical_answers(answers: Mapping[int, str]) -> dict[int, str]:
    """The normal form of each answer that has content, by its key; equal answers have equal forms.

    A unit may be left out: a number counts as the quantity of that number among the other answers (5 as 5 cm, 50 as
    50%), unless these have several quantities of that number.
    """
    from reranker.answer_forms import normal_form  # imported here: SymPy takes half a second, and only voting needs it

    forms = {key: form for key, answer in answers.items() if (form := normal_form(answer)) is not None}
    quantities = defaultdict[str, set[str]](set)
    for form in forms.values():
        if form.number is not None:
            quantities[form.number].add(form.form)

    def vote(form: "NormalForm") -> str:
        of_number = quantities.get(form.form, ()) if form.number is None else ()
        return next(iter(of_number)) if len(of_number) == 1 else form.form

    return {key: vote(form) for key, form in forms.items()}


def canonical(answer: str) -> str | None:
    """The normal form of a single answer; None for an answer without content."""
    return canonical_answers({0: answer}).get(0)


def _child(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value[step]
    if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]*", step, re.ASCII):
        return value[int(step)]
    raise LookupError(step)
