"""A scorer that is asked once for each prompt and text: `--score-cache-entries`.

For scorers whose reward depends on nothing but prompt and text, which leaves out comparisons within a request and the
policy's own probabilities. Kept are the rewards that were asked for last, each under a digest of what it is of, so an
entry takes some hundred bytes however long the texts are. Two calls at the same time may both ask for the same text. A
candidate that could not be scored is not remembered: the next time may go better.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores

DIGEST_BYTES = 16


class RememberingScorer:
    """Answers for `scorer` what it has said before; `scored_tokens` are of what it is asked anew."""

    def __init__(self, scorer: Scorer, entries: int) -> None:
        self._scorer = scorer
        self._entries = entries
        self._known: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # -> reward, prompt_tokens_cut

    @property
    def name(self) -> str:
        return self._scorer.name

    @property
    def needs(self) -> Needs:
        return self._scorer.needs

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """The rewards, of which those that are known cost nothing.

        Raises:
            ScoringError: there are others, and none of those could be scored.
        """
        keys = [digest(prompt, one.text) for one in candidates]
        found = {key: self._known[key] for key in keys if key in self._known}
        new = [place for place, key in enumerate(keys) if key not in found]
        scored_tokens = 0
        if new:
            scores = await self._scorer.score(prompt, [candidates[place] for place in new])
            scored_tokens = scores.scored_tokens
            told = ((reward, scores.prompt_tokens_cut) for reward in scores.rewards_N)
            found |= zip((keys[place] for place in new), told, strict=True)
        self._remember(keys, found)
        return Scores(
            rewards_N=tuple(found[key][0] for key in keys),
            scored_tokens=scored_tokens,
            prompt_tokens_cut=max(cut for _, cut in found.values()) if found else 0,
        )

    def _remember(self, keys: Sequence[bytes], found: dict[bytes, tuple[float, int]]) -> None:
        for key in keys:
            if not math.isnan(found[key][0]):
                self._known[key] = found[key]
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
