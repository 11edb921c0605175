"""A verifier of written sums that does not know the answer: a `python:` scorer in eighteen lines.

It checks what can be checked from the outside: that the equation is true, and that it is about the numbers of the
question. Whether they should have been added or multiplied it cannot tell.
"""

import operator
import re

EQUATION = re.compile(r"(\d+)\s*([-+*])\s*(\d+)\s*=\s*(-?\d+)")
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def check(prompt: str, completions: list[str]) -> list[float]:
    """1 for a true equation over the two numbers of the last question, 0.5 for a true one over others, else 0."""
    asked = sorted(re.findall(r"\d+", prompt.rpartition("Question:")[2]))
    return [_check(asked, completion) for completion in completions]


def _check(asked: list[str], completion: str) -> float:
    found = EQUATION.search(completion)
    if found is None or APPLY[found[2]](int(found[1]), int(found[3])) != int(found[4]):
        return 0.0
    return 1.0 if sorted([found[1], found[3]]) == asked else 0.5
