"""The parts of the OpenAPI document that FastAPI cannot derive from the routes.

The endpoints read bodies and write streams themselves, so FastAPI knows the models of neither; and API keys are checked
outside of all routes.
"""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.schemas.requests import ChatCompletionRequest, CompletionRequest, ScoreRequest
from server.schemas.responses import ChatCompletionChunk, ErrorReply, TextCompletionChunk
from server.schemas.strict import StrictModel

API_VERSION = "1"
REFERENCE = "#/components/schemas/{model}"

SECURITY_SCHEMES = {"key": {"type": "http", "scheme": "bearer", "description": "A key from `nbest keys new`."}}
PLAYGROUND_PAGE = {"description": "The playground", "content": {"text/html": {"schema": {"type": "string"}}}}
PROMETHEUS_TEXT = {"description": "Prometheus text exposition", "content": {"text/plain": {}}}


class DocumentedApp(FastAPI):
    """A FastAPI app whose OpenAPI document includes the models of bodies and streams, and the API keys."""

    def __init__(self, *, needs_key: bool, **options: Any) -> None:
        super().__init__(
            title="nbest",
            summary="Best-of-N inference with reward reranking, OpenAI-compatible.",
            version=API_VERSION,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            **options,
        )
        self._security: list[dict[str, Any]] = [{"key": []}] if needs_key else [{}, {"key": []}]

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"].update(body_and_stream_schemas())
            document["components"]["securitySchemes"] = SECURITY_SCHEMES
            document["security"] = self._security
        return super().openapi()


def body_and_stream_schemas() -> dict[str, Any]:
    """The JSON schemas that `json_body` and `replies` refer to, by name."""
    _, document = models_json_schema(
        [
            (ChatCompletionRequest, "validation"),
            (CompletionRequest, "validation"),
            (ScoreRequest, "validation"),
            (ChatCompletionChunk, "serialization"),
            (TextCompletionChunk, "serialization"),
        ],
        ref_template=REFERENCE,
    )
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def json_body(model: type[StrictModel]) -> dict[str, Any]:
    """The request body of a route: JSON of this model."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _reference(model)}}}}


def inline_json_body(model: type[StrictModel]) -> dict[str, Any]:
    """The same for a route that is not always served: the schema is inlined, so the model must contain no others."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def replies(
    model: type[BaseModel], *statuses: int, chunk: type[BaseModel] | None = None, needs_key: bool = True
) -> dict[int | str, dict[str, Any]]:
    """The replies of a route: this model, or with `stream` events with a chunk each, and errors of these statuses."""
    answer: dict[str, Any] = {"model": model, "description": "The answer"}
    if chunk is not None:
        answer["description"] = "The answer; with stream: true, events with a chunk each, then [DONE]"
        answer["content"] = {"text/event-stream": {"schema": _event_schema(chunk)}}
    return {200: answer, **error_replies(*statuses, *([401] if needs_key else []))}


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Replies of these statuses in OpenAI's error envelope."""
    return {status: {"model": ErrorReply, "description": HTTPStatus(status).phrase} for status in sorted(statuses)}


def _event_schema(chunk: type[BaseModel]) -> dict[str, Any]:
    """The schema of one server-sent event, in OpenAPI's form for events whose data is JSON."""
    json_data = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(model)}
        for model in (chunk, ErrorReply)  # an error is the last event of a stream that failed
    ]
    done = {"type": "string", "const": "[DONE]"}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [*json_data, done]}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
