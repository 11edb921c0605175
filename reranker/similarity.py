"""How alike two texts are, between 0 and 1: the overlap of their character trigrams.

Sørensen-Dice over sets: 2·|A ∩ B| / (|A| + |B|), as in approximate string search. It needs no model and no notion of a
word, so it serves every script; it sees wording, not meaning.
"""

from collections.abc import Sequence


def trigram_similarity(texts: Sequence[str]) -> list[list[float]]:
    """Of each with each, N × N: symmetric, 1 on the diagonal; case and the amount of white space do not count."""
    grams_N = [_trigrams(text) for text in texts]
    return [[_dice(one, other) for other in grams_N] for one in grams_N]


def _trigrams(text: str) -> set[str]:
    letters = " ".join(text.casefold().split())
    return {letters[start : start + 3] for start in range(max(1, len(letters) - 2))}


def _dice(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other))
