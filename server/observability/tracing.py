"""OpenTelemetry traces of the pipeline. The module is imported only if a collector is configured.

    POST /v1/chat/completions            the request, a child of the client's span if it sent a traceparent
    ├── admission                        the wait in the admission queue
    └── chat smollm2-135m-instruct       the run of the pipeline: parameters, result, tokens
        ├── queue                        until the engine has started the first candidate
        ├── generate  (per candidate)    until the candidate completes, fails or is cancelled
        ├── score     (per candidate)    from the call of the scorer to its reward, including the wait for a batch
        └── select

The pipeline does not import this module. `Tracing.instrument` wraps its generator and scorers, and observes its runs;
each span finds its parent in the context that asyncio passes on to tasks. Without tracing nothing is wrapped.

Attributes have the names of the semantic conventions where there are any (http.*, gen_ai.*); all others begin with
`nbest.`. The gen_ai.usage.* attributes are on the run only: on candidates too, tools would count the tokens twice. No
prompt, no completion and no error message is recorded, since a message may quote them; `error.type` is the error's
code.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from importlib import metadata
from types import TracebackType
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from reranker.candidate import Candidate, FailedCandidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores
from server.errors import NbestError
from server.generation.base import Generation, Generator, Outcome, SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

EXPORT_TIMEOUT_S = 5
"""At most this long, an unreachable collector delays the shutdown of the server."""
NANOSECONDS = 1_000_000_000

Attributes = dict[str, AttributeValue]


class Tracing:
    """Traces of one server, which has its own tracer provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer = provider.get_tracer("nbest", metadata.version("nbest"))

    @classmethod
    def to_collector(cls, endpoint: str, sample_ratio: float) -> Self:
        """Sends traces to the collector at `endpoint`, in the background; OTEL_* variables configure the rest.

        `sample_ratio` applies to traces that begin here; for a trace that a client began, the client's decision does.
        """
        service = Resource({"service.name": "nbest", "service.version": metadata.version("nbest")})
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=service.merge(OTELResourceDetector().detect()),
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    @asynccontextmanager
    async def instrument(self, started: AbstractAsyncContextManager[BestOfN]) -> AsyncIterator[BestOfN]:
        """The pipeline that `started` opens, with tracing; on leaving, sends the spans that are not sent yet."""
        async with started as best_of_n:
            try:
                yield best_of_n.instrumented(
                    _TracedGenerator(best_of_n.generator, self.tracer),
                    {name: _TracedScorer(scorer, self.tracer) for name, scorer in best_of_n.scorers.items()},
                    partial(_RunSpan, self.tracer, best_of_n.generator.model),
                )
            finally:  # here, because no exit handler runs if a signal ends the process
                await asyncio.to_thread(self._provider.shutdown)


class _RunSpan(RunObserver):
    """The span of one run, the parent of the spans of its candidates."""

    def __init__(self, tracer: Tracer, model: str, request: BestOfNRequest, queued_s: float) -> None:
        self._tracer = tracer
        self._queued_s = queued_s
        operation = "chat" if request.prompt.messages else "text_completion"
        attributes = {"gen_ai.operation.name": operation, "gen_ai.request.model": model, **_request_attributes(request)}
        self._opened = _span(tracer, f"{operation} {model}", attributes)

    def __enter__(self) -> Self:
        _add_ended_span(self._tracer, "admission", self._queued_s)
        self._span = self._opened.__enter__()
        return self

    def finished(self, result: BestOfNResult) -> None:
        _add_ended_span(self._tracer, "select", result.timings.select, {"nbest.strategy": result.strategy})
        self._span.set_attributes(_result_attributes(result))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)


def _add_ended_span(tracer: Tracer, name: str, duration_s: float, attributes: Attributes | None = None) -> None:
    """Adds a span that ends now and began `duration_s` ago."""
    ended_ns = time.time_ns()
    start_ns = ended_ns - int(duration_s * NANOSECONDS)
    tracer.start_span(name, attributes=attributes, start_time=start_ns).end(ended_ns)


class _TracedGenerator:
    """A generator with a span for each candidate."""

    def __init__(self, traced: Generator, tracer: Tracer) -> None:
        self._traced = traced
        self._tracer = tracer

    @property
    def model(self) -> str:
        return self._traced.model

    def generate(self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False) -> Generation:
        return _TracedGeneration(
            self._traced.generate(prompt, sampling, n, stream_partial=stream_partial), n, self._tracer
        )

    async def check_ready(self) -> None:
        await self._traced.check_ready()

    async def load_adapter(self, path: str) -> str:
        return await self._traced.load_adapter(path)

    async def reload_weights(self, path: str) -> str:
        return await self._traced.reload_weights(path)

    async def close(self) -> None:
        await self._traced.close()


class _TracedGeneration:
    """N running candidates, each with a span until it ends."""

    def __init__(self, traced: Generation, n: int, tracer: Tracer) -> None:
        self._traced = traced
        self._n = n
        self._tracer = tracer
        self._open: dict[int, Span] = {}

    @property
    def prompt_tokens(self) -> int:
        return self._traced.prompt_tokens

    async def __aenter__(self) -> Self:
        with _span(self._tracer, "queue"):
            await self._traced.__aenter__()
        for index in range(self._n):
            self._open[index] = self._tracer.start_span("generate", attributes={"nbest.candidate.index": index})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._traced.__aexit__(kind, error, trace)
        finally:
            for index in list(self._open):
                self._end(index, "cancelled")

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        async for outcomes in self._traced:
            for outcome in outcomes:
                if isinstance(outcome, FailedCandidate):
                    mark_failed(self._open[outcome.index], "candidate_failed")
                    self._end(outcome.index, "failed")
                elif outcome.finish_reason is not None:
                    self._open[outcome.index].set_attributes(
                        {
                            "nbest.candidate.tokens": outcome.num_tokens,
                            "nbest.candidate.finish_reason": outcome.finish_reason,
                        }
                    )
                    self._end(outcome.index, "completed")
            yield outcomes

    async def cancel(self, index: int) -> None:
        await self._traced.cancel(index)
        if index in self._open:
            self._end(index, "cancelled")

    def _end(self, index: int, outcome: str) -> None:
        span = self._open.pop(index)
        span.set_attribute("nbest.candidate.outcome", outcome)
        span.end()


class _TracedScorer:
    """A scorer with a span for each candidate of a call; the spans of one call run in parallel."""

    def __init__(self, traced: Scorer, tracer: Tracer) -> None:
        self._traced = traced
        self._tracer = tracer

    @property
    def name(self) -> str:
        return self._traced.name

    @property
    def needs(self) -> Needs:
        return self._traced.needs

    async def check(self, prompt: Prompt) -> None:
        await self._traced.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        call: Attributes = {"nbest.reward_model": self.name, "nbest.score.group_size": len(candidates)}
        spans = [
            self._tracer.start_span("score", attributes={"nbest.candidate.index": candidate.index, **call})
            for candidate in candidates
        ]
        try:
            with _errors_recorded(*spans):
                scores = await self._traced.score(prompt, candidates)
            for span, reward in zip(spans, scores.rewards_N, strict=True):
                if not math.isnan(reward):
                    span.set_attribute("nbest.reward", reward)
            return scores
        finally:
            for span in spans:
                span.end()

    async def close(self) -> None:
        await self._traced.close()


@contextmanager
def _span(tracer: Tracer, name: str, attributes: Attributes | None = None) -> Iterator[Span]:
    """A span of the code inside of the block, and the parent of all spans opened there."""
    with (
        tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span,
        _errors_recorded(span),
    ):
        yield span


@contextmanager
def _errors_recorded(*spans: Span) -> Iterator[None]:
    """Marks the spans as failed by an error that leaves the block, or as cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        for span in spans:
            span.set_attribute("nbest.cancelled", True)
        raise
    except Exception as error:
        code = error.code if isinstance(error, NbestError) else None
        for span in spans:
            mark_failed(span, code or type(error).__name__)
        raise


def mark_failed(span: Span, error_type: str) -> None:
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", error_type)


def _request_attributes(request: BestOfNRequest) -> Attributes:
    sampling = request.sampling
    optional = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
        "nbest.deadline_s": request.deadline_s,
        "nbest.stopping": request.stopping.policy,
    }
    return {
        "gen_ai.provider.name": "nbest",
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "nbest.best_of": request.best_of,
        "nbest.strategy": request.strategy,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _result_attributes(result: BestOfNResult) -> Attributes:
    winner = result.selection.winner
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": result.prompt_tokens,
        "gen_ai.usage.output_tokens": result.generated_tokens,
        "nbest.scored_tokens": result.scored_tokens,
        "nbest.candidate_s": result.candidate_s,
        "nbest.completed": result.completed,
        "nbest.failed": result.failed,
        "nbest.cancelled_candidates": result.cancelled,
        "nbest.candidates_not_drawn": result.not_drawn,
        "nbest.stopped_by": result.stopped_by,
        "nbest.ranked_by": result.ranked_by,
        "nbest.winner.index": winner.candidate.index,
    }
    if result.reward_model is not None:
        attributes["nbest.reward_model"] = result.reward_model
    if winner.has_reward:
        attributes["nbest.reward"] = winner.reward
    return attributes
