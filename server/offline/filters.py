"""The filters of an export. Each one sees the rows that the filters before it have kept, in the order of the fields.

Every row is added once, and only numbers are kept of it. Then `kept` says which rows stay.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Filters:
    """The conditions that a row must meet.

    `min_reward`: least reward of the completion or of the chosen completion. `min_margin`: least difference between the
    rewards of a pair. Unless `keep_duplicates`, a row with the same texts as an earlier row is removed.
    `balance_length`: keeps as many pairs with the longer text chosen as with the shorter text chosen; of the more
    frequent kind, the pairs with the smallest margins are removed. A model trained on the rest does not learn that
    longer is better. `top_fraction`: keeps this share of the rows, those with the highest reward; it is applied last.
    """

    min_reward: float | None = None
    min_margin: float | None = None
    keep_duplicates: bool = False
    balance_length: bool = False
    top_fraction: float | None = None


class RowFilter:
    """Applies the filters. `counts` holds the number of rows, and how many each filter removed."""

    def __init__(self, filters: Filters) -> None:
        self.counts: Counter[str] = Counter()
        self._filters = filters
        self._kept = array("b")
        self._rewards = array("d")
        self._margins = array("d")
        self._longer = array("b")
        self._digests: set[bytes] = set()

    def add(self, reward: float | None, margin: float | None, longer: int, digest: bytes) -> None:
        """Adds the next row, described as in `server.offline.export.ExportRow`."""
        removed_by = self._removed_by(reward, margin, digest)
        self.counts["rows"] += 1
        if removed_by:
            self.counts[removed_by] += 1
        self._kept.append(not removed_by)
        self._rewards.append(-math.inf if reward is None else reward)
        self._margins.append(margin or 0.0)
        self._longer.append(longer)

    def kept(self) -> npt.NDArray[np.bool_]:
        """Whether each row stays, in the order in which the rows were added. To be called once, after the last row."""
        kept = np.array(self._kept, dtype=bool)
        if self._filters.balance_length:
            longer, margins = np.array(self._longer), np.array(self._margins)
            sides = [np.flatnonzero(kept & (longer == side)) for side in (1, -1)]
            fewer = min(len(side) for side in sides)
            for side in sides:
                surplus = side[np.argsort(-margins[side], kind="stable")][fewer:]
                kept[surplus] = False
                self.counts["length_balance"] += len(surplus)
        if self._filters.top_fraction is not None:
            left = np.flatnonzero(kept)
            rewards = np.array(self._rewards)[left]
            surplus = left[np.argsort(-rewards, kind="stable")][math.ceil(self._filters.top_fraction * len(left)) :]
            kept[surplus] = False
            self.counts["top_fraction"] += len(surplus)
        return kept

    def describe_counts(self) -> str:
        return ", ".join(f"{name}: {count}" for name, count in self.counts.items()) or "no rows"

    def _removed_by(self, reward: float | None, margin: float | None, digest: bytes) -> str | None:
        filters = self._filters
        if filters.min_reward is not None and (reward is None or reward < filters.min_reward):
            return "min_reward"
        if filters.min_margin is not None and (margin is None or margin < filters.min_margin):
            return "min_margin"
        if not filters.keep_duplicates:
            if digest in self._digests:
                return "duplicates"
            self._digests.add(digest)
        return None
