"""The OpenAPI document is complete and true: what it promises is what the server takes and gives."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.doubles import ScriptedGenerator
from tests.serving import app_over, pipeline

APP = app_over(pipeline(ScriptedGenerator(["so very good", None])), default_best_of=2, max_best_of=4)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_leads_somewhere() -> None:
    document = APP.openapi()
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    found = set(references(document))
    assert found <= schemas
    assert "#/components/schemas/ChatCompletionChunk" in found


def test_every_route_is_documented() -> None:
    assert set(APP.openapi()["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/score",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
    }


@pytest.mark.parametrize(
    ("model", "field", "schema"),
    [
        ("ChatCompletionRequest", "tools", {"maxItems": 0, "items": {"$ref": "#/components/schemas/JsonValue"}}),
        ("CompletionRequest", "prompt", {"type": "string"}),
        ("ChatCompletionRequest", "stop", {"type": "string", "minLength": 1}),
    ],
)
def test_what_may_be_sent_is_told(model: str, field: str, schema: dict[str, Any]) -> None:
    documented = APP.openapi()["components"]["schemas"][model]["properties"][field]
    assert any(schema.items() <= choice.items() for choice in documented["anyOf"])


@settings(max_examples=30, deadline=None, derandomize=True)
def check_generated_request(case: schemathesis.Case) -> None:
    """Valid and invalid bodies: no bug met, no invalid body accepted, no undocumented shape.

    Not checked is that every valid body is accepted: a JSON schema cannot say n <= best_of.
    """
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "scripted"  # else nearly all would be 404
    reply = case.call_and_validate(
        checks=[
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            negative_data_rejection,
        ]
    )
    assert reply.status_code != 500  # while 504 is right for a deadline of a nanosecond


test_generated_requests_are_answered_as_documented = schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()(
    check_generated_request
)
