"""Structured output: which JSON schemas are accepted, and whether a text satisfies one.

The engine enforces schemas with one backend, llguidance, from its start: vLLM's `auto` keeps the backend of the first
schema that it meets, so that the same schema is enforced, refused or ignored depending on what was requested before.
llguidance names the keywords that it cannot enforce, and builds its automata while it samples, so that a pattern such
as ^[a-z]{1,20000}$ costs milliseconds; it has limits of its own on what one token may cost.

    check_size       bytes and depth, before anything reads the schema
    SchemaChecker    what the backend cannot enforce, before anything is sampled
    OutputSchema     whether a finished text satisfies the schema, before it is ranked
"""

import asyncio
import json
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs

from server.errors import BadRequestError

BACKEND = "guidance"
"""vLLM's name of llguidance."""
PARAM = "response_format.json_schema.schema"
MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
"""Nested objects and arrays; llguidance itself stops at 128."""
TIMEOUT_S = 5.0
"""A schema within the limits takes milliseconds to check."""
THREADS = 2
MAX_CHECKED = 256
"""Schemas whose result is kept; clients send the same few again and again."""


def check_size(schema: dict[str, Any]) -> None:
    """Refuses a schema that is too large to be read.

    Raises:
        BadRequestError: it has too many bytes or levels.
    """
    if _depth(schema) > MAX_DEPTH:
        raise BadRequestError(
            f"The JSON schema is nested more than {MAX_DEPTH} levels deep; make it flatter.", param=PARAM
        )
    if len(json.dumps(schema)) > MAX_BYTES:
        raise BadRequestError(f"The JSON schema is over {MAX_BYTES} bytes; shorten it.", param=PARAM)


class SchemaChecker:
    """Says whether the engine can enforce a schema. Keeps the results of the latest `MAX_CHECKED` schemas."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="schemas")
        self._errors: OrderedDict[str, str] = OrderedDict()

    async def check(self, schema: dict[str, Any]) -> None:
        """Returns if the engine can enforce the schema. The event loop and the engine are not held up.

        Raises:
            BadRequestError: it cannot, with the keyword or reason; or the check took too long.
        """
        text = json.dumps(schema, sort_keys=True)
        if text not in self._errors:
            checking = asyncio.get_running_loop().run_in_executor(self._threads, _grammar_error, text)
            try:
                self._errors[text] = await asyncio.wait_for(checking, TIMEOUT_S)
            except TimeoutError:
                self._errors[text] = f"it takes over {TIMEOUT_S:g} s to check; simplify it"
            if len(self._errors) > MAX_CHECKED:
                self._errors.popitem(last=False)
        if error := self._errors[text]:
            raise BadRequestError(f"The JSON schema cannot be enforced: {error}.", param=PARAM)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class OutputSchema:
    """A schema that finished texts are validated against; {} is any JSON object. It never opens a connection."""

    def __init__(self, schema: dict[str, Any]) -> None:
        """Compiles the schema, in milliseconds.

        Raises:
            BadRequestError: it is not a JSON schema.
        """
        try:
            self._validator = jsonschema_rs.validator_for(
                schema or {"type": "object"}, pattern_options=jsonschema_rs.RegexOptions(), offline=True
            )
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise BadRequestError(f"The JSON schema is invalid: {reason}.", param=PARAM) from error

    def error(self, text: str) -> str | None:
        """Why the text does not satisfy the schema; None if it does."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return "the text is not JSON"
        first = next(iter(self._validator.iter_errors(document)), None)
        return None if first is None else f"the text does not satisfy the JSON schema: {first.message}"


def _grammar_error(schema: str) -> str:
    """Why llguidance cannot enforce the schema; empty if it can."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
        error: str = LLMatcher.validate_grammar(grammar)
    except ValueError as refused:
        error = str(refused)
    return error.partition("\n")[0].rstrip(".")


def _depth(schema: Any) -> int:
    """Levels of nested objects and arrays, counted without recursion."""
    level, depth = [schema], 0
    while level:
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1
    return depth
