"""Replays a stopping policy on a recorded pool of candidates: the winner's reward, and the tokens it would have drawn.

The decisions are made by `reranker.stopping`, the same code that serves requests; the pool replaces the sampling.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reranker.stopping import SpeculativeRejection, Stopping


@dataclass(frozen=True, slots=True)
class Pool:
    """The recorded candidates of one prompt.

    `beginnings` maps a length in tokens to N rewards of the candidates cut at that length; None for a candidate that
    had ended before it.
    """

    rewards_N: Sequence[float]
    tokens_N: Sequence[int]
    beginnings: Mapping[int, Sequence[float | None]] = field(default_factory=dict)

    def of(self, indices: Sequence[int]) -> "Pool":
        """The pool of the candidates at these indices, in this order."""
        beginnings = {length: [rewards[index] for index in indices] for length, rewards in self.beginnings.items()}
        return Pool([self.rewards_N[i] for i in indices], [self.tokens_N[i] for i in indices], beginnings)


def replay(pool: Pool, stopping: Stopping, best_of: int) -> tuple[float, int]:
    """(the winner's reward, tokens drawn) of a request that draws the candidates in the order of the pool."""
    drawn, tokens, completed = 0, 0, dict[int, float]()
    while drawn < best_of:
        rewards = [completed.get(index, math.nan) for index in range(drawn)]
        wave = stopping.waves.next_wave(rewards) if stopping.waves else best_of
        if not wave:
            break
        survivors, wave_tokens = _run_wave(pool, range(drawn, drawn + wave), stopping.rejection)
        completed |= {index: pool.rewards_N[index] for index in survivors}
        tokens += wave_tokens
        drawn += wave
    return max(completed.values()), tokens


def _run_wave(pool: Pool, wave: range, rejection: SpeculativeRejection | None) -> tuple[set[int], int]:
    """(the indices that were not cancelled, tokens drawn) of one wave."""
    running, tokens = set(wave), 0
    ended: set[int] = set()
    for length in rejection.checkpoints if rejection else ():
        ended |= {index for index in running if pool.beginnings[length][index] is None}
        running -= ended
        growing = {index: pool.beginnings[length][index] or 0.0 for index in running}
        rejected = rejection.rejected(growing, [pool.rewards_N[index] for index in ended]) if rejection else []
        tokens += length * len(rejected)
        running -= set(rejected)
    survivors = running | ended
    return survivors, tokens + sum(pool.tokens_N[index] for index in survivors)
