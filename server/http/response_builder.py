"""How the result of a request becomes its reply, whole or in pieces, in the dialect of chat or of completions.

A `Reply` lives as long as one answer and knows what all its pieces share: id, time, model.
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
"""What OpenAI sends for a token of probability zero, whose logarithm JSON cannot write."""

Logprobs = Sequence[TokenLogprob] | None
Chunk = ChatCompletionChunk | TextCompletionChunk


class Reply(ABC):
    """One answer in the making."""

    id_prefix: str

    def __init__(self, asked: GenerationRequest) -> None:
        self.num_choices = asked.num_choices
        self.include_usage = asked.include_usage
        self.stream_candidates = asked.stream_candidates
        self._return_candidates = asked.return_candidates
        self._shared: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": None,
        }

    @abstractmethod
    def whole(self, result: BestOfNResult) -> ChatCompletion | TextCompletion:
        """The answer as one object."""

    @abstractmethod
    def piece(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        """More text of a choice, from its character `offset` on; 0 opens the choice."""

    @abstractmethod
    def ending(self, index: int, chosen: ScoredCandidate) -> Chunk:
        """The last chunk of a choice: why it ended and what it is worth."""

    @abstractmethod
    def bare(self) -> Chunk:
        """A chunk without choices."""

    def event_chunk(self, news: Outcome | ScoredCandidate) -> Chunk:
        """The chunk that tells what has become of a candidate."""
        chunk = self.bare()
        chunk.nbest = _event(news)
        return chunk

    def usage_chunk(self, result: BestOfNResult) -> Chunk:
        """The chunk that `stream_options.include_usage` asks for."""
        chunk = self.bare()
        chunk.usage = usage(result)
        return chunk

    def account(self, result: BestOfNResult) -> NBestReply:
        """The `nbest` object.

        The bound on the KL divergence counts every candidate that did not fail. One that a deadline or a stopping
        policy cut off, or never drew, could have been the answer; one that the engine lost was never there.
        """
        reply = NBestReply(
            best_of=result.best_of,
            completed=result.completed,
            failed=result.failed,
            cancelled=result.cancelled,
            not_drawn=result.not_drawn,
            ranking=[one.candidate.index for one in result.selection.ranking],
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
            drawn = sorted(result.selection.ranking, key=lambda one: one.candidate.index)
            reply.candidates = [candidate_reply(one) for one in drawn]
        return reply

    def _chosen(self, result: BestOfNResult) -> enumerate[ScoredCandidate]:
        return enumerate(result.selection.ranking[: self.num_choices])


class ChatReply(Reply):
    """Chat completions."""

    id_prefix = "chatcmpl"

    def whole(self, result: BestOfNResult) -> ChatCompletion:
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

    def piece(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        delta = Delta(role="assistant", content=text) if offset == 0 else Delta(content=text)
        return self._chunk(
            ChatChunkChoice(index=index, delta=delta, logprobs=_chat_logprobs(logprobs), finish_reason=None)
        )

    def ending(self, index: int, chosen: ScoredCandidate) -> Chunk:
        reason = chosen.candidate.finish_reason
        return self._chunk(
            ChatChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=reason, reward=chosen.reward)
        )

    def bare(self) -> Chunk:
        return self._chunk()

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._shared, object="chat.completion.chunk", choices=list(choices))


class TextReply(Reply):
    """Completions."""

    id_prefix = "cmpl"

    def whole(self, result: BestOfNResult) -> TextCompletion:
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

    def piece(self, index: int, text: str, logprobs: Logprobs, *, offset: int) -> Chunk:
        return self._chunk(
            TextChunkChoice(index=index, text=text, logprobs=_text_logprobs(logprobs, offset), finish_reason=None)
        )

    def ending(self, index: int, chosen: ScoredCandidate) -> Chunk:
        reason = chosen.candidate.finish_reason
        return self._chunk(
            TextChunkChoice(index=index, text="", logprobs=None, finish_reason=reason, reward=chosen.reward)
        )

    def bare(self) -> Chunk:
        return self._chunk()

    def _chunk(self, *choices: TextChunkChoice) -> TextCompletionChunk:
        return TextCompletionChunk(**self._shared, object="text_completion", choices=list(choices))


def usage(result: BestOfNResult) -> Usage:
    """Prompt tokens once, completion tokens of all candidates, given up ones as far as they are known."""
    return Usage(
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.generated_tokens,
        total_tokens=result.prompt_tokens + result.generated_tokens,
    )


def candidate_reply(scored: ScoredCandidate) -> CandidateReply:
    """A candidate with its reward, as it is told."""
    return CandidateReply(**_drawn(scored.candidate), reward=scored.reward)


def _event(news: Outcome | ScoredCandidate) -> CandidateEvent:
    match news:
        case Candidate():
            return CandidateFinished(event="finished", **_drawn(news))
        case ScoredCandidate():
            return CandidateScored(event="scored", index=news.candidate.index, reward=news.reward)
        case FailedCandidate():
            return CandidateFailed(event="failed", index=news.index, reason=news.reason)


def _drawn(candidate: Candidate) -> dict[str, Any]:
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
            token=one.token,
            logprob=_finite(one.logprob),
            bytes=_utf8(one.token),
            top_logprobs=[TopLogprob(token=t, logprob=_finite(p), bytes=_utf8(t)) for t, p in one.top],
        )
        for one in logprobs
    ]
    return ChatLogprobs(content=content, refusal=None)


def _text_logprobs(logprobs: Logprobs, offset: int) -> TextLogprobs | None:
    """`offset` is where the first of these tokens begins in the text of the choice."""
    if logprobs is None:
        return None
    ends = list(accumulate((len(one.token) for one in logprobs), initial=offset))
    return TextLogprobs(
        tokens=[one.token for one in logprobs],
        token_logprobs=[_finite(one.logprob) for one in logprobs],
        top_logprobs=[
            {token: _finite(logprob) for token, logprob in (*one.top, (one.token, one.logprob))} for one in logprobs
        ],
        text_offset=ends[:-1],
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _utf8(token: str) -> list[int] | None:
    """The bytes of a token, unknown where it is only a part of a character."""
    return None if "\ufffd" in token else list(token.encode())
