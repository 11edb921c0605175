"""The prompts of a run, and which of them each step samples.

What a step samples depends only on the seed of the run and the number of the step. So a resumed run needs neither a
position in the data nor the state of a random generator.
"""

import random
from collections.abc import Iterator
from typing import Any

from reranker.candidate import Prompt
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow, messages_of, read_rows, text_of
from training.policy.finetune import DataSplit
from training.policy.tokens import TokenisedRow, tokenise

SEEDS = 1 << 31
"""Seeds are drawn from 0 to this number, exclusive."""


def prompt_row(line: int, fields: dict[str, Any]) -> PreferenceRow:
    """The row of one line: `prompt`, a string or messages, or else `messages`; other fields are ignored.

    Raises:
        TypeError, ValueError: there is no prompt; the message gives the reason.
    """
    if isinstance(fields.get("prompt"), str):
        prompt = Prompt(text=text_of(fields, "prompt"))
    else:
        name = "prompt" if "prompt" in fields else "messages"
        if name not in fields:
            raise ValueError(f"the fields are {', '.join(sorted(fields)) or 'none'}; a line has prompt or messages")
        prompt = Prompt(messages=messages_of(fields, name))
    return PreferenceRow(line, prompt, (), (), line)


def read_prompts(source: Source, validation: Source | None, holdout: float) -> DataSplit:
    """The prompts to learn from and those to evaluate on: `validation` or, without it, the share `holdout` of all.

    Raises:
        DataError, DataSourceError: prompts that cannot be used, or a source without any.
    """
    held_out = (read_rows(validation, prompt_row), validation) if validation else None
    return DataSplit.of(read_rows(source, prompt_row), source, held_out, holdout)


def tokenise_prompts(
    rows: list[PreferenceRow], source: Source, tokenizer: Any, max_length: int, max_tokens: int
) -> list[TokenisedRow]:
    """The prompts in tokens; each leaves room for a completion of `max_tokens` in `max_length`.

    Raises:
        DataError: prompts that are empty or too long.
    """
    prompts = tokenise(rows, tokenizer, max_length, source)
    errors: list[tuple[int, str]] = []
    for prompt in prompts:
        length = len(prompt.prompt_ids)
        if not length:
            errors.append((prompt.row.line, "the prompt is empty; give at least one word"))
        elif length + max_tokens > max_length:
            reason = f"the prompt has {length} tokens and with {max_tokens} more does not fit the {max_length} read"
            errors.append((prompt.row.line, f"{reason}; lower --max-tokens, or leave the line out"))
    if errors:
        raise DataError(source, errors)
    return prompts


def prompts_of_step(prompts: list[TokenisedRow], step: int, count: int, seed: int) -> list[TokenisedRow]:
    """The `count` prompts of a step, counted from 0; every pass over all prompts has an order of its own."""

    def from_position(begin: int) -> Iterator[TokenisedRow]:
        pass_number, position = divmod(begin, len(prompts))
        while True:
            order = random.Random(f"{seed} order {pass_number}").sample(range(len(prompts)), len(prompts))
            yield from (prompts[index] for index in order[position:])
            pass_number, position = pass_number + 1, 0

    stream = from_position(step * count)
    return [next(stream) for _ in range(count)]


def seeds_of_step(step: str, count: int, seed: int) -> list[int]:
    """A seed for each prompt of the step with that name; the candidates of a prompt have the seeds after it."""
    rng = random.Random(f"{seed} seeds {step}")
    return [rng.randrange(SEEDS) for _ in range(count)]
