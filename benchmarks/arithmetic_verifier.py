"""A `python:` scorer that verifies written equations without knowing the answer.

It checks that the equation is true and that its operands are the numbers of the question. It cannot check that the
operation is the one the question requires.
"""

import operator
import re

EQUATION = re.compile(r"(\d+)\s*([-+*])\s*(\d+)\s*=\s*(-?\d+)")
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def check(prompt: str, completions: list[str]) -> list[float]:
    """1 for a true equation with the two numbers of the last question, 0.5 for another true equation, else 0."""
    operands = sorted(re.findall(r"\d+", prompt.rpartition("Question:")[2]))
    return [_check(operands, completion) for completion in completions]


def _check(operands: list[str], completion: str) -> float:
    equation = EQUATION.search(completion)
    if equation is None or APPLY[equation[2]](int(equation[1]), int(equation[3])) != int(equation[4]):
        return 0.0
    return 1.0 if sorted([equation[1], equation[3]]) == operands else 0.5
