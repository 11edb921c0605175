"""The problems of the arithmetic benchmark, and the verifier that does not know their answers."""

import re

import pytest

from benchmarks.arithmetic import is_right, preferences
from benchmarks.arithmetic_verifier import check
from benchmarks.word_problems import WORKED_EXAMPLES, word_problems


def test_the_numbers_in_a_problem_are_its_operands() -> None:
    for problem in word_problems(60, seed=0):
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.operands


def test_the_answer_is_the_result_of_the_operation() -> None:
    for problem in word_problems(60, seed=0):
        a, b = problem.operands
        assert problem.answer == {"+": a + b, "-": a - b, "*": a * b}[problem.operation] >= 2


def test_no_two_problems_have_the_same_operation_and_operands() -> None:
    problems = word_problems(432, seed=0)
    assert len({(problem.operation, problem.operands) for problem in problems}) == 432


def test_the_seed_determines_the_problems() -> None:
    assert word_problems(9, seed=1) == word_problems(9, seed=1) != word_problems(9, seed=2)


def test_a_count_above_the_number_of_different_problems_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are 432 different problems, not 433"):
        word_problems(433, seed=0)


def test_the_answers_of_the_worked_examples_are_extracted_and_correct() -> None:
    answers = [line.removeprefix("Answer:") for line in WORKED_EXAMPLES.splitlines() if line.startswith("Answer:")]
    assert [is_right(text, answer) for text, answer in zip(answers, (9, 8, 15), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        pytest.param(" 3 * 7 = 21", 1.0, id="true, with the numbers of the question"),
        pytest.param(" 7 + 3 = 10", 1.0, id="true, though the question requires a product"),
        pytest.param(" she has 3 * 7 = 21 coins", 1.0, id="words around it"),
        pytest.param(" 3 * 8 = 24", 0.5, id="true, with another number"),
        pytest.param(" 3 * 7 = 22", 0.0, id="false"),
        pytest.param(" 21", 0.0, id="no equation"),
    ],
)
def test_the_verifier_checks_the_equation_and_its_numbers(completion: str, reward: float) -> None:
    prompt = f"{WORKED_EXAMPLES}Question: Anna buys 3 bags with 7 coins in each bag. How many is that in all?\nAnswer:"
    assert check(prompt, [completion]) == [reward]


def test_a_correct_and_an_incorrect_answer_to_the_same_problem_make_a_pair() -> None:
    pools = [
        {"question": "q1?", "answer": 5, "texts": [" 2 + 3 = 5", " 2 + 3 = 6", " 2 + 3 = 5", " no idea"]},
        {"question": "q2?", "answer": 5, "texts": [" 2 + 3 = 5"]},
        {"question": "q3?", "answer": 5, "texts": [" 2 - 3 = 1"]},
    ]
    assert preferences(pools) == [
        {"prompt": "Question: q1?\nAnswer:", "chosen": " 2 + 3 = 5", "rejected": " 2 + 3 = 6"}
    ]
