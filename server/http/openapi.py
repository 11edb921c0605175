"""The parts of the OpenAPI document that routes cannot declare, since they read bodies and write streams themselves."""

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
PAGE = {"description": "The playground", "content": {"text/html": {"schema": {"type": "string"}}}}
PROMETHEUS_TEXT = {"description": "Prometheus text exposition", "content": {"text/plain": {}}}


class DocumentedApp(FastAPI):
    """A FastAPI app whose OpenAPI document also has the models that routes read and stream themselves, and the keys."""

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
            document["components"]["schemas"].update(hand_read_schemas())
            document["components"]["securitySchemes"] = SECURITY_SCHEMES
            document["security"] = self._security
        return super().openapi()


def hand_read_schemas() -> dict[str, Any]:
    """The JSON schemas that `takes` and `replies` refer to, by name."""
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


def takes(model: type[StrictModel]) -> dict[str, Any]:
    """A JSON body of this model."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _reference(model)}}}}


def takes_flat(model: type[StrictModel]) -> dict[str, Any]:
    """The same for a model that stands in the document only where its route does; it holds no other models."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def replies(
    model: type[BaseModel], *statuses: int, chunk: type[BaseModel] | None = None, needs_key: bool = True
) -> dict[int | str, dict[str, Any]]:
    """A reply of this model, with `stream` events that each hold a chunk, and these errors in OpenAI's envelope."""
    answer: dict[str, Any] = {"model": model, "description": "The answer"}
    if chunk is not None:
        answer["description"] = "The answer; with stream: true, events that each hold a chunk, then [DONE]"
        answer["content"] = {"text/event-stream": {"schema": _event_of(chunk)}}
    return {200: answer, **errors(*statuses, *([401] if needs_key else []))}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Replies in OpenAI's envelope."""
    return {status: {"model": ErrorReply, "description": HTTPStatus(status).phrase} for status in sorted(statuses)}


def _event_of(chunk: type[BaseModel]) -> dict[str, Any]:
    """One server-sent event, as OpenAPI describes those whose data is JSON."""
    written = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(model)}
        for model in (chunk, ErrorReply)  # an error is the last event of a stream that broke off
    ]
    done = {"type": "string", "const": "[DONE]"}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [*written, done]}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
