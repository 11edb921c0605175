"""The trace span of an HTTP request. The spans of the pipeline are in `server.observability.tracing`."""

from opentelemetry.trace import SpanKind, Tracer, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.request_log import endpoint_of, header
from server.observability.request_context import PROBES, current
from server.observability.tracing import mark_failed


class RequestSpans:
    """Middleware that opens a span for every request except probes.

    It must run inside of `RequestRecorder`, which opens the record of the request.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._w3c = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = current()
        if record is None or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        parent = self._w3c.extract({name: header(scope, name.encode()) or "" for name in sorted(self._w3c.fields)})
        with self._tracer.start_as_current_span(
            record.method, parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            record.trace_id = format_trace_id(span.get_span_context().trace_id)
            try:
                await self._app(scope, receive, send)
            finally:
                endpoint = endpoint_of(scope)
                span.update_name(f"{record.method} {endpoint}")
                span.set_attributes(
                    {
                        "http.request.method": record.method,
                        "http.route": endpoint,
                        "http.response.status_code": record.status,
                        "nbest.request_id": record.request_id,
                    }
                )
                if record.status >= 500:
                    mark_failed(span, str(record.status))
