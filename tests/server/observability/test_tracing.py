"""The traces of scripted requests, read back from memory: who is whose child, what is told, and what never is."""

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

    def one(self, name: str) -> ReadableSpan:
        [span] = self.all(name)
        return span

    def tree(self) -> dict[str, Any]:
        """Span name -> its children in the same form; several of one name count as one with their number before it."""

        def below(parent: int | None) -> dict[str, Any]:
            children: dict[str, list[int]] = {}
            for span in sorted(self.all(), key=lambda one: one.start_time or 0):
                if span.context and (span.parent.span_id if span.parent else None) == parent:
                    children.setdefault(span.name, []).append(span.context.span_id)
            return {
                f"{len(ids)} {name}": {key: value for one in ids for key, value in below(one).items()}
                for name, ids in children.items()
            }

        return below(None)


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def traces() -> Traces:
    return Traces()


@asynccontextmanager
async def opening(best_of_n: BestOfN) -> AsyncIterator[BestOfN]:
    yield best_of_n


def traced_app(tracing: Tracing, best_of_n: BestOfN) -> FastAPI:
    return create_app(lambda: tracing.over(opening(best_of_n)), Settings(), Metrics(), tracing=tracing)


@asynccontextmanager
async def traced_client(
    traces: Traces, generator: ScriptedGenerator, *scorers: ScriptedScorer
) -> AsyncIterator[httpx.AsyncClient]:
    best_of_n = pipeline(generator, *(scorers or [ScriptedScorer(TASTE)]))
    async with client_of(traced_app(traces.tracing, best_of_n)) as client:
        traces.clear()  # what was asked until it was ready
        yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(CHAT, json=HELLO | {"best_of": 3} | fields)


async def test_a_request_is_a_tree_with_a_generate_and_a_score_for_each_candidate(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        assert (await ask(client)).status_code == 200
    run: dict[str, Any] = {"1 queue": {}, "3 generate": {}, "3 score": {}, "1 select": {}}
    assert traces.tree() == {f"1 POST {CHAT}": {"1 admission": {}, "1 chat scripted": run}}
    for name in ("generate", "score"):
        assert sorted(told(one)["nbest.candidate.index"] for one in traces.all(name)) == [0, 1, 2]


async def test_a_stream_is_the_same_tree(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["a b c"])) as client:
        assert (await ask(client, best_of=1, stream=True)).status_code == 200
    run: dict[str, Any] = {"1 queue": {}, "1 generate": {}, "1 score": {}, "1 select": {}}
    assert traces.tree() == {f"1 POST {CHAT}": {"1 admission": {}, "1 chat scripted": run}}


async def test_spans_begin_and_end_within_their_parent(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        await ask(client)
    by_id = {span.context.span_id: span for span in traces.all() if span.context}
    children = [span for span in traces.all() if span.parent]
    assert len(children) == 10
    for child in children:
        parent = by_id[child.parent.span_id] if child.parent else child
        times = (parent.start_time, child.start_time, child.end_time, parent.end_time)
        assert sorted(time or 0 for time in times) == list(times), child.name


async def test_the_run_tells_what_was_asked_and_what_it_came_to(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(list(TASTE))) as client:
        await ask(client, max_tokens=5, temperature=0.5, seed=3)
    account = told(traces.one("chat scripted"))
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


async def test_a_candidate_tells_its_tokens_its_end_and_its_reward(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["great fun"])) as client:
        await ask(client, best_of=1)
    assert told(traces.one("generate")) == {
        "nbest.candidate.index": 0,
        "nbest.candidate.outcome": "completed",
        "nbest.candidate.tokens": 2,
        "nbest.candidate.finish_reason": "stop",
    }
    assert told(traces.one("score")) == {
        "nbest.candidate.index": 0,
        "nbest.reward_model": "scripted-reward",
        "nbest.score.group_size": 1,
        "nbest.reward": 2.5,
    }


async def test_candidates_cut_off_by_a_deadline_are_marked(traces: Traces) -> None:
    generator = ScriptedGenerator(list(TASTE), delays_s={2: NEVER_S})
    async with traced_client(traces, generator) as client:
        assert (await ask(client, nbest={"deadline_s": 0.2})).json()["nbest"]["cancelled"] == 1
    outcomes = {
        told(one)["nbest.candidate.index"]: told(one)["nbest.candidate.outcome"] for one in traces.all("generate")
    }
    assert outcomes == {0: "completed", 1: "completed", 2: "cancelled"}
    assert told(traces.one("chat scripted"))["nbest.stopped_by"] == "deadline"


async def test_a_run_that_is_given_up_leaves_no_span_open_and_is_no_error(traces: Traces) -> None:
    generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(3), NEVER_S))
    async with traces.tracing.over(opening(pipeline(generator))) as traced:
        running = asyncio.create_task(traced.run(BestOfNRequest(Prompt(text="How was it?"), SamplingParams(), 3)))
        await asyncio.sleep(0)  # nothing on the way to the scripted engine waits, so all candidates are under way
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [told(one)["nbest.candidate.outcome"] for one in traces.all("generate")] == ["cancelled"] * 3
    run = traces.one("text_completion scripted")
    assert told(run)["nbest.cancelled"] is True
    assert run.status.status_code is StatusCode.UNSET


async def test_a_failed_candidate_is_an_error_of_its_own_span_alone(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull", None, "great fun"])) as client:
        assert (await ask(client)).status_code == 200
    failed = [one for one in traces.all() if one.status.status_code is StatusCode.ERROR]
    assert [(one.name, told(one)["nbest.candidate.outcome"]) for one in failed] == [("generate", "failed")]
    assert told(failed[0])["error.type"] == "candidate_failed"


async def test_a_reward_failure_is_an_error_up_to_the_request(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"]), ScriptedScorer(fails=True)) as client:
        assert (await ask(client, best_of=1)).status_code == 503
    errors = {
        one.name: told(one).get("error.type") for one in traces.all() if one.status.status_code is StatusCode.ERROR
    }
    assert errors == {"score": "ScoringError", "chat scripted": "reward_failed", f"POST {CHAT}": "503"}


async def test_a_missing_reward_is_left_out(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"]), ScriptedScorer({"dull": math.nan})) as client:
        await ask(client, best_of=1, nbest={"on_reward_failure": "first"})
    assert "nbest.reward" not in told(traces.one("score"))
    assert "nbest.reward" not in told(traces.one("chat scripted"))


async def test_a_refusal_is_told_by_its_status_and_is_no_error_of_ours(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await ask(client, best_of=0)
        await client.get("/no/such/path")
    refused, lost = traces.all()
    assert (refused.name, told(refused)["http.response.status_code"]) == (f"POST {CHAT}", 400)
    assert (lost.name, told(lost)["http.response.status_code"]) == ("GET unknown", 404)
    assert {one.status.status_code for one in (refused, lost)} == {StatusCode.UNSET}


async def test_a_client_s_trace_is_continued(traces: Traces) -> None:
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post(CHAT, json=HELLO, headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
    request = traces.one(f"POST {CHAT}")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert (request.parent.span_id, request.parent.is_remote) == (int(span_id, 16), True)
    assert {one.context.trace_id for one in traces.all() if one.context} == {int(trace_id, 16)}


async def test_a_trace_that_a_client_does_not_keep_is_not_kept(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
        await client.post(CHAT, json=HELLO, headers={"traceparent": parent})
    assert traces.all() == []


async def test_an_unusable_traceparent_begins_a_new_trace(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post(CHAT, json=HELLO, headers={"traceparent": "00-nonsense"})
    assert traces.one(f"POST {CHAT}").parent is None


async def test_log_lines_and_spans_name_each_other(traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    scorer = ScriptedScorer()
    score = scorer.score

    async def noting(*args: Any) -> Any:
        seen.append(current())
        return await score(*args)

    monkeypatch.setattr(scorer, "score", noting)
    async with traced_client(traces, ScriptedGenerator(["dull"]), scorer) as client:
        reply = await ask(client, best_of=1)
    request = traces.one(f"POST {CHAT}")
    assert told(request)["nbest.request_id"] == reply.headers["x-request-id"]
    assert request.context is not None
    assert [int(record.trace_id, 16) for record in seen] == [request.context.trace_id]


async def test_scores_that_are_asked_for_are_children_of_their_request(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        await client.post("/v1/score", json={"prompt": "x", "candidates": ["dull", "great fun"]})
    assert traces.tree() == {"1 POST /v1/score": {"2 score": {}}}


async def test_probes_are_not_traced(traces: Traces) -> None:
    async with traced_client(traces, ScriptedGenerator(["dull"])) as client:
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
    assert traces.all() == []


async def test_no_text_and_no_message_is_recorded(traces: Traces) -> None:
    secret = "xyzzy"
    body = HELLO | {"best_of": 2, "messages": [{"role": "user", "content": secret}]}
    async with traced_client(traces, ScriptedGenerator([secret, None]), ScriptedScorer(fails=True)) as client:
        for extra in ({}, {"nbest": {"on_reward_failure": "first"}}, {"model": secret}):
            await client.post(CHAT, json=body | extra)
        await client.get(f"/{secret}?{secret}")
    assert len(traces.all()) > 10
    assert not [span.name for span in traces.all() if secret in span.to_json() or "scripted failure" in span.to_json()]
    assert not [span.name for span in traces.all() if span.events]


async def test_names_that_look_standard_are_standard(traces: Traces) -> None:
    """A misspelt gen_ai. or http. attribute would be missed by every tool that knows the conventions."""
    async with traced_client(traces, ScriptedGenerator([None, "dull"]), ScriptedScorer(fails=True)) as client:
        await ask(client, seed=1, max_tokens=5)
        await ask(client, nbest={"on_reward_failure": "first"})
    used = {name for span in traces.all() for name in told(span) if not name.startswith("nbest.")}
    assert used - {"error.type"}
    standard = {
        value
        for module in (gen_ai_attributes, http_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper()
    }
    assert used <= standard


async def test_traces_arrive_at_a_collector() -> None:
    """Over HTTP, in OTLP's own encoding, at the path for traces, and at the latest when the server stops."""
    with collector() as (url, received):
        tracing = Tracing.to_collector(url, sample_ratio=1.0)
        async with client_of(traced_app(tracing, pipeline(ScriptedGenerator(["dull"])))) as client:
            await ask(client)
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [one for _, export in received for one in export.resource_spans]
    services = {
        pair.value.string_value for one in resources for pair in one.resource.attributes if pair.key == "service.name"
    }
    names = {span.name for one in resources for scope in one.scope_spans for span in scope.spans}
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
            """Nothing to say."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()
