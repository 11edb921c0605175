"""The normal form of an answer: what it means, the same for all ways to write it.

    1/2 · 0.5 · 50%             ->   1/2
    (1, 2) · (x, y) = (1,2)     ->   (1, 2)             pairs and intervals keep their brackets and their order
    {2, 1} · 1 and 2 · x=1, x=2 ->   {1, 2}             sets, lists of solutions and unions are sorted
    x > 3                       ->   (3, oo)            an inequality is its interval
    5 cm                        ->   1/20 m             a quantity is its value in base units
    Paris.                      ->   paris              anything else is its letters

The text is untrusted. It is split by its brackets and separators, in linear time for each level of brackets, and the
parts are numbers and formulas, which `reranker.expressions` computes within bounds, or words.
"""

import re
from dataclasses import dataclass

import sympy

from reranker.answer_text import ROW, SET_CLOSES, SET_OPENS, plain
from reranker.expressions import evaluate
from reranker.units import unit_of

MAX_CHARS = 400
"""Longest answer that is taken apart; a longer text is compared by its letters."""
MAX_RAW_CHARS = 4 * MAX_CHARS
"""Longest answer whose notation is changed first."""
MAX_DEPTH = 8
"""Deepest brackets within brackets; deeper ones are compared by their letters."""

_OPENS, _CLOSES = "([{⟨" + SET_OPENS, ")]}⟩" + SET_CLOSES
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VARIABLE = r"\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([\w,\s]*\))?"
_NAME = re.compile(
    rf"(?:{_VARIABLE}|\({_VARIABLE}(?:,\s*{_VARIABLE})*\))\s*(?:=|\\(?:in|approx)(?![A-Za-z]))\s*(?=[^\s=])"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_QUANTITY = re.compile(
    rf"(?P<number>.*?(?:[\d)}}\]]|\\pi))(?P<space>\s*)(?P<scale>{'|'.join(_SCALES)})?\s*(?P<unit>[A-Za-z°%€£¥₹¢$].*)?",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])")


@dataclass(frozen=True, slots=True)
class NormalForm:
    """`form` is equal for equal answers. A quantity has the `number` before its unit too, as a form of its own."""

    form: str
    number: str | None = None


def normal_form(answer: str) -> NormalForm | None:
    """The normal form; None for an answer without content."""
    text = plain(answer) if len(answer) <= MAX_RAW_CHARS else answer
    if len(text) > MAX_CHARS:
        form = NormalForm(_letters(text))
    else:
        text = _without_name(_without_thousands(text))
        form = _quantity(text) or NormalForm(_form(text))
    return form if form.form else None


def _form(text: str, depth: int = 0) -> str:
    """The form of an answer or of a part of one."""
    text = text.strip()
    if depth > MAX_DEPTH:
        return _letters(text)
    text = _without_name(text)
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in matrix[2].split(ROW) if row.strip()]
        return f"matrix {[[_form(cell, depth + 1) for cell in row.split('&')] for row in rows]}"
    if text.count("\\pm") == 1:
        return _set([text.replace("\\pm", sign, 1) for sign in "+-"], depth)
    parts = _split(text, r",|;|\b(?:and|or)\b|\\cup(?![A-Za-z])")
    if len(parts) > 1:
        return _set(parts, depth)
    if relation := _relation(text, depth):
        return relation
    if bracketed := _bracketed(text, depth):
        return bracketed
    if infinity := re.fullmatch(r"([+-]?)\s*\\infty", text):
        return f"{infinity[1].strip('+')}oo"
    if quantity := _quantity(text):
        return quantity.form
    value = evaluate(text)
    return _letters(text) if value is None else _written(value)


def _set(parts: list[str], depth: int) -> str:
    members = sorted({_form(part, depth + 1) for part in parts if part.strip()})
    return members[0] if len(members) == 1 else f"{{{', '.join(members)}}}"


def _relation(text: str, depth: int) -> str | None:
    """The interval of an inequality between a name and its bounds; otherwise both sides, the smaller one first."""
    sides = re.split(r"(<=|>=|<|>)", text)
    if len(sides) not in (3, 5) or not all(side.strip() for side in sides):
        return None
    if all(operator.startswith(">") for operator in sides[1::2]):
        sides = [side.replace(">", "<") for side in reversed(sides)]
    if not all(operator.startswith("<") for operator in sides[1::2]):
        return None
    terms, ends = sides[::2], [operator == "<=" for operator in sides[1::2]]
    names = [re.fullmatch(rf"\s*{_VARIABLE}\s*", term) is not None for term in terms]
    if names in ([True, False], [False, True]):
        terms, ends = (["-\\infty", *terms], [False, *ends]) if names[0] else ([*terms, "\\infty"], [*ends, False])
    elif names != [False, True, False]:
        operators = ["<=" if is_closed else "<" for is_closed in ends]
        forms = [_form(term, depth + 1) for term in terms]
        return forms[0] + "".join(f" {operator} {form}" for operator, form in zip(operators, forms[1:], strict=True))
    low, high = _form(terms[0], depth + 1), _form(terms[2], depth + 1)
    return f"{'[' if ends[0] else '('}{low}, {high}{']' if ends[1] else ')'}"


def _bracketed(text: str, depth: int) -> str | None:
    """The form of a text that one pair of brackets encloses; None for any other text."""
    if len(text) < 2 or text[0] not in _OPENS or _closing(text) != len(text) - 1:
        return None
    parts = _split(text[1:-1], r",|;")
    if text[0] in ("{", SET_OPENS):
        return _set(parts, depth) if any(part.strip() for part in parts) else "\\emptyset"
    if len(parts) == 1:
        return _form(text[1:-1], depth + 1) if text[0] != "⟨" and text[1:-1].strip() else None
    return f"{text[0]}{', '.join(_form(part, depth + 1) for part in parts)}{text[-1]}"


def _quantity(text: str) -> NormalForm | None:
    """The form of a number with a unit or with a word like million; None for any other text."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or not (match["scale"] or match["unit"]):
        return None
    number = evaluate(match["number"])
    if number is None or number.free_symbols:
        return None
    number *= _SCALES.get(match["scale"], 1)
    if match["unit"] is None:
        return NormalForm(_written(number))
    unit = unit_of(match["unit"])
    is_product = not match["space"] and not match["scale"] and re.fullmatch("[A-Za-z]", match["unit"])
    if unit is None or is_product:
        return None
    value = number * sympy.Rational(unit.factor.numerator, unit.factor.denominator)
    return NormalForm(f"{_written(value)} {unit}".strip(), _written(number))


def _split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that are in no brackets."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<separator>{separators})|.", text, re.DOTALL):
        if token[0] in _OPENS:
            depth += 1
        elif token[0] in _CLOSES:
            depth -= 1
        elif token["separator"] and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


def _closing(text: str) -> int:
    """The index of the bracket that closes the first one; -1 if none does."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENS) - (character in _CLOSES)
        if depth == 0:
            return index
    return -1


def _without_name(text: str) -> str:
    """Removes the name of a value: x =, f(x) =, (x, y) =, x in."""
    name = _NAME.match(text)
    return text[name.end() :] if name else text


def _without_thousands(text: str) -> str:
    """Removes separators between thousands, outside of brackets, where a comma separates the parts of a pair."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        in_brackets = sum(before.count(opens) for opens in _OPENS) > sum(before.count(closes) for closes in _CLOSES)
        return match[0] if in_brackets else re.sub("[, ]", "", match[0])

    return _THOUSANDS.sub(joined, text)


def _letters(text: str) -> str:
    """The text without case, without spaces beside punctuation, and without unmatched brackets at its ends."""
    text = " ".join(text.casefold().split())
    text = re.sub(r"(?<=[_^])\{(\w+)\}", r"\1", text)
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text).strip("()")


def _written(value: sympy.Expr) -> str:
    return str(value).casefold() if isinstance(value, sympy.Symbol) else str(value)
