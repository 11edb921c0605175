"""What a stopping policy would have done on candidates that are there already: its winner's reward, and what it drew.

The decisions are those of `reranker.stopping`, by the code that serves; only the drawing is replaced by a pool.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reranker.stopping import SpeculativeRejection, Stopping


@dataclass(frozen=True, slots=True)
class Pool:
    """The candidates of one prompt. `beginnings`: tokens -> the rewards of those cut there."""

    rewards_N: Sequence[float]
    tokens_N: Sequence[int]
    beginnings: Mapping[int, Sequence[float | None]] = field(default_factory=dict)

    def of(self, indices: Sequence[int]) -> "Pool":
        """Those candidates, in that order."""
        cut = {length: [rewards[index] for index in indices] for length, rewards in self.beginnings.items()}
        return Pool([self.rewards_N[i] for i in indices], [self.tokens_N[i] for i in indices], cut)


def spend(pool: Pool, stopping: Stopping, best_of: int) -> tuple[float, int]:
    """The winner's reward and the tokens drawn, with the candidates in the order of the pool."""
    drawn, tokens, left = 0, 0, dict[int, float]()
    while drawn < best_of:
        rewards = [left.get(index, math.nan) for index in range(drawn)]
        wave = stopping.waves.next_wave(rewards) if stopping.waves else best_of
        if not wave:
            break
        survivors, spent = _run_wave(pool, range(drawn, drawn + wave), stopping.rejection)
        left |= {index: pool.rewards_N[index] for index in survivors}
        tokens += spent
        drawn += wave
    return max(left.values()), tokens


def _run_wave(pool: Pool, wave: range, rejection: SpeculativeRejection | None) -> tuple[set[int], int]:
    running, tokens = set(wave), 0
    ended: set[int] = set()
    for length in rejection.checkpoints if rejection else ():
        ended |= {index for index in running if pool.beginnings[length][index] is None}
        running -= ended
        growing = {index: pool.beginnings[length][index] or 0.0 for index in running}
        given_up = rejection.rejected(growing, [pool.rewards_N[index] for index in ended]) if rejection else []
        tokens += length * len(given_up)
        running -= set(given_up)
    survivors = running | ended
    return survivors, tokens + sum(pool.tokens_N[index] for index in survivors)
