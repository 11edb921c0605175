"""Budgets over time, as token buckets.

A bucket holds what may be spent at once and refills evenly: 60 a minute is one each second, and 60 at once after a
quiet minute. More than the bucket holds may be taken from a full one, which then is in debt until it has refilled: no
request is too large to be ever let through, and in the long run nobody gets more than the budget.
"""

MINUTE_S = 60.0
DAY_S = 86_400.0


class Bucket:
    """Refills to `capacity` within `period_s`; full at first. Pure; the caller says what time it is."""

    def __init__(self, capacity: float, period_s: float, now_s: float) -> None:
        self._capacity = capacity
        self._rate_per_s = capacity / period_s
        self._level = capacity
        self._filled_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0 if it may be now."""
        self._refill(now_s)
        return max(0.0, min(amount, self._capacity) - self._level) / self._rate_per_s

    def take(self, amount: float, now_s: float) -> None:
        """Spends the amount; a negative one gives back what was taken and not used."""
        self._refill(now_s)
        self._level = min(self._level - amount, self._capacity)

    def _refill(self, now_s: float) -> None:
        self._level = min(self._capacity, self._level + (now_s - self._filled_s) * self._rate_per_s)
        self._filled_s = now_s
