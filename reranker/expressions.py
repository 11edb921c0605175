r"""The exact value of a short mathematical expression, however it is written: 1/2, 0.5, \frac{1}{2}, 1 1/2 - 1.

The text is untrusted. A grammar parses it (LALR: linear time, and only the operations in the grammar run), and SymPy
computes it exactly, one operation at a time. Each operation is bounded before it runs: no number of more than
`MAX_BITS` bits, no sum of more than `MAX_TERMS` terms, no root of a degree above `MAX_ROOT`. An expression that is
longer, larger or not in the grammar has no value here.

The grammar is cautious. A run of letters is a word and not a product, so "Paris" does not equal "pairs". An ambiguous
notation (2^3^2) is not parsed at all. Functions such as the sine are names with an argument and are not computed.
"""

import re
from functools import lru_cache
from math import prod

import sympy
from lark import Lark, LarkError, Transformer, v_args

MAX_CHARS = 100
"""Longest text that is parsed: an answer, not a derivation."""
MAX_BITS = 2048
MAX_TERMS = 64
MAX_ROOT = 10
MAX_FACTORIAL = 100
MAX_DIGITS = 4
MAX_SYMBOLIC_BITS = 10
"""Bounds far above the answers that people write; the slowest of 170,000 random texts took a third of a second.
`MAX_DIGITS` is the longest exponent of ten, in digits; `MAX_SYMBOLIC_BITS` is of the numbers beside letters in an
exponent."""

GRAMMAR = r"""
?start: sum
?sum: product
    | sum "+" product -> add
    | sum MINUS product -> subtract
?product: signed
    | product TIMES signed -> multiply
    | product DIVIDE signed -> divide
    | product beside -> multiply
?signed: power
    | MINUS signed -> negate
    | "+" signed -> plus
?power: postfix
    | postfix POWER exponent -> power
?beside: following
    | following POWER exponent -> power
?exponent: atom
    | MINUS atom -> negate
?postfix: atom
    | atom PERCENT -> percent
    | atom FACTORIAL -> factorial
?atom: NUMBER -> number
    | REPEATING -> repeating
    | MIXED -> mixed
    | FRACTION "{" sum "}" "{" sum "}" -> divide
    | BINOMIAL "{" sum "}" "{" sum "}" -> binomial
    | following
?following: LETTER -> symbol
    | PI -> pi
    | "(" sum ")"
    | "{" sum "}"
    | ROOT atom -> root
    | ROOT "[" NUMBER "]" "{" sum "}" -> root_of_degree
    | FUNCTION argument -> function
    | FUNCTION POWER exponent argument -> power_of_function
?argument: atom
    | NUMBER LETTER -> letters
    | NUMBER PI -> pis

NUMBER: /([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/
REPEATING.2: /[0-9]*\.[0-9]*\\overline\{[0-9]+\}/
MIXED.2: /[0-9]+ +[0-9]+ *\/ *[0-9]+|[0-9]+ *\\frac\{[0-9]+\}\{[0-9]+\}/
LETTER: /(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])/
MINUS: "-"
TIMES: "*" | "\\cdot" | "\\times"
DIVIDE: "/" | "\\div"
POWER.2: "^" | "**"
PERCENT: "%"
FACTORIAL: "!"
PI: /\\?pi(?![A-Za-z])/
ROOT: /\\?sqrt(?![A-Za-z])/
FRACTION: /\\frac(?![A-Za-z])/
BINOMIAL: /\\binom(?![A-Za-z])/
FUNCTION: /\\?(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![A-Za-z])(_([0-9a-z]|\{[0-9a-z]+\}))?/
%ignore /\s+/
"""


class _OutOfBoundsError(ValueError):
    """An operation that has no value, or a value beyond the bounds."""


@v_args(inline=True)
class _ExactEvaluator(Transformer[object, sympy.Expr]):
    """Computes bottom-up; every value is expanded, so that equal polynomials have the same form."""

    def number(self, text: str) -> sympy.Expr:
        digits, _, exponent = text.casefold().partition("e")
        if len(exponent) > MAX_DIGITS:
            raise _OutOfBoundsError("the number is too long")
        return self.multiply(sympy.Rational(digits), _power(sympy.Integer(10), sympy.Integer(exponent or 0)))

    def repeating(self, text: str) -> sympy.Expr:
        digits, _, period = text.removesuffix("}").partition("\\overline{")
        decimals = len(digits.partition(".")[2])
        repeated = sympy.Rational(int(period), 10 ** len(period) - 1)
        return sympy.Rational(digits + "0") + repeated / 10**decimals

    def mixed(self, text: str) -> sympy.Expr:
        whole, dividend, divisor = map(sympy.Integer, re.findall("[0-9]+", text))
        return whole + self.divide(dividend, divisor)

    def symbol(self, letter: str) -> sympy.Expr:
        return sympy.Symbol(letter)

    def pi(self, _: str) -> sympy.Expr:
        return sympy.pi

    def plus(self, value: sympy.Expr) -> sympy.Expr:
        return value

    def factorial(self, value: sympy.Expr, _: str) -> sympy.Expr:
        return sympy.factorial(_count(value))

    def binomial(self, _: str, all_of_them: sympy.Expr, chosen: sympy.Expr) -> sympy.Expr:
        return sympy.binomial(_count(all_of_them), _count(chosen))

    def function(self, name: str, argument: sympy.Expr) -> sympy.Expr:
        return sympy.Function(re.sub(r"[\\{}]", "", name))(argument)

    def power_of_function(self, name: str, _: str, exponent: sympy.Expr, argument: sympy.Expr) -> sympy.Expr:
        return _power(self.function(name, argument), exponent)

    def letters(self, number: str, letter: str) -> sympy.Expr:
        return self.multiply(self.number(number), self.symbol(letter))

    def pis(self, number: str, _: str) -> sympy.Expr:
        return self.multiply(self.number(number), sympy.pi)

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

    def power(self, base: sympy.Expr, _: str, exponent: sympy.Expr) -> sympy.Expr:
        return _power(base, exponent)

    def root(self, _: str, value: sympy.Expr) -> sympy.Expr:
        return _power(value, sympy.Rational(1, 2))

    def root_of_degree(self, _: str, degree: str, value: sympy.Expr) -> sympy.Expr:
        return _power(value, self.divide(sympy.Integer(1), self.number(degree)))


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if not isinstance(exponent, sympy.Rational):
        return _symbolic_power(base, exponent)
    if base.is_zero and exponent <= 0:
        raise _OutOfBoundsError("zero to the power of zero or less")
    largest = max((_bits(number) for number in base.atoms(sympy.Rational)), default=1)
    if exponent.q > MAX_ROOT or abs(exponent.p) * largest > MAX_BITS:
        raise _OutOfBoundsError("the number is too long")
    _check_terms(_terms(base) ** abs(exponent.p))
    return sympy.expand(base**exponent)


def _symbolic_power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """The power of a single term, with letters in the exponent."""
    longest = max((_bits(number) for number in exponent.atoms(sympy.Rational)), default=1)
    if base.is_Add or base.is_zero or longest > MAX_SYMBOLIC_BITS:
        raise _OutOfBoundsError("the power is too large")
    _check_terms(_terms(base) * _terms(exponent))
    return sympy.expand(sympy.Pow(base, exponent))


def _count(value: sympy.Expr) -> sympy.Integer:
    if not isinstance(value, sympy.Integer) or not 0 <= value <= MAX_FACTORIAL:
        raise _OutOfBoundsError("it is no whole number within the bounds")
    return value


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
def evaluate(text: str) -> sympy.Expr | None:
    """The exact value, in the same form for all ways to write it; None if the text has none."""
    if len(text) > MAX_CHARS:
        return None
    try:
        value: sympy.Expr = _PARSER.parse(text)
    except (LarkError, _OutOfBoundsError):
        return None
    return value
