"""JSON schemas on the real engine: enforced, or refused by name, whatever was requested before."""

import json
from typing import Any

import openai
import pytest

from tests.end_to_end.test_best_of_n import FILM, MODEL

pytestmark = pytest.mark.engine

OBJECT = {
    "type": "object",
    "properties": {"verdict": {"enum": ["good", "bad"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}
TUPLE = {
    "type": "array",
    "prefixItems": [{"enum": ["good", "bad"]}, {"type": "boolean"}],
    "items": False,
    "minItems": 2,
}
MANY_REPETITIONS = {"type": "string", "pattern": "^[a-z]{1,20000}$"}


def answer(client: openai.OpenAI, schema: dict[str, Any], max_tokens: int = 30) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=FILM,
        max_tokens=max_tokens,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        extra_body={"best_of": 2, "nbest": {"return_candidates": True}},
    )


@pytest.mark.parametrize("schema", [{"not": OBJECT}, {"$ref": "http://example.com/schema.json"}, {"type": "no type"}])
def test_what_cannot_be_enforced_is_a_400_and_changes_nothing_for_later_schemas(
    client: openai.OpenAI, schema: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        answer(client, schema)
    assert refusal.value.param == "response_format.json_schema.schema"
    for candidate in answer(client, TUPLE).nbest["candidates"]:
        verdict, is_sure = json.loads(candidate["text"])
        assert verdict in {"good", "bad"}
        assert isinstance(is_sure, bool)
    assert json.loads(answer(client, OBJECT).choices[0].message.content)["verdict"] in {"good", "bad"}


def test_a_pattern_with_many_repetitions_is_sampled_like_any_other(client: openai.OpenAI) -> None:
    candidates = answer(client, MANY_REPETITIONS, max_tokens=8).nbest["candidates"]
    assert all(candidate["text"].lstrip()[:1] == '"' for candidate in candidates)


def test_any_json_object_is_an_object(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=FILM, max_tokens=60, response_format={"type": "json_object"}, extra_body={"best_of": 2}
    )
    choice = reply.choices[0]
    assert (choice.message.content or "").lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
