"""The tokens that a policy reads and the tokens that it learns.

The prompt has the tokens that the engine gives it in serving (`server.generation.prompt_tokens`). The completion is
tokenised on its own and follows, as in sampling: no token spans the border between them, which can happen if both are
tokenised as one text. A completion that ended normally is closed by EOS. A completion that was cut by its length is not
closed, or the policy would learn to stop there.
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
    """A row's prompt and texts in tokens; `completions` are in the order of `row.texts`."""

    row: PreferenceRow
    prompt_ids: list[int]
    completions: list[list[int]]


def tokenise(rows: list[PreferenceRow], tokenizer: Any, max_length: int, source: Source) -> list[TokenisedRow]:
    """All rows in tokens; a completion is truncated so that prompt and completion have at most `max_length` tokens.

    `source` is named in errors.

    Raises:
        DataError: prompts that leave no room for a completion, empty completions, or a missing chat template.
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
            f"the prompt has {len(prompt_ids)} tokens and {max_length} are read, so no completion fits; "
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
