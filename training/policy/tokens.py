"""What a policy reads and what it learns, in tokens.

The prompt's tokens are those that the engine gives it when it is served (`server.generation.prompt_tokens`), and a
completion follows in tokens of its own, as one that is drawn does: no token straddles the border, which it might where
both are tokenised as one text. A completion that ended by itself is closed by EOS; one that was cut by its length is
not, or the policy would learn to stop there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reranker.candidate import Prompt
from server.errors import BadRequestError
from server.generation.prompt_tokens import encode_prompt
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """A row's prompt, and its texts in their order."""

    row: PreferenceRow
    prompt_ids: list[int]
    completions: list[list[int]]


def tokenise(rows: list[PreferenceRow], tokenizer: Any, max_length: int, source: Source) -> list[TokenisedRow]:
    """All rows in tokens, the ends of completions cut to `max_length` with their prompt; `source` is named in errors.

    Raises:
        DataError: some prompts leave no room, some completions are empty, or a chat template is missing.
    """
    tokenised: list[TokenisedRow] = []
    errors: list[tuple[int, str]] = []
    for row in rows:
        try:
            prompt_ids = _prompt_ids(tokenizer, row.prompt, max_length)
            tokenised.append(
                TokenisedRow(row, prompt_ids, list(_completions(tokenizer, row, max_length - len(prompt_ids))))
            )
        except ValueError as error:
            errors.append((row.line, str(error)))
    if errors:
        raise DataError(source, errors)
    return tokenised


def _prompt_ids(tokenizer: Any, prompt: Prompt, max_length: int) -> list[int]:
    try:
        prompt_ids = encode_prompt(tokenizer, prompt)
    except BadRequestError as error:
        raise ValueError(str(error)) from error
    if len(prompt_ids) >= max_length:
        raise ValueError(
            f"the prompt is {len(prompt_ids)} tokens and {max_length} are read, so none is left to learn; "
            "raise --max-length, or leave the row out"
        )
    return prompt_ids


def _completions(tokenizer: Any, row: PreferenceRow, room: int) -> Iterator[list[int]]:
    for index, text in enumerate(row.texts):
        token_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        if index not in row.cut and token_ids[-1:] != [tokenizer.eos_token_id]:
            token_ids.append(tokenizer.eos_token_id)
        if not token_ids:
            raise ValueError("a completion is empty and was cut, so there is nothing to learn; leave the row out")
        yield token_ids[:room]
