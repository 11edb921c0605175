"""Scripted doubles of the generator and the scorer, for speed and for faults. tests/end_to_end runs the real ones."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from reranker.candidate import Candidate, FailedCandidate, FinishReason, Prompt, TokenLogprob
from reranker.scorers.base import Needs, Scores, ScoringError, UnscorableError
from server.errors import BadRequestError, EngineDiedError, NbestError, NotReadyError
from server.generation.base import Outcome, SamplingParams

MAX_MODEL_LEN = 1000


class ScriptedGenerator:
    """The text of candidate i is `texts[i % len(texts)]`, after `delays_s[i]`; None as a text is a failed candidate.

    One word is one token; a token's log-probability is -1 nat. With `stream_partial` words come `word_delay_s` apart.
    A candidate that continues k words (`sampling.after`) takes its own words from the k-th on. `refusal` is raised
    instead of starting. `cancelled` collects the indexes that were cancelled before they finished; `calls` the
    requests; `adapters` the paths that were loaded. `die` makes every running generation fail as if the engine died.
    """

    model = "scripted"

    def __init__(
        self,
        texts: Sequence[str | None],
        *,
        delays_s: Mapping[int, float] | None = None,
        word_delay_s: float = 0,
        refusal: NbestError | None = None,
    ) -> None:
        self.texts = texts
        self.delays_s = delays_s or {}
        self.word_delay_s = word_delay_s
        self.refusal = refusal
        self.cancelled: list[int] = []
        self.calls: list[tuple[Prompt, SamplingParams, int]] = []
        self.adapters: list[str] = []
        self.ready = True
        self.closed = False
        self.running: set[ScriptedGeneration] = set()

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "ScriptedGeneration":
        self.calls.append((prompt, sampling, n))
        return ScriptedGeneration(self, sampling, n, stream_partial)

    async def load_adapter(self, path: str) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.adapters.append(path)
        return f"version-{len(self.adapters)}"

    async def reload_weights(self, path: str) -> str:
        raise BadRequestError("the scripted engine has no weights")

    async def check_ready(self) -> None:
        if not self.ready:
            raise NotReadyError("the scripted engine is down")

    async def close(self) -> None:
        self.ready = False
        self.closed = True

    def die(self) -> None:
        self.ready = False
        for generation in self.running:
            generation.fail(EngineDiedError("the scripted engine died"))


class ScriptedGeneration:
    """N scripted candidates, each written by its own task."""

    prompt_tokens = 7

    def __init__(self, generator: ScriptedGenerator, sampling: SamplingParams, n: int, stream_partial: bool) -> None:
        self._generator = generator
        self._sampling = sampling
        self._stream_partial = stream_partial
        self._expected = set(range(n))  # neither yielded as ended nor cancelled
        self._writers: dict[int, asyncio.Task[None]] = {}
        # None wakes the reader after a cancellation.
        self._outcomes: asyncio.Queue[Outcome | NbestError | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self._generator.check_ready()
        if self._generator.refusal is not None:
            raise self._generator.refusal
        self._writers = {index: asyncio.create_task(self._write(index)) for index in sorted(self._expected)}
        self._generator.running.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._generator.running.discard(self)
        for index in self._writers:
            await self.cancel(index)

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        while self._expected:
            messages = [await self._outcomes.get()]
            while not self._outcomes.empty():
                messages.append(self._outcomes.get_nowait())
            for message in messages:
                if isinstance(message, NbestError):
                    raise message
            arrived = [message for message in messages if isinstance(message, Outcome)]
            outcomes = [outcome for outcome in arrived if outcome.index in self._expected]
            self._expected -= {
                outcome.index for outcome in outcomes if isinstance(outcome, FailedCandidate) or outcome.finish_reason
            }
            if outcomes:
                yield outcomes

    async def cancel(self, index: int) -> None:
        if self._writers[index].cancel():
            self._generator.cancelled.append(index)
        self._expected.discard(index)
        self._outcomes.put_nowait(None)

    def fail(self, error: NbestError) -> None:
        self._outcomes.put_nowait(error)

    async def _write(self, index: int) -> None:
        await asyncio.sleep(self._generator.delays_s.get(index, 0))
        text = self._generator.texts[index % len(self._generator.texts)]
        if text is None:
            self._outcomes.put_nowait(FailedCandidate(index, "scripted failure"))
            return
        begun = self._sampling.begun_tokens
        beginning = self._sampling.after.text.split(" ") if self._sampling.after else []
        words = [*beginning, *text.split(" ")[begun:]]
        written = words[: begun + self._sampling.max_new_tokens(MAX_MODEL_LEN - begun)]
        if self._stream_partial:
            for count in range(begun + 1, len(written)):
                self._outcomes.put_nowait(self._candidate(index, words[:count], None))
                await asyncio.sleep(self._generator.word_delay_s)
        self._outcomes.put_nowait(self._candidate(index, written, "stop" if written == words else "length"))

    def _candidate(self, index: int, words: list[str], finish_reason: FinishReason | None) -> Candidate:
        return Candidate(
            index=index,
            text=" ".join(words),
            num_tokens=len(words),
            token_ids=tuple(range(len(words))),
            cumulative_logprob=-float(len(words)),
            finish_reason=finish_reason,
            logprobs=None if self._sampling.logprobs is None else _logprobs(words, self._sampling.logprobs),
        )


def _logprobs(words: list[str], num_top: int) -> tuple[TokenLogprob, ...]:
    """Each word at -1 nat; its most likely tokens are itself, then other-1 at -2 nats, and so on."""
    tokens = [word if position == 0 else f" {word}" for position, word in enumerate(words)]
    return tuple(
        TokenLogprob(token, -1.0, ((token, -1.0), *((f"other-{k}", -1.0 - k) for k in range(1, num_top)))[:num_top])
        for token in tokens
    )


class ObjectGenerator(ScriptedGenerator):
    """Writes {} where a JSON schema is given, which satisfies the generated schemas; a real engine enforces them."""

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        generator = (
            ScriptedGenerator([text and "{}" for text in self.texts]) if sampling.json_schema is not None else self
        )
        return ScriptedGeneration(generator, sampling, n, stream_partial)


class ScriptedScorer:
    """Rewards a text with `rewards[text]`, or with its length where it is not listed; raises if `fails` is set.

    `refusal` is raised by `check` and by `score`.
    """

    name = "scripted-reward"
    needs = Needs()

    def __init__(
        self,
        rewards: Mapping[str, float] | None = None,
        *,
        fails: bool = False,
        delay_s: float = 0,
        refusal: UnscorableError | None = None,
    ) -> None:
        self.rewards = rewards or {}
        self.refusal = refusal
        self.fails = fails
        self.delay_s = delay_s
        self.groups: list[int] = []
        self.closed = False

    async def check(self, prompt: Prompt) -> None:
        if self.refusal is not None and self.refusal.part == "prompt":
            raise self.refusal

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        await asyncio.sleep(self.delay_s)
        if self.refusal is not None:
            raise self.refusal
        if self.fails:
            raise ScoringError("the scripted scorer fails")
        self.groups.append(len(candidates))
        texts = [candidate.text for candidate in candidates]
        rewards = tuple(self.rewards.get(text, float(len(text))) for text in texts)
        return Scores(rewards, scored_tokens=sum(len(text.split(" ")) for text in texts))

    async def close(self) -> None:
        self.closed = True
