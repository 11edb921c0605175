"""Stop strings in an answer that is sampled block by block, where one may start in a block and end in the next.

The engine finds a stop string that lies inside the tokens it samples in one call. The functions here find a stop string
that spans two calls, and hold back text that may turn out to be the start of one.
"""

from collections.abc import Sequence
from dataclasses import replace

from reranker.candidate import Candidate


def cut_at_spanning_stop(candidate: Candidate, boundary: int, stop: Sequence[str]) -> Candidate:
    """The candidate, ended where a stop string starts before character `boundary` of its text and ends after it."""
    text = candidate.text
    starts = (text.find(string, max(0, boundary - len(string) + 1), boundary + len(string) - 1) for string in stop)
    first = min((start for start in starts if start >= 0), default=None)
    return candidate if first is None else replace(candidate, text=text[:first], finish_reason="stop")


def text_before_possible_stop(text: str, stop: Sequence[str]) -> str:
    """The text without the longest suffix that is the start of a stop string."""
    suffixes = (length for string in stop for length in range(1, len(string)) if text.endswith(string[:length]))
    return text[: len(text) - max(suffixes, default=0)]
