"""Builds replies from the result of a request: whole or as chunks, in the format of chat or of text completions.

There is one `Reply` for each request; it holds the fields that all its chunks share: id, time and model.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from reranker.candidate import Candidate, FailedCandidate, ScoredCandidate, TokenLogprob
from reranker.estimators import kl_upper_bound
from server.generation.base import Outcome
from server.pipeline.types import BestOfNResult
from server.schemas.requests import GenerationRequest
from server.schemas.responses import (
    AssistantMessage,
    CandidateEvent,
    CandidateFailed,
    CandidateFinished,
    CandidateReply,
    CandidateScored,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    Delta,
    NBestReply,
    TextChoice,
    TextChunkChoice,
    TextCompletion,
    TextCompletionChunk,
    TextLogprobs,
    TimingsReply,
    TopLogprob,
    Usage,
)

LOWEST_LOGPROB = -9999.0
"""What OpenAI sends for a token of probability zero, since JSON has no minus infinity."""

Logprobs = Sequence[TokenLogprob] | None
Chunk = ChatCompletionChunk | TextCompletionChunk


class Reply(ABC):
    """Builds the reply to one request."""

    id_prefix: str

    def __init__(self, request: GenerationRequest) -> None:
        self.num_choices = request.num_choices
        self.include_usage = request.include_usage
        self.stream_candidates = request.stream_candidates
        self._return_candidates = request.return_candidates
        self._shared: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": None,
        }

    @abstractmethod
    def completion(self, result: BestOfNResult) -> ChatCompletion | TextCompletion:
        """The whole reply as one object."""

    @abstractmethod
    def text_chunk(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        """More text of a choice, which begins at its character `offset`; 0 is the first chunk of the choice."""

    @abstractmethod
    def final_chunk(self, index: int, chosen: ScoredCandidate) -> Chunk:
        """The last chunk of a choice, with its finish_reason and reward."""

    @abstractmethod
    def empty_chunk(self) -> Chunk:
        """A chunk without choices."""

    def event_chunk(self, event: Outcome | ScoredCandidate) -> Chunk:
        """The chunk that reports that a candidate finished, failed or was scored."""
        chunk = self.empty_chunk()
        chunk.nbest = _event(event)
        return chunk

    def usage_chunk(self, result: BestOfNResult) -> Chunk:
        """The chunk that `stream_options.include_usage` adds."""
        chunk = self.empty_chunk()
        chunk.usage = usage(result)
        return chunk

    def account(self, result: BestOfNResult) -> NBestReply:
        """The `nbest` object of the reply.

        The bound on the KL divergence counts every candidate that did not fail. A candidate that a deadline or a
        stopping policy cancelled or never drew could have become the answer; a failed candidate could not.
        """
        reply = NBestReply(
            best_of=result.best_of,
            completed=result.completed,
            failed=result.failed,
            cancelled=result.cancelled,
            not_drawn=result.not_drawn,
            ranking=[scored.candidate.index for scored in result.selection.ranking],
            strategy=result.strategy,
            reward_model=result.reward_model,
            ranked_by=result.ranked_by,
            stopped_by=result.stopped_by,
            generated_tokens=result.generated_tokens,
            scored_tokens=result.scored_tokens,
            prompt_tokens_cut=result.prompt_tokens_cut,
            candidate_s=result.candidate_s,
            kl_upper_bound=result.blocks * kl_upper_bound(result.best_of - result.failed),
            blocks=result.blocks,
            timings_s=TimingsReply.model_validate(result.timings, from_attributes=True),
        )
        if self._return_candidates:
            drawn = sorted(result.selection.ranking, key=lambda scored: scored.candidate.index)
            reply.candidates = [candidate_reply(scored) for scored in drawn]
        return reply

    def _chosen(self, result: BestOfNResult) -> enumerate[ScoredCandidate]:
        return enumerate(result.selection.ranking[: self.num_choices])


class ChatReply(Reply):
    """Builds the reply of `/v1/chat/completions`."""

    id_prefix = "chatcmpl"

    def completion(self, result: BestOfNResult) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=chosen.candidate.text, refusal=None),
                logprobs=_chat_logprobs(chosen.candidate.logprobs),
                finish_reason=chosen.candidate.finish_reason,
                reward=chosen.reward,
            )
            for index, chosen in self._chosen(result)
        ]
        return ChatCompletion(
            **self._shared,
            object="chat.completion",
            choices=choices,
            usage=usage(result),
            nbest=self.account(result),
        )

    def text_chunk(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        delta = Delta(role="assistant", content=text) if offset == 0 else Delta(content=text)
        return self._chunk(
            ChatChunkChoice(index=index, delta=delta, logprobs=_chat_logprobs(logprobs), finish_reason=None)
        )

    def final_chunk(self, index: int, chosen: ScoredCandidate) -> Chunk:
        reason = chosen.candidate.finish_reason
        return self._chunk(
            ChatChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=reason, reward=chosen.reward)
        )

    def empty_chunk(self) -> Chunk:
        return self._chunk()

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._shared, object="chat.completion.chunk", choices=list(choices))


class TextReply(Reply):
    """Builds the reply of `/v1/completions`."""

    id_prefix = "cmpl"

    def completion(self, result: BestOfNResult) -> TextCompletion:
        choices = [
            TextChoice(
                index=index,
                text=chosen.candidate.text,
                logprobs=_text_logprobs(chosen.candidate.logprobs, 0),
                finish_reason=chosen.candidate.finish_reason,
                reward=chosen.reward,
            )
            for index, chosen in self._chosen(result)
        ]
        return TextCompletion(
            **self._shared,
            object="text_completion",
            choices=choices,
            usage=usage(result),
            nbest=self.account(result),
        )

    def text_chunk(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        return self._chunk(
            TextChunkChoice(index=index, text=text, logprobs=_text_logprobs(logprobs, offset), finish_reason=None)
        )

    def final_chunk(self, index: int, chosen: ScoredCandidate) -> Chunk:
        reason = chosen.candidate.finish_reason
        return self._chunk(
            TextChunkChoice(index=index, text="", logprobs=None, finish_reason=reason, reward=chosen.reward)
        )

    def empty_chunk(self) -> Chunk:
        return self._chunk()

    def _chunk(self, *choices: TextChunkChoice) -> TextCompletionChunk:
        return TextCompletionChunk(**self._shared, object="text_completion", choices=list(choices))


def usage(result: BestOfNResult) -> Usage:
    """Prompt tokens once, and the completion tokens of all candidates, of cancelled ones as far as they are known."""
    return Usage(
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.generated_tokens,
        total_tokens=result.prompt_tokens + result.generated_tokens,
    )


def candidate_reply(scored: ScoredCandidate) -> CandidateReply:
    """A candidate with its reward, in the format of the reply."""
    return CandidateReply(**_candidate_fields(scored.candidate), reward=scored.reward)


def _event(event: Outcome | ScoredCandidate) -> CandidateEvent:
    match event:
        case Candidate():
            return CandidateFinished(event="finished", **_candidate_fields(event))
        case ScoredCandidate():
            return CandidateScored(event="scored", index=event.candidate.index, reward=event.reward)
        case FailedCandidate():
            return CandidateFailed(event="failed", index=event.index, reason=event.reason)


def _candidate_fields(candidate: Candidate) -> dict[str, Any]:
    return {
        "index": candidate.index,
        "text": candidate.text,
        "cumulative_logprob": candidate.cumulative_logprob,
        "finish_reason": candidate.finish_reason,
        "num_tokens": candidate.num_tokens,
    }


def _chat_logprobs(logprobs: Logprobs) -> ChatLogprobs | None:
    if logprobs is None:
        return None
    content = [
        ChatTokenLogprob(
            token=generated.token,
            logprob=_finite(generated.logprob),
            bytes=_utf8(generated.token),
            top_logprobs=[
                TopLogprob(token=token, logprob=_finite(logprob), bytes=_utf8(token))
                for token, logprob in generated.top
            ],
        )
        for generated in logprobs
    ]
    return ChatLogprobs(content=content, refusal=None)


def _text_logprobs(logprobs: Logprobs, offset: int) -> TextLogprobs | None:
    """`offset` is the character of the choice's text at which the first of these tokens begins."""
    if logprobs is None:
        return None
    offsets = list(accumulate((len(generated.token) for generated in logprobs), initial=offset))
    return TextLogprobs(
        tokens=[generated.token for generated in logprobs],
        token_logprobs=[_finite(generated.logprob) for generated in logprobs],
        top_logprobs=[
            {token: _finite(logprob) for token, logprob in (*generated.top, (generated.token, generated.logprob))}
            for generated in logprobs
        ],
        text_offset=offsets[:-1],
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _utf8(token: str) -> list[int] | None:
    """The bytes of a token; None for a token that is only a part of a character, whose bytes are unknown."""
    return None if "\ufffd" in token else list(token.encode())
