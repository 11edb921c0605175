"""Token buckets: the rate limit behind the budgets of an API key.

A bucket holds the amount that may be spent at once, and refills evenly: a budget of 60 a minute gains 1 each second,
and after a quiet minute all 60 may be spent at once. A request for more than the bucket holds is admitted when the
bucket is full, and leaves a debt that has to refill first. So no request is too large to be admitted at all, and in the
long run nobody spends more than the budget.
"""


class TokenBucket:
    """Holds at most `capacity` and refills at `capacity / period_s`; full at first. The caller passes the time."""

    def __init__(self, capacity: float, period_s: float, now_s: float) -> None:
        self._capacity = capacity
        self._rate_per_s = capacity / period_s
        self._level = capacity
        self._refilled_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0 if it may be taken now."""
        self._refill(now_s)
        return max(0.0, min(amount, self._capacity) - self._level) / self._rate_per_s

    def take(self, amount: float, now_s: float) -> None:
        """Takes the amount; a negative amount returns what was reserved and not used."""
        self._refill(now_s)
        self._level = min(self._level - amount, self._capacity)

    def _refill(self, now_s: float) -> None:
        self._level = min(self._capacity, self._level + (now_s - self._refilled_s) * self._rate_per_s)
        self._refilled_s = now_s
