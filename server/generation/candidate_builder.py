"""Builds a candidate from the engine's outputs, which carry only what is new since the previous output.

The module reads vLLM's outputs by their fields and does not import vllm.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from reranker.candidate import Candidate, FinishReason, TokenLogprob
from server.generation.base import SamplingParams
from server.generation.stop_strings import cut_at_spanning_stop

FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
EMPTY = Candidate(index=0, text="", num_tokens=0)


class CompletionOutput(Protocol):
    """The fields of vLLM's CompletionOutput. `logprobs`: for each token a mapping from token id to Logprob."""

    text: str
    token_ids: Sequence[int]
    logprobs: Any
    finish_reason: str | None


class CandidateBuilder:
    """Appends the engine's outputs for one candidate to `sampling.after`; with FINAL_ONLY there is a single output."""

    def __init__(self, index: int, sampling: SamplingParams) -> None:
        after = sampling.after or EMPTY
        self._index = index
        self._num_top = sampling.logprobs
        self._is_likelihood_known = sampling.likelihood or sampling.logprobs is not None
        self._after, self._stop = after, sampling.stop
        self._in_blocks = sampling.block_tokens is not None
        self._text = after.text
        self._token_ids = after.token_ids
        self._cumulative_logprob = after.cumulative_logprob or 0.0
        self._logprobs = after.logprobs or ()

    def extend(self, output: CompletionOutput, weights_version: str | None) -> Candidate:
        """The candidate so far, with this output appended.

        Raises:
            ValueError: log-probabilities were requested and the output has fewer of them than tokens.
        """
        ranked_by_token = list(zip(output.token_ids, output.logprobs or (), strict=self._is_likelihood_known))
        self._text += output.text
        self._token_ids += tuple(output.token_ids)
        self._cumulative_logprob += sum(ranked[token_id].logprob for token_id, ranked in ranked_by_token)
        if self._num_top is not None:
            self._logprobs += tuple(
                _token_logprob(token_id, ranked, self._num_top) for token_id, ranked in ranked_by_token
            )
        finish_reason = FINISH_REASONS.get(output.finish_reason)
        candidate = Candidate(
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
        return cut_at_spanning_stop(candidate, len(self._after.text), self._stop)


def _token_logprob(token_id: int, ranked: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """The log-probability of the sampled token and of the most likely ones.

    `ranked` maps token id to vLLM's Logprob; it has one more entry if the sampled token is not among the most likely.
    """
    most_likely = sorted(ranked.values(), key=lambda entry: -entry.logprob)[:num_top]
    sampled = ranked[token_id]
    return TokenLogprob(
        token=sampled.decoded_token or "",
        logprob=sampled.logprob,
        top=tuple((entry.decoded_token or "", entry.logprob) for entry in most_likely),
    )
