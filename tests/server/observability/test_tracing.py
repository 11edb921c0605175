"""The traces of scripted requests, read from memory: the tree of spans, their attributes, and what is not recorded."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode

from reranker.candidate import Prompt
from server.app import create_app
from server.config import Settings
from server.generation.base import SamplingParams
from server.observability.metrics import Metrics
from server.observability.request_context import current
from server.observability.tracing import Tracing
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, client_of, pipeline

CHAT = "/v1/chat/completions"
TASTE = {"dull": -2.0, "a fine film": 1.0, "great fun": 2.5}
NEVER_S = 60.0


class Traces:
    """The spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    def clear(self) -> None:
        self._exporter.clear()

    def all(self, name: str | None = None) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if name in (None, span.name)]

    def single(self, name: str) -> ReadableSpan:
        [span] = self.all(name)
        return span

    def tree(self) -> dict[str, Any]:
        """The spans by "COUNT NAME", where COUNT siblings have this name, each with its children in the same form."""

        def below(parent: int | None) -> dict[str, Any]:
            children: dict[str, list[int]] = {}
            for span in sorted(self.all(), key=lambda span: span.start_time or 0):
                if span.context and (span.parent.span_id if span.parent else None) == parent:
                    children.setdefault(span.name, []).append(span.context.span_id)
            return {
                f"{len(ids)} {name}": {key: value for span_id in ids for key, value in below(span_id).items()}
                for name, ids in children.items()
            }

        return below(None)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def traces() -> Traces:
    return Traces()


@asynccontextmanager
async def started(best_of_n: BestOfN) -> AsyncIterator[BestOfN]:
    yield best_of_n


def traced_app(tracing: Tracing, best_of_n: BestOfN) -> FastAPI:
    return create_app(lambda: tracing.instrument(started(best_of_n)), Settings(), Metrics(), tracing=tracing)


@asynccontextmanager
async def traced_client(
    traces: Traces, generator: ScriptedGenerator, *scorers: ScriptedScorer
) -> AsyncIterator[httpx.AsyncClient]:
    best_of_n = pipeline(generator, *(scorers or [ScriptedScorer(TASTE)]))
    async with client_of(traced_app(traces.tracing, best_of_n)) as client:
        traces.clear()  # the spans of the requests that waited for the server to be ready
        yield client


async def post_chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(CHAT, json=HELLO | {"best_of": 3} | fields)


async def test_a_request_is_a_tree_with_a_generate_and_a_score_for_each_candidate(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        assert (await post_chat(client)).status_code == 200
    run: dict[str, Any] = {"1 queue": {}, "3 generate": {}, "3 score": {}, "1 select": {}}
    assert traces.tree() == {f"1 POST {CHAT}": {"1 admission": {}, "1 chat scripted": run}}
    for name in ("generate", "score"):
        assert sorted(attributes(span)["nbest.candidate.index"] for span in traces.all(name)) == [0, 1, 2]


async def test_a_stream_has_the_same_tree_of_spans(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["a b c"])) as client:
        assert (await post_chat(client, best_of=1, stream=True)).status_code == 200
    run: dict[str, Any] = {"1 queue": {}, "1 generate": {}, "1 score": {}, "1 select": {}}
    assert traces.tree() == {f"1 POST {CHAT}": {"1 admission": {}, "1 chat scripted": run}}


async def test_spans_begin_and_end_within_their_parent(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        await post_chat(client)
    by_id = {span.context.span_id: span for span in traces.all() if span.context}
    children = [span for span in traces.all() if span.parent]
    assert len(children) == 10
    for child in children:
        parent = by_id[child.parent.span_id] if child.parent else child
        times = (parent.start_time, child.start_time, child.end_time, parent.end_time)
        assert sorted(time or 0 for time in times) == list(times), child.name


async def test_the_run_span_has_the_parameters_and_the_result(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        await post_chat(client, max_tokens=5, temperature=0.5, seed=3)
    account = attributes(traces.single("chat scripted"))
    assert account.pop("nbest.candidate_s") > 0
    assert account == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nbest",
        "gen_ai.request.model": "scripted",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 1 + 3 + 2,
        "nbest.best_of": 3,
        "nbest.strategy": "argmax",
        "nbest.reward_model": "scripted-reward",
        "nbest.scored_tokens": 6,
        "nbest.completed": 3,
        "nbest.failed": 0,
        "nbest.cancelled_candidates": 0,
        "nbest.candidates_not_drawn": 0,
        "nbest.stopped_by": "all",
        "nbest.ranked_by": "reward",
        "nbest.winner.index": 2,
        "nbest.reward": 2.5,
    }


async def test_the_spans_of_a_candidate_have_its_tokens_its_outcome_and_its_reward(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["great fun"])) as client:
        await post_chat(client, best_of=1)
    assert attributes(traces.single("generate")) == {
        "nbest.candidate.index": 0,
        "nbest.candidate.outcome": "completed",
        "nbest.candidate.tokens": 2,
        "nbest.candidate.finish_reason": "stop",
    }
    assert attributes(traces.single("score")) == {
        "nbest.candidate.index": 0,
        "nbest.reward_model": "scripted-reward",
        "nbest.score.group_size": 1,
        "nbest.reward": 2.5,
    }


async def test_candidates_cancelled_by_a_deadline_are_marked_as_cancelled(traces: Traces) -> None:
    generator = ScriptedGenerator(list(TASTE), delays_s={2: NEVER_S})
    async with traced_client(traces, generator) as client:
        assert (await post_chat(client, nbest={"deadline_s": 0.2})).json()["nbest"]["cancelled"] == 1
    candidates = [attributes(span) for span in traces.all("generate")]
    outcomes = {candidate["nbest.candidate.index"]: candidate["nbest.candidate.outcome"] for candidate in candidates}
    assert outcomes == {0: "completed", 1: "completed", 2: "cancelled"}
    assert attributes(traces.single("chat scripted"))["nbest.stopped_by"] == "deadline"


async def test_a_cancelled_run_leaves_no_span_open_and_is_not_an_error(traces: Traces) -> None:
    generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(3), NEVER_S))
    async with traces.tracing.instrument(started(pipeline(generator))) as traced:
        running = asyncio.create_task(traced.run(BestOfNRequest(Prompt(text="How was it?"), SamplingParams(), 3)))
        await asyncio.sleep(0)  # the scripted engine starts without waiting, so all candidates are running now
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [attributes(span)["nbest.candidate.outcome"] for span in traces.all("generate")] == ["cancelled"] * 3
    run = traces.single("text_completion scripted")
    assert attributes(run)["nbest.cancelled"] is True
    assert run.status.status_code is StatusCode.UNSET


async def test_a_failed_candidate_marks_only_its_own_span_as_an_error(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull", None, "great fun"])) as client:
        assert (await post_chat(client)).status_code == 200
    failed = [span for span in traces.all() if span.status.status_code is StatusCode.ERROR]
    assert [(span.name, attributes(span)["nbest.candidate.outcome"]) for span in failed] == [("generate", "failed")]
    assert attributes(failed[0])["error.type"] == "candidate_failed"


async def test_a_reward_failure_marks_all_spans_up_to_the_request_as_errors(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"]), ScriptedScorer(fails=True)) as client:
        assert (await post_chat(client, best_of=1)).status_code == 503
    errors = {
        span.name: attributes(span).get("error.type")
        for span in traces.all()
        if span.status.status_code is StatusCode.ERROR
    }
    assert errors == {"score": "ScoringError", "chat scripted": "reward_failed", f"POST {CHAT}": "503"}


async def test_a_missing_reward_has_no_attribute(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"]), ScriptedScorer({"dull": math.nan})) as client:
        await post_chat(client, best_of=1, nbest={"on_reward_failure": "first"})
    assert "nbest.reward" not in attributes(traces.single("score"))
    assert "nbest.reward" not in attributes(traces.single("chat scripted"))


async def test_a_refused_request_has_its_status_and_is_not_an_error(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await post_chat(client, best_of=0)
        await client.get("/no/such/path")
    refused, not_routed = traces.all()
    assert (refused.name, attributes(refused)["http.response.status_code"]) == (f"POST {CHAT}", 400)
    assert (not_routed.name, attributes(not_routed)["http.response.status_code"]) == ("GET unknown", 404)
    assert {span.status.status_code for span in (refused, not_routed)} == {StatusCode.UNSET}


async def test_the_trace_of_the_client_is_continued(traces: Traces) -> None:
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post(CHAT, json=HELLO, headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
    request = traces.single(f"POST {CHAT}")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert (request.parent.span_id, request.parent.is_remote) == (int(span_id, 16), True)
    assert {span.context.trace_id for span in traces.all() if span.context} == {int(trace_id, 16)}


async def test_a_trace_that_the_client_does_not_sample_is_not_recorded(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
        await client.post(CHAT, json=HELLO, headers={"traceparent": parent})
    assert traces.all() == []


async def test_an_unusable_traceparent_begins_a_new_trace(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post(CHAT, json=HELLO, headers={"traceparent": "00-nonsense"})
    assert traces.single(f"POST {CHAT}").parent is None


async def test_spans_have_the_request_id_and_log_lines_the_trace_id(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = []
    scorer = ScriptedScorer()
    score = scorer.score

    async def recording_score(*args: Any) -> Any:
        records.append(current())
        return await score(*args)

    monkeypatch.setattr(scorer, "score", recording_score)
    async with traced_client(traces, ScriptedGenerator(["dull"]), scorer) as client:
        reply = await post_chat(client, best_of=1)
    request = traces.single(f"POST {CHAT}")
    assert attributes(request)["nbest.request_id"] == reply.headers["x-request-id"]
    assert request.context is not None
    assert [int(record.trace_id, 16) for record in records] == [request.context.trace_id]


async def test_the_spans_of_a_score_request_are_children_of_the_request(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post("/v1/score", json={"prompt": "x", "candidates": ["dull", "great fun"]})
    assert traces.tree() == {"1 POST /v1/score": {"2 score": {}}}


async def test_probes_are_not_traced(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
    assert traces.all() == []


async def test_no_text_and_no_error_message_is_recorded(traces: Traces) -> None:
    secret = "xyzzy"
    body = HELLO | {"best_of": 2, "messages": [{"role": "user", "content": secret}]}
    async with traced_client(traces, ScriptedGenerator([secret, None]), ScriptedScorer(fails=True)) as client:
        for extra in ({}, {"nbest": {"on_reward_failure": "first"}}, {"model": secret}):
            await client.post(CHAT, json=body | extra)
        await client.get(f"/{secret}?{secret}")
    assert len(traces.all()) > 10
    assert not [span.name for span in traces.all() if secret in span.to_json() or "scripted failure" in span.to_json()]
    assert not [span.name for span in traces.all() if span.events]


async def test_attributes_without_the_prefix_nbest_are_in_the_semantic_conventions(traces: Traces) -> None:
    """Tools that know the conventions would not find a misspelt gen_ai. or http. attribute."""
    async with traced_client(traces, ScriptedGenerator([None, "dull"]), ScriptedScorer(fails=True)) as client:
        await post_chat(client, seed=1, max_tokens=5)
        await post_chat(client, nbest={"on_reward_failure": "first"})
    used = {name for span in traces.all() for name in attributes(span) if not name.startswith("nbest.")}
    assert used - {"error.type"}
    standard = {
        value
        for module in (gen_ai_attributes, http_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper()
    }
    assert used <= standard


async def test_traces_are_sent_to_the_collector_when_the_server_stops() -> None:
    """They arrive over HTTP, in OTLP's encoding, at the path for traces."""
    with collector() as (url, received):
        tracing = Tracing.to_collector(url, sample_ratio=1.0)
        async with client_of(traced_app(tracing, pipeline(ScriptedGenerator(["dull"])))) as client:
            await post_chat(client)
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [resource_spans for _, export in received for resource_spans in export.resource_spans]
    services = {
        pair.value.string_value
        for resource_spans in resources
        for pair in resource_spans.resource.attributes
        if pair.key == "service.name"
    }
    names = {span.name for resource_spans in resources for scope in resource_spans.scope_spans for span in scope.spans}
    assert services == {"nbest"}
    assert names >= {f"POST {CHAT}", "chat scripted", "queue", "generate", "score", "select"}


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """A collector's address, and the exports it has received with their paths."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Writes nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()
