"""A cache of rewards in front of a scorer: `--score-cache-entries`.

It is for scorers whose reward depends only on prompt and text. That excludes comparisons within a request and the
policy's own probabilities and judgement. The least recently used rewards are evicted. The key is a digest of prompt
and text, so an entry takes some hundred bytes, however long the texts are. Two concurrent calls may both score the
same text. Two kinds of reward are not cached: a missing one, because a retry may succeed, and those of a call in which
the prompt was cut, because the call reports only its largest cut and not that of each candidate.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores

DIGEST_BYTES = 16


class CachedScorer:
    """Returns cached rewards of `scorer`, and scores the rest; `scored_tokens` counts only newly scored candidates.

    `on_lookup` is called once per call of `score`, with the numbers of cached and of uncached candidates.
    """

    def __init__(self, scorer: Scorer, entries: int, on_lookup: Callable[[int, int], None] | None = None) -> None:
        self._scorer = scorer
        self._entries = entries
        self._on_lookup = on_lookup
        self._rewards: OrderedDict[bytes, float] = OrderedDict()  # by digest, least recently used first

    @property
    def name(self) -> str:
        return self._scorer.name

    @property
    def needs(self) -> Needs:
        return self._scorer.needs

    async def check(self, prompt: Prompt) -> None:
        await self._scorer.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Returns one reward per candidate; equal texts are scored once, and cached ones not at all.

        Raises:
            ScoringError: some candidates were not cached, and none of those could be scored.
        """
        keys_N = [digest(prompt, candidate.text) for candidate in candidates]
        rewards = {key: self._rewards[key] for key in keys_N if key in self._rewards}
        self._store(rewards)
        if self._on_lookup is not None:
            hits = sum(key in rewards for key in keys_N)
            self._on_lookup(hits, len(keys_N) - hits)
        uncached = {key: candidate for key, candidate in zip(keys_N, candidates, strict=True) if key not in rewards}
        if not uncached:
            return Scores(tuple(rewards[key] for key in keys_N), scored_tokens=0)
        scores = await self._scorer.score(prompt, list(uncached.values()))
        scored = dict(zip(uncached, scores.rewards_N, strict=True))
        if not scores.prompt_tokens_cut:
            self._store(scored)
        rewards |= scored
        return replace(scores, rewards_N=tuple(rewards[key] for key in keys_N))

    def _store(self, rewards: Mapping[bytes, float]) -> None:
        """Caches rewards as the most recently used, and evicts the least recently used beyond the limit."""
        for key, reward in rewards.items():
            if not math.isnan(reward):
                self._rewards[key] = reward
                self._rewards.move_to_end(key)
        while len(self._rewards) > self._entries:
            self._rewards.popitem(last=False)

    async def close(self) -> None:
        await self._scorer.close()


def digest(prompt: Prompt, text: str) -> bytes:
    """A digest of everything that a scorer reads; each part is preceded by its length, so that parts cannot mix."""
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    turns = [part for message in prompt.messages for part in (message.role, message.content)]
    for part in (str(prompt.text is None), prompt.text or "", *turns, text):
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8))
        hashed.update(encoded)
    return hashed.digest()
