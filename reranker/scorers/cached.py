"""A scorer that is asked once for each prompt and text: `--score-cache-entries`.

For scorers whose reward depends on nothing but prompt and text, which leaves out comparisons within a request and the
policy's own probabilities and judgement. Kept are the rewards that were asked for last, each under a digest of what it
is of, so an entry takes some hundred bytes however long the texts are. Two calls at the same time may both ask for the
same text. A candidate that could not be scored is not remembered, as the next time may go better; nor is one of a call
in which the prompt was cut, as only the most that was cut in the whole call is told.
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
    """Answers for `scorer` what it has said before; `scored_tokens` are of what it is asked anew.

    `on_lookup` hears of every call how many candidates were known, and how many were not.
    """

    def __init__(self, scorer: Scorer, entries: int, on_lookup: Callable[[int, int], None] | None = None) -> None:
        self._scorer = scorer
        self._entries = entries
        self._on_lookup = on_lookup
        self._known: OrderedDict[bytes, float] = OrderedDict()

    @property
    def name(self) -> str:
        return self._scorer.name

    @property
    def needs(self) -> Needs:
        return self._scorer.needs

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """The rewards, of which those that are known cost nothing; equal texts are asked about once.

        Raises:
            ScoringError: there are others, and none of those could be scored.
        """
        keys = [digest(prompt, one.text) for one in candidates]
        found = {key: self._known[key] for key in keys if key in self._known}
        self._remember(found)
        if self._on_lookup is not None:
            known = sum(key in found for key in keys)
            self._on_lookup(known, len(keys) - known)
        new = {key: one for key, one in zip(keys, candidates, strict=True) if key not in found}
        if not new:
            return Scores(tuple(found[key] for key in keys), scored_tokens=0)
        scores = await self._scorer.score(prompt, list(new.values()))
        told = dict(zip(new, scores.rewards_N, strict=True))
        if not scores.prompt_tokens_cut:
            self._remember(told)
        found |= told
        return replace(scores, rewards_N=tuple(found[key] for key in keys))

    def _remember(self, rewards: Mapping[bytes, float]) -> None:
        for key, reward in rewards.items():
            if not math.isnan(reward):
                self._known[key] = reward
                self._known.move_to_end(key)
        while len(self._known) > self._entries:
            self._known.popitem(last=False)

    async def close(self) -> None:
        await self._scorer.close()


def digest(prompt: Prompt, text: str) -> bytes:
    """Of everything that a scorer reads; every part with its length before it, so that none runs into the next."""
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    turns = [part for message in prompt.messages for part in (message.role, message.content)]
    for part in (str(prompt.text is None), prompt.text or "", *turns, text):
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8))
        hashed.update(encoded)
    return hashed.digest()
