"""Which rows of an export stay. Each filter looks at what those before it have left, in the order of the fields.

The rows go by once and leave only numbers behind; then `made` says of each whether it stays.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Filters:
    """What takes rows away.

    `min_reward`: of the completion, or the chosen one. `min_margin`: of a pair. `keep_duplicates`: else a row whose
    texts were there before goes.
    `balance_length`: as many pairs stay whose chosen text is the longer one as pairs whose chosen text is the shorter
    one; of the many, those with the smallest margins go. A model trained on the rest does not learn that longer is
    better. `top_fraction`: this share of the rows, those of the highest reward; it comes last.
    """

    min_reward: float | None = None
    min_margin: float | None = None
    keep_duplicates: bool = False
    balance_length: bool = False
    top_fraction: float | None = None


class RowFilter:
    """Sees every row once, then says which stay. `counts` is how many there were and what each filter took."""

    def __init__(self, filters: Filters) -> None:
        self.counts: Counter[str] = Counter()
        self._filters = filters
        self._stays = array("b")
        self._rewards = array("d")
        self._margins = array("d")
        self._longer = array("b")
        self._seen: set[bytes] = set()

    def see(self, reward: float | None, margin: float | None, longer: int, digest: bytes) -> None:
        """The next row."""
        taken_by = self._taken_by(reward, margin, digest)
        self.counts["rows"] += 1
        if taken_by:
            self.counts[taken_by] += 1
        self._stays.append(not taken_by)
        self._rewards.append(-math.inf if reward is None else reward)
        self._margins.append(margin or 0.0)
        self._longer.append(longer)

    def made(self) -> npt.NDArray[np.bool_]:
        """One truth a row."""
        stays = np.array(self._stays, dtype=bool)
        if self._filters.balance_length:
            longer, margins = np.array(self._longer), np.array(self._margins)
            sides = [np.flatnonzero(stays & (longer == side)) for side in (1, -1)]
            few = min(len(side) for side in sides)
            for side in sides:
                surplus = side[np.argsort(-margins[side], kind="stable")][few:]
                stays[surplus] = False
                self.counts["length_balance"] += len(surplus)
        if self._filters.top_fraction is not None:
            left = np.flatnonzero(stays)
            rewards = np.array(self._rewards)[left]
            surplus = left[np.argsort(-rewards, kind="stable")][math.ceil(self._filters.top_fraction * len(left)) :]
            stays[surplus] = False
            self.counts["top_fraction"] += len(surplus)
        return stays

    def told(self) -> str:
        return ", ".join(f"{name}: {count}" for name, count in self.counts.items()) or "no rows"

    def _taken_by(self, reward: float | None, margin: float | None, digest: bytes) -> str | None:
        filters = self._filters
        if filters.min_reward is not None and (reward is None or reward < filters.min_reward):
            return "min_reward"
        if filters.min_margin is not None and (margin is None or margin < filters.min_margin):
            return "min_margin"
        if not filters.keep_duplicates:
            if digest in self._seen:
                return "duplicates"
            self._seen.add(digest)
        return None
