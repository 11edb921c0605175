"""Generated one-step arithmetic word problems with known answers.

A problem is a sentence with two numbers; its wording says whether to add, subtract or multiply them. The problems are
this easy because SmolLM2-135M solves hardly any two-step problems, and hardly any with large numbers.
"""

from dataclasses import dataclass
from random import Random

NAMES = ("Anna", "Ben", "Clara", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")

ANSWER_REGEX = r"=\s*(-?\d+)"
"""Extracts the result from an answer in the form of the worked examples."""

WORKED_EXAMPLES = """\
Question: Lily has 6 pears and gets 3 more. How many pears does Lily have now?
Answer: 6 + 3 = 9

Question: Max has 12 cards and gives away 4. How many cards are left?
Answer: 12 - 4 = 8

Question: Eva buys 3 bags with 5 nuts in each bag. How many nuts is that in all?
Answer: 3 * 5 = 15

"""


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A question and its answer, an integer; `operands` are the numbers in the question, in order."""

    question: str
    operation: str
    operands: tuple[int, int]
    answer: int

    @property
    def prompt(self) -> str:
        """The policy's prompt: three worked examples, then the question. A newline ends the answer."""
        return f"{WORKED_EXAMPLES}Question: {self.question}\nAnswer:"


def word_problems(count: int, seed: int) -> list[WordProblem]:
    """`count` problems that alternate between the three operations; the same seed gives the same problems.

    No two problems have the same operation on the same numbers in the same order, so any part of the list can be used
    for training and the rest for testing.

    Raises:
        ValueError: fewer than `count` different problems exist.
    """
    random = Random(seed)
    operands = {
        "+": [(a, b) for a in range(2, 21) for b in range(2, 21)],
        "-": [(a, b) for a in range(6, 25) for b in range(2, a - 1)],
        "*": [(a, b) for a in range(2, 14) for b in range(2, 14)],
    }
    problems: list[tuple[str, tuple[int, int]]] = []
    for pairs in operands.values():
        random.shuffle(pairs)
    for turn in range(min(map(len, operands.values()))):
        problems += [(operation, pairs[turn]) for operation, pairs in operands.items()]
    if count > len(problems):
        raise ValueError(f"there are {len(problems)} different problems, not {count}")
    return [_worded(operation, a, b, random) for operation, (a, b) in problems[:count]]


def _worded(operation: str, a: int, b: int, random: Random) -> WordProblem:
    name, things = random.choice(NAMES), random.choice(THINGS)
    match operation:
        case "+":
            return WordProblem(
                f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
                operation,
                (a, b),
                a + b,
            )
        case "-":
            return WordProblem(
                f"{name} has {a} {things} and gives away {b}. How many {things} are left?", operation, (a, b), a - b
            )
        case _:
            return WordProblem(
                f"{name} buys {a} bags with {b} {things} in each bag. How many {things} is that in all?",
                operation,
                (a, b),
                a * b,
            )
