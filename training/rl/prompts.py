"""The prompts of a run, and which of them each step takes.

What a step draws depends on the run's seed and on the number of the step alone, so a run that goes on needs to remember
neither a place in the data nor the state of a random generator.
"""

import random
from collections.abc import Iterator
from typing import Any

from reranker.candidate import Prompt
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow, messages_of, read_rows, text_of
from training.policy.finetune import Parts
from training.policy.tokens import TokenisedRow, tokenise

SEEDS = 1 << 31


def prompt_row(line: int, fields: dict[str, Any]) -> PreferenceRow:
    """The row of one line: a prompt, which is a string or messages, or messages; other fields are left alone.

    Raises:
        TypeError, ValueError: there is no prompt; the message says why.
    """
    if isinstance(fields.get("prompt"), str):
        prompt = Prompt(text=text_of(fields, "prompt"))
    else:
        name = "prompt" if "prompt" in fields else "messages"
        if name not in fields:
            raise ValueError(f"the fields are {', '.join(sorted(fields)) or 'none'}; a line has prompt or messages")
        prompt = Prompt(messages=messages_of(fields, name))
    return PreferenceRow(line, prompt, (), (), line)


def read_prompts(source: Source, validation: Source | None, holdout: float) -> Parts:
    """The prompts to learn from and those to evaluate on: `validation` or, without it, the share `holdout` of all.

    Raises:
        DataError, DataSourceError: some cannot be used, or there is none.
    """
    held_out = (read_rows(validation, prompt_row), validation) if validation else None
    return Parts.of(read_rows(source, prompt_row), source, held_out, holdout)


def in_tokens(
    rows: list[PreferenceRow], source: Source, tokenizer: Any, max_length: int, max_tokens: int
) -> list[TokenisedRow]:
    """The prompts in tokens; each leaves room for a completion.

    Raises:
        DataError: some do not.
    """
    prompts = tokenise(rows, tokenizer, max_length, source)
    errors: list[tuple[int, str]] = []
    for one in prompts:
        length = len(one.prompt_ids)
        if not length:
            errors.append((one.row.line, "the prompt is empty; say at least one word"))
        elif length + max_tokens > max_length:
            told = f"the prompt is {length} tokens, and with {max_tokens} more it does not fit the {max_length} read"
            errors.append((one.row.line, f"{told}; lower --max-tokens, or leave the line out"))
    if errors:
        raise DataError(source, errors)
    return prompts


def of_step(prompts: list[TokenisedRow], step: int, count: int, seed: int) -> list[TokenisedRow]:
    """The prompts of a step from 0 on; each pass through all of them is in an order of its own."""

    def endless(begin: int) -> Iterator[TokenisedRow]:
        number, place = divmod(begin, len(prompts))
        while True:
            order = random.Random(f"{seed} order {number}").sample(range(len(prompts)), len(prompts))
            yield from (prompts[at] for at in order[place:])
            number, place = number + 1, 0

    taken = endless(step * count)
    return [next(taken) for _ in range(count)]


def seeds_of_step(step: str, count: int, seed: int) -> list[int]:
    """A seed for each prompt of a step, which is called that; those of its candidates follow it."""
    rng = random.Random(f"{seed} seeds {step}")
    return [rng.randrange(SEEDS) for _ in range(count)]
