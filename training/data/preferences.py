"""Reads preferences, pairs and ratings alike, into rows of comparable texts.

Each line of a JSONL file, or row of a table (see `training.data.data_source`), is one of

    {"prompt"?, "chosen", "rejected", "margin"?, "chosen_finish_reason"?, "rejected_finish_reason"?}
        two answers, of which `chosen` is better, in TRL's columns. `prompt` is a string or messages; `chosen` and
        `rejected` are strings or messages. Without a `prompt`, the prompt is the messages before the last, the same in
        both. `margin` is the reward difference by which the better answer should win. With the finish reason `length`
        an answer was cut by its length.
    {"prompt", "chosen": [...], "rejected": [...], "subset"?}
        right and wrong answers to a user's message, as strings: RewardBench 2's columns. Each right answer is compared
        with each wrong answer.
    {"text", "rating"}
        one text and its rating, a number. Any two rated texts may be compared.

Other columns are ignored, and an empty cell of a table counts as a missing column.
All become `Example`s: texts, their ratings, and a group within which texts may be compared. A pair is a group of its
own with an infinite gap; all rated texts are one group. Every row is checked before any is used.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from reranker.candidate import Message, Prompt
from reranker.fsio import share_of
from reranker.models.rendering import Rendered, Renderer, RenderingError
from training.data.data_source import Source, read_records

RATED_GROUP = -1
"""The group of all rated texts; a pair's group is the number of its line."""

CUT = "length"
"""The finish reason of a text that was cut at the token limit."""

GAP_ROUNDING = 1e-6
"""Tolerance for gaps of decimal ratings, which can be slightly smaller in binary: 2.3 - 1.3 < 1."""

MAX_ERRORS_SHOWN = 10


class DataError(ValueError):
    """Lines or rows of a source that cannot be used, each with its number and the reason."""

    def __init__(self, source: Source, errors: list[tuple[int, str]]) -> None:
        lines = [f"{source}:{line}: {reason}" for line, reason in errors[:MAX_ERRORS_SHOWN]]
        if len(errors) > len(lines):
            lines.append(f"and {len(errors) - len(lines)} more rows")
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One line: answers to one prompt, with their ratings. Texts of rows with the same `group` may be compared.

    `cut` holds the indexes of the texts that were cut by their length. The repr of all rows identifies the data of a
    run, so a renamed field makes earlier runs impossible to resume.
    """

    line: int
    prompt: Prompt
    texts: tuple[str, ...]
    ratings: tuple[float, ...]
    group: int
    margin: float = 0.0
    subset: str = ""
    cut: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Example:
    """A row in the tokens that the reward model reads."""

    rendered: tuple[Rendered, ...]
    ratings: tuple[float, ...]
    group: int
    margin: float = 0.0


def read_rows(
    source: Source, row_of: Callable[[int, dict[str, Any]], PreferenceRow] | None = None
) -> list[PreferenceRow]:
    """All rows of a source: preferences or, with `row_of(number, fields)`, what that makes of each row.

    Raises:
        DataError: rows that cannot be used, or a source without rows.
        training.data.data_source.DataSourceError: there is no such source.
        OSError: the file cannot be read.
    """
    rows: list[PreferenceRow] = []
    errors: list[tuple[int, str]] = []
    for number, content in read_records(source):
        try:
            rows.append((row_of or _preference)(number, _fields(content)))
        except (ValueError, TypeError) as error:
            errors.append((number, str(error)))
    if not rows and not errors:
        errors.append((1, "the source holds no rows"))
    if errors:
        raise DataError(source, errors)
    return rows


def render_rows(rows: list[PreferenceRow], renderer: Renderer, source: Source) -> list[Example]:
    """The rows in tokens; `source` is named in errors.

    Raises:
        DataError: texts that do not fit the model.
    """
    examples: list[Example] = []
    errors: list[tuple[int, str]] = []
    for row in rows:
        try:
            rendered = tuple(renderer.render(row.prompt, text) for text in row.texts)
        except RenderingError as error:
            errors.append((row.line, str(error)))
        else:
            examples.append(Example(rendered, row.ratings, row.group, row.margin))
    if errors:
        raise DataError(source, errors)
    return examples


def hold_out(rows: list[PreferenceRow], fraction: float) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """(rows to train on, rows to validate on); the second are about `fraction` of all.

    The hash of the prompt decides, or of the texts where there is no prompt. So all answers to a prompt are in the same
    part, and a file is always split in the same way.
    """
    train: list[PreferenceRow] = []
    held_out: list[PreferenceRow] = []
    for row in rows:
        identity = repr(row.prompt) if row.prompt != Prompt(text="") else "\n".join(row.texts)
        (held_out if share_of(identity) < fraction else train).append(row)
    return train, held_out


def has_comparison(rows: list[PreferenceRow], min_gap: float) -> bool:
    """Whether the ratings of any two texts of one group differ, and by `min_gap` or more."""
    ratings_by_group: dict[int, list[float]] = {}
    for row in rows:
        ratings_by_group.setdefault(row.group, []).extend(row.ratings)
    gaps = (max(ratings) - min(ratings) for ratings in ratings_by_group.values())
    return any(gap > 0 and gap >= min_gap - GAP_ROUNDING for gap in gaps)


def ordered_pairs(ratings_N: torch.Tensor, groups_N: torch.Tensor, min_gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(better_K, worse_K): indexes of every two texts of one group whose ratings are `min_gap` or more apart.

    Equal ratings make no comparison, whatever the gap. The texts are sorted by group, and each is compared with the
    texts 1, 2, ... positions after it, up to the size of the largest group. So memory grows with the number of texts
    and of comparisons, not with the square of the number of texts.
    """
    groups_N, by_group_N = groups_N.sort(stable=True)
    largest = int(torch.unique_consecutive(groups_N, return_counts=True)[1].max()) if len(groups_N) else 0
    comparisons = [torch.empty(2, 0, dtype=torch.long)]
    for distance in range(1, largest):
        left_K, right_K = by_group_N[:-distance], by_group_N[distance:]
        gaps_K = ratings_N[left_K] - ratings_N[right_K]
        comparable_K = (
            (groups_N[:-distance] == groups_N[distance:]) & (gaps_K.abs() >= min_gap - GAP_ROUNDING) & (gaps_K != 0)
        )
        pairs_2_K = torch.where(gaps_K > 0, torch.stack([left_K, right_K]), torch.stack([right_K, left_K]))
        comparisons.append(pairs_2_K[:, comparable_K])
    better_K, worse_K = torch.cat(comparisons, dim=1)
    order_K = (better_K * len(ratings_N) + worse_K).argsort()
    return better_K[order_K], worse_K[order_K]


def _fields(content: Any) -> dict[str, Any]:
    fields = json.loads(content) if isinstance(content, str) else content
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _preference(line: int, fields: dict[str, Any]) -> PreferenceRow:
    keys = set(fields)
    if {"chosen", "rejected"} <= keys:
        if _are_texts(fields["chosen"]):
            return _best_of_n_row(line, fields)
        prompt, chosen, rejected = _pair(fields)
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same")
        margin = _number(fields, "margin") if "margin" in fields else 0.0
        reasons = (fields.get("chosen_finish_reason"), fields.get("rejected_finish_reason"))
        cut = frozenset(index for index, reason in enumerate(reasons) if reason == CUT)
        return PreferenceRow(line, prompt, (chosen, rejected), (math.inf, 0.0), line, margin, cut=cut)
    if {"text", "rating"} <= keys and "prompt" not in keys:  # a rated text has no prompt; one would be lost
        return PreferenceRow(
            line, Prompt(text=""), (text_of(fields, "text"),), (_number(fields, "rating"),), RATED_GROUP
        )
    raise ValueError(
        f"the fields are {', '.join(sorted(keys)) or 'none'}; a line has prompt (optional), chosen, rejected and "
        "margin (optional), or text and rating"
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _best_of_n_row(line: int, fields: dict[str, Any]) -> PreferenceRow:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if not _are_texts(rejected):
        raise TypeError("chosen is a list of strings, so rejected has to be one too, with at least one string")
    if both := set(chosen) & set(rejected):
        raise ValueError(f"chosen and rejected both hold {min(both)!r}")
    prompt = fields.get("prompt")
    messages = (Message("user", prompt),) if isinstance(prompt, str) else messages_of({"prompt": prompt}, "prompt")
    ratings = (math.inf,) * len(chosen) + (0.0,) * len(rejected)
    return PreferenceRow(
        line, Prompt(messages=messages), (*chosen, *rejected), ratings, line, subset=str(fields.get("subset", ""))
    )


def _pair(fields: dict[str, Any]) -> tuple[Prompt, str, str]:
    if isinstance(fields["chosen"], str):
        prompt = fields.get("prompt", "")
        return (
            Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=messages_of(fields, "prompt")),
            text_of(fields, "chosen"),
            text_of(fields, "rejected"),
        )
    *conversation, chosen = messages_of(fields, "chosen")
    *other_conversation, rejected = messages_of(fields, "rejected")
    if conversation != other_conversation:
        raise ValueError("chosen and rejected differ before their last message, so they answer different prompts")
    if chosen.role != "assistant" or rejected.role != "assistant":
        raise ValueError("the last message of chosen and of rejected has to have the role assistant")
    prompt = fields.get("prompt", [])
    if isinstance(prompt, str):
        conversation = [Message("user", prompt), *conversation]
    elif prompt:
        conversation = [*messages_of(fields, "prompt"), *conversation]
    if not conversation:
        raise ValueError("there is no prompt, neither as prompt nor before the last message")
    return Prompt(messages=tuple(conversation)), chosen.content, rejected.content


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} is not a finite number")
    return float(value)


def text_of(fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields[name], str):
        raise TypeError(f"{name} is not a string")
    return str(fields[name])


def messages_of(fields: dict[str, Any], name: str) -> tuple[Message, ...]:
    return tuple(_each_message(fields[name], name))


def _each_message(turns: Any, name: str) -> Iterator[Message]:
    if not isinstance(turns, list) or not turns:
        raise TypeError(f"{name} is neither a string nor a list of messages")
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise TypeError(f"a message of {name} lacks role or content, both strings")
        yield Message(turn["role"], turn["content"])
