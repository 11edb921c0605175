"""The problems of the arithmetic benchmark, and the verifier that does not know their answers."""

import re

import pytest

from benchmarks.arithmetic import is_right, preferences
from benchmarks.arithmetic_verifier import check
from benchmarks.word_problems import WORKED_EXAMPLES, word_problems


def test_a_problem_says_its_operands_and_no_other_number() -> None:
    for problem in word_problems(60, seed=0):
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.operands


def test_the_answer_is_what_the_operation_gives() -> None:
    for problem in word_problems(60, seed=0):
        a, b = problem.operands
        assert problem.answer == {"+": a + b, "-": a - b, "*": a * b}[problem.operation] >= 2


def test_no_sum_is_asked_for_twice() -> None:
    problems = word_problems(432, seed=0)
    assert len({(one.operation, one.operands) for one in problems}) == 432


def test_the_seed_decides_the_problems() -> None:
    assert word_problems(9, seed=1) == word_problems(9, seed=1) != word_problems(9, seed=2)


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are 432 different problems, not 433"):
        word_problems(433, seed=0)


def test_the_worked_examples_are_right_and_in_the_form_that_is_read() -> None:
    answers = [line.removeprefix("Answer:") for line in WORKED_EXAMPLES.splitlines() if line.startswith("Answer:")]
    assert [is_right(text, answer) for text, answer in zip(answers, (9, 8, 15), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        pytest.param(" 3 * 7 = 21", 1.0, id="true, with the numbers of the question"),
        pytest.param(" 7 + 3 = 10", 1.0, id="true, though the question wanted a product: it cannot know"),
        pytest.param(" she has 3 * 7 = 21 coins", 1.0, id="words around it"),
        pytest.param(" 3 * 8 = 24", 0.5, id="true, with another number"),
        pytest.param(" 3 * 7 = 22", 0.0, id="false"),
        pytest.param(" 21", 0.0, id="no equation"),
    ],
)
def test_the_verifier_checks_the_equation_and_its_numbers(completion: str, reward: float) -> None:
    prompt = f"{WORKED_EXAMPLES}Question: Anna buys 3 bags with 7 coins in each bag. How many is that in all?\nAnswer:"
    assert check(prompt, [completion]) == [reward]


def test_a_right_and_a_wrong_answer_to_the_same_problem_make_a_pair() -> None:
    pools = [
        {"question": "q1?", "answer": 5, "texts": [" 2 + 3 = 5", " 2 + 3 = 6", " 2 + 3 = 5", " no idea"]},
        {"question": "q2?", "answer": 5, "texts": [" 2 + 3 = 5"]},
        {"question": "q3?", "answer": 5, "texts": [" 2 - 3 = 1"]},
    ]
    assert preferences(pools) == [
        {"prompt": "Question: q1?\nAnswer:", "chosen": " 2 + 3 = 5", "rejected": " 2 + 3 = 6"}
    ]
