"""Equal answers become equal strings, and no untrusted text or pattern can hang the server or run code."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.answers import AnswerError, by_json_pointer, by_regex, canonical, canonical_answers, whole_text
from reranker.expressions import evaluate

with (Path(__file__).parent / "answer_pairs.tsv").open(newline="") as _file:
    PAIRS = list(csv.DictReader(_file, delimiter="\t", quoting=csv.QUOTE_NONE))


def are_equal(*answers: str) -> bool:
    """Whether the answers are one when they are counted together."""
    return len(set(canonical_answers(dict(enumerate(answers))).values())) == 1


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['first']} {pair['verdict']} {pair['second']}")
def test_a_pair_of_the_table_is_equal_or_different_as_it_says(pair: dict[str, str]) -> None:
    assert are_equal(pair["first"], pair["second"]) == (pair["verdict"] == "equal"), pair["reason"]


def test_the_table_has_two_hundred_pairs_each_with_a_reason() -> None:
    assert len({(pair["first"], pair["second"]) for pair in PAIRS}) == 200
    assert {pair["verdict"] for pair in PAIRS} == {"equal", "different"}
    assert all(pair["reason"] for pair in PAIRS)


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(["1/2", "0.5", ".50", "50%", r"\frac{1}{2}", r"\dfrac12", r"$\frac{1}{2}$", "2^-1"], id="a half"),
        pytest.param(["1000", "1,000", "1{,}000", "1000.0", "$1,000.00", r"\$1000", "10^3"], id="a thousand"),
        pytest.param(["-3", "\u22123", "- 3", "x = -3", r"\boxed{-3}", "-3."], id="minus three"),
        pytest.param([r"2\sqrt{2}", r"\sqrt{8}", "sqrt(8)", "8^(1/2)", r"\sqrt[2]{8}"], id="the root of eight"),
        pytest.param(["x+1", "1 + x", r"\left(x+1\right)", "2x/2 + 1"], id="a sum in any order"),
        pytest.param(["(x+1)^2", "x^2+2x+1", "(x+1)(x+1)"], id="a polynomial multiplied out or not"),
        pytest.param(["pi/2", r"\frac{\pi}{2}", "0.5π"], id="a quarter turn"),
        pytest.param(["Paris", "paris.", " PARIS ", r"\text{Paris}"], id="a word"),
        pytest.param(["A", "(A)", "a", r"\boxed{\text{A}}"], id="a choice"),
        pytest.param(["new york", "New   York"], id="two words"),
        pytest.param(["x", "2x/2", "1x", "(x)"], id="a variable"),
    ],
)
def test_all_ways_to_write_an_answer_count_as_one(ways: list[str]) -> None:
    assert are_equal(*ways)


class TestUnits:
    def test_a_number_without_a_unit_counts_as_the_quantity_of_that_number(self) -> None:
        assert set(canonical_answers({0: "5 cm", 1: "5", 2: "x = 5", 3: "6"}).values()) == {"1/20 m", "6"}

    def test_a_number_without_a_unit_stays_apart_if_there_are_several_quantities_of_it(self) -> None:
        assert len(set(canonical_answers({0: "5 cm", 1: "5", 2: "5 m"}).values())) == 3

    def test_without_the_percent_sign_a_percentage_and_its_value_are_different(self) -> None:
        assert not are_equal("50", "0.5")
        assert are_equal("50", "0.5", "50%")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2", "1/3"),
        ("2^3^2", "64"),  # an ambiguous notation is compared by its letters
        ("12 apples", "12"),
        ("x + y = 5", "x - y = 5"),
        ("2x + 4y = 0", "2x - 4y = 0"),
        ("(100,200)", "100200"),
        ("0.333", "1/3"),
    ],
)
def test_different_answers_have_different_forms(first: str, second: str) -> None:
    assert not are_equal(first, second)


@pytest.mark.parametrize("nothing", ["", "  ", ".", "$$", r"\text{}", " " * 10_000])
def test_an_answer_without_content_is_none(nothing: str) -> None:
    assert canonical(nothing) is None


def test_a_long_text_is_compared_by_its_letters() -> None:
    text = "The film was  dull and 1/2 of it too long. " * 200
    assert are_equal(text, text.upper().replace("  ", " "))
    assert not are_equal(text, text.replace("1/2", "0.5"))


HOSTILE = [
    "__import__('os').getcwd()",
    "9^9^9^9",
    "9^{9^{9^9}}",
    "9^99999999",
    "((9^99)^99)^99",
    "453464^39.403669",
    "2^0.000000001",
    "99999999!",
    "100!!",
    "1e99999",
    "1e999^9",
    r"\binom{100000000}{50000000}",
    r"\sum_{i=1}^{1000000000} i",
    "(a+b+c+d+e+f+g+h)^99",
    "(a+b)(c+d)(e+f)(g+h)(i+j)(k+l)(m+n)",
    "((1/(a+b))^20)^20",
    "2^{99999x}",
    "(a+b)^{x+y}",
    "1/0",
    "1 1/0",
    "(x-x)^-1",
    "(" * 10_000 + "1" + ")" * 10_000,
    r"\boxed{" * 2_000,
    r"\text{" * 60 + "}" * 60 + "1" * 2_000,
    "{1,2}" * 80,
    "9" * 10_000,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile[:40])
def test_a_hostile_text_has_no_value_and_is_compared_by_its_letters(hostile: str) -> None:
    """Without bounds most of these would not end."""
    assert evaluate(hostile) is None
    assert canonical(hostile)


TOKENS = (
    r"1 2 99 0.5 1e9 x a ( ) [ ] { } \{ \} + - * / ^ ! % = < <= , ; \frac{ \sqrt{ \sqrt[3]{ \binom{ \pi \infty \pm "
    r"\sin \log_2 \cup \text{ \boxed{ \overline{3} . $ \$ ° cm m ^2 million & \\ ½ ² \begin{pmatrix} \end{pmatrix}"
)


@given(st.one_of(st.text(), st.lists(st.sampled_from([*TOKENS.split(), " "])).map("".join)))
def test_any_text_has_a_form_that_equals_its_own(text: str) -> None:
    assert canonical(text) == canonical(f"\n{text}\n")


class TestRegex:
    def test_the_first_match_is_extracted(self) -> None:
        assert by_regex("answer is ([0-9]+)")("The answer is 4, no, the answer is 5.") == "4"

    def test_a_pattern_with_a_greedy_start_extracts_the_last_match(self) -> None:
        assert by_regex("(?s:.*)answer is ([0-9]+)")("The answer is 4.\nNo, the answer is 5.") == "5"

    @pytest.mark.parametrize("text", ["no number", ""])
    def test_a_text_without_a_match_has_no_answer(self, text: str) -> None:
        assert by_regex("([0-9]+)")(text) is None

    def test_a_group_outside_the_match_gives_no_answer(self) -> None:
        assert by_regex("(a)|b")("b") is None

    def test_a_pattern_matches_characters_and_not_bytes(self) -> None:
        assert by_regex("naïve (.)")("so naïve é!") == "é"

    @pytest.mark.parametrize(
        ("pattern", "reason"),
        [
            ("([0-9]+", "missing"),
            ("[0-9]+", "0 groups"),
            ("(a)(b)", "2 groups"),
            (r"(a)\1", "invalid escape"),
            ("(?=a)(b)", "invalid perl operator"),
            ("(((a{1000}){1000}){1000}){1000}", "repetition size"),  # a backtracking engine would unroll it in memory
            (r"(\p{L}{1000})", "too large"),
        ],
    )
    def test_an_unusable_pattern_is_refused_with_the_reason(self, pattern: str, reason: str) -> None:
        with pytest.raises(AnswerError, match=reason):
            by_regex(pattern)

    def test_a_pattern_that_hangs_a_backtracking_engine_ends(self) -> None:
        assert by_regex("((?:a|aa)+)$")("a" * 10_000 + "b") is None


class TestJsonPointer:
    DOCUMENT = (
        '{"answer": {"value": 0.50, "steps": ["one", "two"]}, "a/b": 1, "m~n": 2, "": 3, "none": null, "yes": true}'
    )

    @pytest.mark.parametrize(
        ("pointer", "answer"),
        [
            ("/answer/value", "0.50"),
            ("/answer/steps/1", "two"),
            ("/answer/steps", '["one", "two"]'),
            ("/a~1b", "1"),
            ("/m~0n", "2"),
            ("/", "3"),
            ("/yes", "true"),
            ("/none", None),
            ("/nowhere", None),
            ("/answer/steps/2", None),
            ("/answer/steps/-", None),
            ("/answer/steps/01", None),
            ("/answer/value/0", None),
        ],
    )
    def test_a_pointer_extracts_the_value_it_points_at(self, pointer: str, answer: str | None) -> None:
        assert by_json_pointer(pointer)(self.DOCUMENT) == answer

    def test_objects_with_the_same_fields_in_any_order_are_equal(self) -> None:
        whole = by_json_pointer("")
        assert whole('{"a": 1, "b": 2}') == whole('{"b": 2, "a": 1}')

    @pytest.mark.parametrize("text", ["", "not JSON", "{", "[" * 100_000])
    def test_text_that_is_not_json_has_no_answer(self, text: str) -> None:
        assert by_json_pointer("/answer")(text) is None

    def test_a_number_of_any_length_is_read(self) -> None:
        assert by_json_pointer("")("9" * 10_000) == "9" * 10_000

    @pytest.mark.parametrize("pointer", ["answer", "/a~2b", "/a~"])
    def test_an_invalid_pointer_is_refused(self, pointer: str) -> None:
        with pytest.raises(AnswerError, match="begins with /"):
            by_json_pointer(pointer)


def test_the_whole_text_can_be_the_answer() -> None:
    assert canonical(whole_text(" 0.5 ")) == "1/2"
