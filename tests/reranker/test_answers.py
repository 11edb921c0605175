"""Equal answers become equal strings, and no untrusted text or pattern can hang the server or run code."""

import time

import pytest

from reranker.answers import AnswerError, by_json_pointer, by_regex, canonical, whole_text


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
    ],
)
def test_all_ways_to_write_an_answer_have_the_same_form(ways: list[str]) -> None:
    assert len({canonical(way) for way in ways}) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2", "1/3"),
        ("Paris", "pairs"),  # a run of letters is a word and not a product
        ("1 1/2", "0.5"),  # it may be a mixed number or a product, so it is compared as text
        ("2^3^2", "64"),
        ("12 apples", "12"),
        ("x", "y"),
        ("1e3", "1000"),
        ("0.333", "1/3"),
    ],
)
def test_different_answers_have_different_forms(first: str, second: str) -> None:
    assert canonical(first) != canonical(second)


@pytest.mark.parametrize("nothing", ["", "  ", ".", "$$", r"\text{}"])
def test_an_answer_without_content_is_none(nothing: str) -> None:
    assert canonical(nothing) is None


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').getcwd()",
        "9^9^9^9",
        "9^{9^{9^9}}",
        "9^99999999",
        "((9^99)^99)^99",
        "453464^39.403669",
        "2^0.000000001",
        "99999999!",
        r"\binom{100000000}{50000000}",
        r"\sum_{i=1}^{1000000000} i",
        "(a+b+c+d+e+f+g+h)^99",
        "(a+b)(c+d)(e+f)(g+h)(i+j)(k+l)(m+n)",
        "((1/(a+b))^20)^20",
        "1/0",
        "(x-x)^-1",
        "(" * 10_000 + "1" + ")" * 10_000,
        "9" * 10_000,
    ],
)
def test_a_hostile_text_is_compared_as_text_within_seconds(hostile: str) -> None:
    canonical("1+1")  # SymPy is imported before the clock starts
    began_s = time.perf_counter()
    assert canonical(hostile) == hostile.casefold().strip("()")
    assert time.perf_counter() - began_s < 5


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

    def test_a_pattern_that_hangs_a_backtracking_engine_takes_linear_time(self) -> None:
        began_s = time.perf_counter()
        assert by_regex("((?:a|aa)+)$")("a" * 10_000 + "b") is None
        assert time.perf_counter() - began_s < 5


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
