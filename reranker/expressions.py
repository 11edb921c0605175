r"""The exact value of a short mathematical expression, however it is written: 1/2, 0.5, \frac{1}{2}, 50%.

The text is untrusted. A grammar parses it (LALR: linear time, and only the operations in the grammar run), and SymPy
computes it exactly, one operation at a time. Each operation is bounded before it runs: no number of more than
`MAX_BITS` bits, no sum of more than `MAX_TERMS` terms, no root of a degree above `MAX_ROOT`. An expression that is
longer, larger or not in the grammar has no value here.

The grammar is cautious. A run of letters is a word and not a product, so "Paris" does not equal "pairs". An ambiguous
notation (1 1/2, 2^3^2) is not parsed at all.
"""

from functools import lru_cache
from math import prod

import sympy
from lark import Lark, LarkError, Transformer, v_args

MAX_CHARS = 100
"""Longest text that is parsed: an answer, not a derivation."""
MAX_BITS = 2048
MAX_TERMS = 64
MAX_ROOT = 10
"""Bounds far above the answers that people write; the slowest of 40,000 random texts took half a second."""

GRAMMAR = r"""
?start: [LETTER "="] sum -> value
?sum: product
    | sum "+" product -> add
    | sum MINUS product -> subtract
?product: signed
    | product TIMES signed -> multiply
    | product DIVIDE signed -> divide
    | product beside -> multiply
?signed: power
    | MINUS signed -> negate
?power: postfix
    | postfix POWER exponent -> power
?beside: following
    | following POWER exponent -> power
?exponent: atom
    | MINUS atom -> negate
?postfix: atom
    | atom PERCENT -> percent
?atom: NUMBER -> number
    | FRACTION "{" sum "}" "{" sum "}" -> divide
    | FRACTION_OF_DIGITS -> fraction_of_digits
    | following
?following: LETTER -> symbol
    | PI -> pi
    | "(" sum ")"
    | "{" sum "}"
    | BOXED "{" sum "}" -> boxed
    | ROOT atom -> root
    | ROOT "[" NUMBER "]" "{" sum "}" -> root_of_degree

NUMBER: /([0-9]{1,3}((,|\{,\})[0-9]{3})+|[0-9]+)(\.[0-9]*)?|\.[0-9]+/
LETTER: /(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])/
MINUS: "-" | "\u2212"
TIMES: "*" | "\u00d7" | "\u00b7" | "\\cdot" | "\\times"
DIVIDE: "/" | "\u00f7" | "\\div"
POWER: "^" | "**"
PERCENT: "%" | "\\%"
PI: /\\?pi(?![A-Za-z])|π/
ROOT: /\\?sqrt(?![A-Za-z])|√/
BOXED: "\\boxed"
FRACTION: /\\[dt]?frac(?![0-9A-Za-z])/
FRACTION_OF_DIGITS: /\\[dt]?frac[0-9][0-9]/
%ignore /\s+|\\[,;! ]|\\(left|right)(?![A-Za-z])/
"""


class _OutOfBoundsError(ValueError):
    """An operation that has no value, or a value beyond the bounds."""


@v_args(inline=True)
class _ExactEvaluator(Transformer[object, sympy.Expr]):
    """Computes bottom-up; every value is expanded, so that equal polynomials have the same form."""

    def value(self, _name: object, value: sympy.Expr) -> sympy.Expr:
        return value

    def number(self, text: str) -> sympy.Expr:
        return sympy.Rational(text.replace("{,}", "").replace(",", ""))

    def symbol(self, letter: str) -> sympy.Expr:
        return sympy.Symbol(letter)

    def pi(self, _: str) -> sympy.Expr:
        return sympy.pi

    def boxed(self, _: str, value: sympy.Expr) -> sympy.Expr:
        return value

    def percent(self, value: sympy.Expr, _: str) -> sympy.Expr:
        return value / 100

    def negate(self, _: str, value: sympy.Expr) -> sympy.Expr:
        return -value

    def add(self, left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
        return left + right

    def subtract(self, left: sympy.Expr, _: str, right: sympy.Expr) -> sympy.Expr:
        return left - right

    def multiply(self, left: sympy.Expr, *rest: sympy.Expr) -> sympy.Expr:
        right = rest[-1]
        _check_terms(_terms(left) * _terms(right))
        return sympy.expand(left * right)

    def divide(self, *parts: sympy.Expr) -> sympy.Expr:
        dividend, divisor = (part for part in parts if isinstance(part, sympy.Expr))
        return self.multiply(dividend, _power(divisor, sympy.Integer(-1)))

    def fraction_of_digits(self, text: str) -> sympy.Expr:
        return self.divide(sympy.Integer(text[-2]), sympy.Integer(text[-1]))

    def power(self, base: sympy.Expr, _: str, exponent: sympy.Expr) -> sympy.Expr:
        return _power(base, exponent)

    def root(self, _: str, value: sympy.Expr) -> sympy.Expr:
        return _power(value, sympy.Rational(1, 2))

    def root_of_degree(self, _: str, degree: str, value: sympy.Expr) -> sympy.Expr:
        return _power(value, self.divide(sympy.Integer(1), self.number(degree)))


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if not isinstance(exponent, sympy.Rational):
        raise _OutOfBoundsError("the exponent is not a number")
    if base.is_zero and exponent <= 0:
        raise _OutOfBoundsError("zero to the power of zero or less")
    largest = max((_bits(number) for number in base.atoms(sympy.Rational)), default=1)
    if exponent.q > MAX_ROOT or abs(exponent.p) * largest > MAX_BITS:
        raise _OutOfBoundsError("the number is too long")
    _check_terms(_terms(base) ** abs(exponent.p))
    return sympy.expand(base**exponent)


def _bits(number: sympy.Rational) -> int:
    return max(int(number.p).bit_length(), int(number.q).bit_length())


def _terms(value: sympy.Expr) -> int:
    """An upper bound of the terms once multiplied out, counting the sums under roots and in denominators too."""
    return prod(len(node.args) for node in sympy.preorder_traversal(value) if node.is_Add)


def _check_terms(terms: int) -> None:
    if terms > MAX_TERMS:
        raise _OutOfBoundsError("the sum has too many terms")


_PARSER = Lark(GRAMMAR, parser="lalr", transformer=_ExactEvaluator())


@lru_cache(maxsize=4096)
def value_of(text: str) -> str | None:
    """The exact value in a normal form, the same for all ways to write it; None if the text has no value.

    A single letter, with or without brackets, is a multiple-choice answer and not a variable, so it has no value.
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        value = _PARSER.parse(text)
    except (LarkError, _OutOfBoundsError):
        return None
    return None if isinstance(value, sympy.Symbol) else str(value)
