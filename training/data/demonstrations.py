"""Demonstrations: completions for a policy to learn, in TRL's columns for supervised fine-tuning.

Each line of a JSONL file, or row of a table (see `training.data.data_source`), is one of

    {"prompt", "completion", "finish_reason"?}
        `prompt` is a string or messages, and so is `completion`: a string, or one message of the assistant. With the
        finish reason `length` the completion was cut, so its end is not learnt.
    {"messages"}
        a conversation, whose last message, the assistant's, is learnt.
    {"text"}
        a text that is learnt whole.

Other columns are ignored, and an empty cell of a table counts as a missing column.
"""

from typing import Any

from reranker.candidate import Prompt
from training.data.preferences import CUT, PreferenceRow, messages_of, text_of


def demonstration(line: int, fields: dict[str, Any]) -> PreferenceRow:
    """The row of one line; its one text is the completion to learn.

    Raises:
        TypeError, ValueError: the fields are no demonstration; the message gives the reason.
    """
    prompt, text = _prompt_and_text(fields)
    return PreferenceRow(
        line, prompt, (text,), (0.0,), line, cut=frozenset({0} if fields.get("finish_reason") == CUT else ())
    )


def _prompt_and_text(fields: dict[str, Any]) -> tuple[Prompt, str]:
    if {"prompt", "completion"} <= fields.keys():
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(completion, str):
            if isinstance(prompt, str):
                return Prompt(text=prompt), completion
            return Prompt(messages=messages_of(fields, "prompt")), completion
        *earlier, answer = messages_of(fields, "completion")
        if earlier or answer.role != "assistant":
            raise ValueError("completion is neither a string nor a single message with the role assistant")
        if isinstance(prompt, str):
            raise ValueError("completion is a message, so prompt has to be messages too")
        return Prompt(messages=messages_of(fields, "prompt")), answer.content
    if "messages" in fields:
        *conversation, answer = messages_of(fields, "messages")
        if not conversation or answer.role != "assistant":
            raise ValueError("messages have to end with one of the role assistant, after at least one other message")
        return Prompt(messages=tuple(conversation)), answer.content
    if "text" in fields:
        return Prompt(text=""), text_of(fields, "text")
    raise ValueError(
        f"the fields are {', '.join(sorted(fields)) or 'none'}; a line has prompt and completion, or messages, or text"
    )
