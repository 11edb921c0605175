"""Parses the JSON of a request into a validated model, or raises an error with one sentence that says what is wrong.

JSON is read strictly: NaN and Infinity are not JSON, a number in a string is a string, and an unknown field is an
error. If there are several mistakes, the error reports the first, with the path of its field as `param`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, LiteralString, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, from_json

from server.errors import BadRequestError


class StrictModel(BaseModel):
    """The base class of all models of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


RequestModel = TypeVar("RequestModel", bound=StrictModel)


def _must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("it is true")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_must_be_false), WithJsonSchema({"type": "boolean", "const": False})]
"""Unlike Literal[False] it does not accept 0, which Python considers equal to False."""
EmptyList = Annotated[list[JsonValue], Field(max_length=0)]
EmptyObject = Annotated[dict[str, JsonValue], Field(max_length=0)]


HINT: LiteralString = "hint"
"""The pydantic error type of a `FieldHint`, whose message is already a sentence."""


@dataclass(frozen=True, slots=True)
class FieldHint:
    """Makes `sentence` the error for a value outside of the annotated type, and the field's description in OpenAPI."""

    sentence: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "description": self.sentence}

    def _validate(self, value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError(HINT, "{sentence}", {"sentence": self.sentence}) from None


class IgnoredField(FieldHint):
    """Marks a field of OpenAI's API whose accepted values, if any, have no effect here."""


def parse(body: bytes, model: type[RequestModel]) -> RequestModel:
    """Parses and validates a request body.

    Raises:
        BadRequestError: the body is not JSON, or not a request of this model; the message is for the client.
    """
    return validated(parse_object(body, "body"), model)


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """Parses a JSON object; `source` names the text in errors, such as "body" or "line".

    Raises:
        BadRequestError: the text is not JSON, or not an object.
    """
    try:
        document = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"The {source} is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise BadRequestError(f"The {source} is not a JSON object; send an object with the fields of the request.")
    return document


def validated(document: dict[str, Any], model: type[RequestModel]) -> RequestModel:
    """Validates a JSON object as a request of this model.

    Raises:
        BadRequestError: it is not a request of this model; the message is for the client.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _first_mistake(error) from None


def _first_mistake(error: ValidationError) -> BadRequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return BadRequestError(f"{param} is required.", param=param)
    if first["type"] == "extra_forbidden":
        return BadRequestError(f"{param} is not a field of this request; check its spelling or remove it.", param=param)
    sentence = first["msg"] if first["type"] == HINT else f"{first['msg'][:1].lower()}{first['msg'][1:]}."
    return BadRequestError(f"{param}: {sentence}", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    """The path of a field as the client would write it, such as messages[0].content."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location if step != "[key]")
    return "".join(steps).removeprefix(".")
