"""Which JSON schemas are accepted, and which texts satisfy one; llguidance and the validator are the real ones."""

import asyncio
import json
from typing import Any

import pytest

from server.errors import BadRequestError
from server.generation import structured_output
from server.generation.structured_output import MAX_BYTES, MAX_DEPTH, OutputSchema, SchemaChecker, check_size

POINT: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def test_a_schema_within_the_limits_is_accepted() -> None:
    check_size(nested(MAX_DEPTH - 1))
    check_size({"description": "a" * (MAX_BYTES - 100)})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (nested(MAX_DEPTH + 1), "nested more than 64 levels"),
        ({"not": nested(5000)}, "nested more than 64 levels"),
        ({"description": "a" * MAX_BYTES}, "over 65536 bytes"),
    ],
    ids=["one level too many", "a depth that would end a recursion", "too many bytes"],
)
def test_a_schema_over_the_limits_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason) as refusal:
        check_size(schema)
    assert refusal.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "schema",
    [
        POINT,
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        {"allOf": [POINT | {"additionalProperties": True}, {"properties": {"y": {"type": "string"}}}]},
        {"type": "string", "pattern": "^[a-z]{1,20000}$"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
    ],
    ids=["object", "tuple", "allOf", "a pattern with many repetitions", "open object"],
)
async def test_an_enforceable_schema_passes(schema: dict[str, Any]) -> None:
    await SchemaChecker().check(schema)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"$ref": "http://example.com/schema.json"}, "http://example.com/schema.json"),
        (POINT | {"required": ["y"]}, "required property 'y'"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, '"if"'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "^(?=a)b"}, "regex"),
    ],
    ids=["remote reference", "unknown required", "not", "uniqueItems", "if", "oneOf", "look-ahead"],
)
async def test_a_schema_that_cannot_be_enforced_is_refused_by_its_keyword(schema: dict[str, Any], keyword: str) -> None:
    checker = SchemaChecker()
    for _ in range(2):  # the kept result says the same
        with pytest.raises(BadRequestError) as refusal:
            await checker.check(schema)
        assert keyword in refusal.value.message


async def test_the_result_does_not_depend_on_earlier_schemas() -> None:
    """vLLM's `auto` keeps the backend of the first schema for all later ones."""
    unenforceable: dict[str, Any] = {"not": {"type": "string"}}
    for schemas in ([POINT, unenforceable], [unenforceable, POINT]):
        checker, refused = SchemaChecker(), []
        for schema in schemas:
            try:
                await checker.check(schema)
            except BadRequestError:
                refused.append(schema)
        assert refused == [unenforceable]


async def test_a_slow_check_is_refused_and_others_are_checked_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, release = asyncio.get_running_loop(), asyncio.Event()
    check = structured_output._grammar_error

    def slow(schema: str) -> str:
        if "slow" in schema:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return check(schema)

    monkeypatch.setattr(structured_output, "_grammar_error", slow)
    monkeypatch.setattr(structured_output, "TIMEOUT_S", 0.05)
    checker = SchemaChecker()
    attack = asyncio.create_task(checker.check({"title": "slow", **POINT}))
    await asyncio.sleep(0)
    monkeypatch.setattr(structured_output, "TIMEOUT_S", 60)
    await checker.check(POINT)
    with pytest.raises(BadRequestError, match="takes over"):
        await attack
    release.set()


async def test_only_the_latest_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "MAX_CHECKED", 3)
    checker = SchemaChecker()
    for number in range(10):
        await checker.check({"const": number})
    assert [json.loads(schema)["const"] for schema in checker._errors] == [7, 8, 9]


@pytest.mark.parametrize(
    ("schema", "text", "error"),
    [
        (POINT, '{"x": 1}', None),
        (POINT, ' {"x":\n1} ', None),
        (POINT, '{"x": "1"}', 'is not of type "integer"'),
        (POINT, '{"x": 1, "y": 2}', "Additional properties"),
        (POINT, '{"x": 1', "not JSON"),
        (POINT, "Sure! Here it is.", "not JSON"),
        ({}, "{}", None),
        ({}, "[1]", 'is not of type "object"'),
        ({"type": "string", "pattern": "^(a+)+$"}, json.dumps("a" * 5000 + "b"), "does not match"),
    ],
)
def test_a_text_is_validated_against_its_schema(schema: dict[str, Any], text: str, error: str | None) -> None:
    reason = OutputSchema(schema).error(text)
    assert (reason is None) if error is None else (reason is not None and error in reason)


@pytest.mark.parametrize("schema", [{"type": "no such type"}, {"$ref": "http://example.com/schema.json"}])
def test_what_is_not_a_schema_is_refused_before_anything_is_sampled(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="The JSON schema is invalid"):
        OutputSchema(schema)
