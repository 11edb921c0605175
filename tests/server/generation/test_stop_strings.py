"""Stop strings that start in one block of an answer and end in the next."""

import pytest

from reranker.candidate import Candidate
from server.generation.stop_strings import cut_at_spanning_stop, text_before_possible_stop


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("##",), None), (("##", "o #t"), "one tw"), ((" ", "two #"), "one "), (("#thr", "two "), None)],
    ids=["no match", "one spans the boundary", "the first of two matches", "both on one side"],
)
def test_a_stop_string_that_spans_the_boundary_ends_the_answer(stop: tuple[str, ...], text: str | None) -> None:
    candidate = Candidate(0, "one two #three", 3, finish_reason="length")
    result = cut_at_spanning_stop(candidate, len("one two "), stop)
    assert result.text == (candidate.text if text is None else text)
    assert result.finish_reason == ("length" if text is None else "stop")


def test_a_stop_string_after_the_boundary_is_left_to_the_engine() -> None:
    candidate = Candidate(0, "one two##three", 3, finish_reason="length")
    assert cut_at_spanning_stop(candidate, len("one two"), ("##",)) == candidate


@pytest.mark.parametrize(
    ("text", "certain"), [("one #", "one "), ("one ##", "one "), ("one", "one"), ("one # ", "one # ")]
)
def test_text_that_may_start_a_stop_string_is_held_back(text: str, certain: str) -> None:
    assert text_before_possible_stop(text, ("###", "\n")) == certain
