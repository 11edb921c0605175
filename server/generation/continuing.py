"""Answers that are drawn piece by piece: a stop string may begin in one piece and end in the next.

The engine looks for stop strings in what it has drawn itself. One across the seam is found here, and what may turn out
to be the beginning of one is not told yet.
"""

from collections.abc import Sequence
from dataclasses import replace

from reranker.candidate import Candidate

NOTHING = Candidate(index=0, text="", num_tokens=0)


def stopped_across(candidate: Candidate, seam: int, stop: Sequence[str]) -> Candidate:
    """The candidate, ended where a stop string begins before character `seam` of its text and ends after it."""
    text = candidate.text
    found = (text.find(one, max(0, seam - len(one) + 1), seam + len(one) - 1) for one in stop)
    begins = min((place for place in found if place >= 0), default=None)
    return candidate if begins is None else replace(candidate, text=text[:begins], finish_reason="stop")


def certain_text(text: str, stop: Sequence[str]) -> str:
    """The text without what at its end may be the beginning of a stop string."""
    held = (length for one in stop for length in range(1, len(one)) if text.endswith(one[:length]))
    return text[: len(text) - max(held, default=0)]
