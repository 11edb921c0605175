"""What the engine tells of a candidate, piece by piece, becomes the candidate so far.

vLLM's outputs are known here by their fields alone: this module does not import it.

Answers that are drawn piece by piece: a stop string may begin in one piece and end in the next.

The engine looks for stop strings in what it has drawn itself. One across the seam is found here, and what may turn out
to be the beginning of one is not told yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from reranker.candidate import Candidate, FinishReason, TokenLogprob
from server.generation.base import SamplingParams

NOTHING = Candidate(index=0, text="", num_tokens=0)


def stopped_across(candidate: Candidate, seam: int, stop: Sequence[str]) -> Candidate:
    """The candidate, ended where a stop string begins before character `seam` of its text and ends after it."""
    text = candidate.text
    found = (text.find(one, max(0, seam - len(one) + 1), seam + len(one) - 1) for one in stop)
    begins = min((place for place in found if place >= 0), default=None)
    return candidate if begins is None else replace(candidate, text=text[:begins], finish_reason="stop")


def certain_text(text: str, stop: Sequence[str]) -> str:
    """The text without what at its end may be the beginning of a stop string."""
    held = (length for one in stop for length in range(1, len(one)) if text.endswith(one[:length]))
    return text[: len(text) - max(held, default=0)]


FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


class Output(Protocol):
    """vLLM's CompletionOutput. `logprobs`: for each token, token id -> Logprob."""

    text: str
    token_ids: Sequence[int]
    logprobs: Any
    finish_reason: str | None


class CandidateBuilder:
    """Adds one candidate's outputs, which hold what is new, to what it goes on from; with FINAL_ONLY there is one."""

    def __init__(self, index: int, sampling: SamplingParams) -> None:
        after = sampling.after or NOTHING
        self._index = index
        self._num_top = sampling.logprobs
        self._is_likelihood_known = sampling.likelihood or sampling.logprobs is not None
        self._after, self._stop = after, sampling.stop
        self._in_blocks = sampling.block_tokens is not None
        self._text = after.text
        self._token_ids = after.token_ids
        self._cumulative_logprob = after.cumulative_logprob or 0.0
        self._logprobs = after.logprobs or ()

    def extend(self, output: Output, weights_version: str | None) -> Candidate:
        chosen_and_rivals = list(zip(output.token_ids, output.logprobs or (), strict=self._is_likelihood_known))
        self._text += output.text
        self._token_ids += tuple(output.token_ids)
        self._cumulative_logprob += sum(ranked[token_id].logprob for token_id, ranked in chosen_and_rivals)
        if self._num_top is not None:
            self._logprobs += tuple(_token_logprob(*one, self._num_top) for one in chosen_and_rivals)
        finish_reason = FINISH_REASONS.get(output.finish_reason)
        grown = Candidate(
            index=self._index,
            text=self._text,
            num_tokens=len(self._token_ids),
            token_ids=self._token_ids,
            cumulative_logprob=self._cumulative_logprob if self._is_likelihood_known else None,
            finish_reason=finish_reason,
            logprobs=None if self._num_top is None else self._logprobs,
            weights_version=weights_version,
            is_beginning=self._in_blocks and finish_reason == "length",
        )
        return stopped_across(grown, len(self._after.text), self._stop)


def _token_logprob(token_id: int, ranked: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """Of the chosen token and the most likely ones (token id -> vLLM's Logprob; the chosen may be one more)."""
    most_likely = sorted(ranked.values(), key=lambda one: -one.logprob)[:num_top]
    chosen = ranked[token_id]
    return TokenLogprob(
        token=chosen.decoded_token or "",
        logprob=chosen.logprob,
        top=tuple((one.decoded_token or "", one.logprob) for one in most_likely),
    )
