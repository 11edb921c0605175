"""How the bytes of a request become a validated model, or one sentence that says what is wrong with them.

JSON is read to the letter: NaN and Infinity are not JSON, a number in a string is a string, an unknown field
is an error. Of several mistakes the first is told, with the path of its field as `param`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

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
    """The base of everything clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


RequestModel = TypeVar("RequestModel", bound=StrictModel)


def _must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("it is true")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_must_be_false), WithJsonSchema({"type": "boolean", "const": False})]
"""Unlike Literal[False] it does not take 0, which Python holds for equal."""
EmptyList = Annotated[list[JsonValue], Field(max_length=0)]
EmptyObject = Annotated[dict[str, JsonValue], Field(max_length=0)]


@dataclass(frozen=True, slots=True)
class FieldHint:
    """Says `sentence` to whoever sends a value outside the annotated type."""

    sentence: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "description": self.sentence}

    def _validate(self, value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("advice", "{sentence}", {"sentence": self.sentence}) from None


class IgnoredField(FieldHint):
    """Marks a field of OpenAI's whose allowed values, if any, change nothing here."""


def parse(body: bytes, model: type[RequestModel]) -> RequestModel:
    """The request in a body.

    Raises:
        BadRequestError: it is not JSON, or not such a request; the message is for the client.
    """
    return validated(parse_object(body, "body"), model)


def parse_object(text: bytes, called: str) -> dict[str, Any]:
    """The JSON object in a text, which errors call by that name.

    Raises:
        BadRequestError: it is not JSON, or something other than an object.
    """
    try:
        document = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"The {called} is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise BadRequestError(f"The {called} is not a JSON object; send an object with the fields of the request.")
    return document


def validated(document: dict[str, Any], model: type[RequestModel]) -> RequestModel:
    """The request in a JSON object.

    Raises:
        BadRequestError: it is not such a request; the message is for the client.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> BadRequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _path(first["loc"])
    if first["type"] == "missing":
        return BadRequestError(f"{param} is required.", param=param)
    if first["type"] == "extra_forbidden":
        return BadRequestError(f"{param} is not a field of this request; check its spelling or remove it.", param=param)
    sentence = first["msg"] if first["type"] == "advice" else f"{first['msg'][:1].lower()}{first['msg'][1:]}."
    return BadRequestError(f"{param}: {sentence}", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content, as the client would write it."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location if step != "[key]")
    return "".join(steps).removeprefix(".")
