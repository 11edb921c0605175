"""What the engine tells of a candidate, piece by piece, becomes the candidate so far.

vLLM's outputs are known here by their fields alone: this module does not import it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from reranker.candidate import Candidate, FinishReason, TokenLogprob
from server.generation.base import Sampling
from server.generation.continuing import NOTHING, stopped_across

FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


class Output(Protocol):
    """vLLM's CompletionOutput. `logprobs`: for each token, token id -> Logprob."""

    text: str
    token_ids: Sequence[int]
    logprobs: Any
    finish_reason: str | None


class GrowingCandidate:
    """Adds one candidate's outputs, which hold what is new, to what it goes on from; with FINAL_ONLY there is one."""

    def __init__(self, index: int, sampling: Sampling) -> None:
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
