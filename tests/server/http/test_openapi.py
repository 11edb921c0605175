"""The OpenAPI document is complete, and the server accepts and returns what the document says."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from server.http import api_keys
from tests.support.doubles import ObjectGenerator, ScriptedGenerator
from tests.support.serving import app_over, pipeline

APP = app_over(pipeline(ObjectGenerator(["so very good", None])), default_best_of=2, max_best_of=4)
KEYS_FILE = Path(tempfile.mkdtemp()) / "keys.toml"
KEY = api_keys.new_key(KEYS_FILE, "schemathesis")
APP_WITH_KEYS = app_over(pipeline(ScriptedGenerator(["so very good"])), max_best_of=4, keys_file=KEYS_FILE)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_is_to_a_schema_of_the_document() -> None:
    document = APP.openapi()
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    referenced = set(references(document))
    assert referenced <= schemas
    assert "#/components/schemas/ChatCompletionChunk" in referenced


def test_every_route_is_documented() -> None:
    assert set(APP.openapi()["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/score",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
        "/",
    }


@pytest.mark.parametrize(
    ("model", "field", "schema"),
    [
        ("ChatCompletionRequest", "tools", {"maxItems": 0, "items": {"$ref": "#/components/schemas/JsonValue"}}),
        ("CompletionRequest", "prompt", {"type": "string"}),
        ("ChatCompletionRequest", "stop", {"type": "string", "minLength": 1}),
    ],
)
def test_the_schemas_of_requests_list_every_accepted_form(model: str, field: str, schema: dict[str, Any]) -> None:
    documented = APP.openapi()["components"]["schemas"][model]["properties"][field]
    assert any(schema.items() <= choice.items() for choice in documented["anyOf"])


@settings(max_examples=30, deadline=None, derandomize=True)
def check_generated_request(case: schemathesis.Case) -> None:
    """Sends valid and invalid requests, and runs every check of schemathesis but one.

    The check left out is that every body valid by the schema is accepted: a JSON schema cannot say n <= best_of. A
    deadline of a nanosecond is rightly a 504, so deadlines are made long enough.
    """
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "scripted"  # otherwise nearly all replies would be 404
    options = case.body.get("nbest") if isinstance(case.body, dict) else None
    if isinstance(options, dict) and type(options.get("deadline_s")) in (int, float) and 0 < options["deadline_s"] < 60:
        options["deadline_s"] = 60.0
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


test_generated_requests_get_the_documented_replies = schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()(
    check_generated_request
)


@settings(max_examples=10, deadline=None, derandomize=True)
def check_key_is_required(case: schemathesis.Case) -> None:
    """A request with the key is served, and the same request without it or with another key is refused."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "scripted"
    case.call_and_validate(
        headers={"Authorization": f"Bearer {KEY}"},
        checks=[ignored_auth, status_code_conformance, content_type_conformance, response_schema_conformance],
    )


test_every_documented_request_requires_the_key = schemathesis.openapi.from_asgi(
    "/openapi.json", APP_WITH_KEYS, headers={"Authorization": f"Bearer {KEY}"}
).parametrize()(check_key_is_required)
