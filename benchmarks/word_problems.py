"""Arithmetic word problems of one step, made by rule: the answer to each is known.

A problem is a sentence with two numbers that are to be added, subtracted or multiplied; which, the words say. They are
as easy as they are because SmolLM2-135M gets hardly any of two steps right, and of those with long sums no more.
"""

from dataclasses import dataclass
from random import Random

NAMES = ("Anna", "Ben", "Clara", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")

ANSWER_REGEX = r"=\s*(-?\d+)"
"""Where an answer in the form of the worked examples has its result."""

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
    """A question and the whole number that answers it; `operands` are the numbers in it, in order."""

    question: str
    operation: str
    operands: tuple[int, int]
    answer: int

    @property
    def prompt(self) -> str:
        """The question as the policy gets it, after three worked examples; a newline ends the answer."""
        return f"{WORKED_EXAMPLES}Question: {self.question}\nAnswer:"


def word_problems(count: int, seed: int) -> list[WordProblem]:
    """`count` problems, the three operations in turn; the same for the same seed.

    No two have the same operation on the same numbers in the same order, so that any part of the list can be learnt
    from and the rest tested on.

    Raises:
        ValueError: there are not so many.
    """
    random = Random(seed)
    operands = {
        "+": [(a, b) for a in range(2, 21) for b in range(2, 21)],
        "-": [(a, b) for a in range(6, 25) for b in range(2, a - 1)],
        "*": [(a, b) for a in range(2, 14) for b in range(2, 14)],
    }
    in_turn: list[tuple[str, tuple[int, int]]] = []
    for pairs in operands.values():
        random.shuffle(pairs)
    for turn in range(min(map(len, operands.values()))):
        in_turn += [(operation, pairs[turn]) for operation, pairs in operands.items()]
    if count > len(in_turn):
        raise ValueError(f"there are {len(in_turn)} different problems, not {count}")
    return [_worded(operation, a, b, random) for operation, (a, b) in in_turn[:count]]


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
