"""Demonstrations, which are what a policy is to say, in TRL's columns for supervised fine-tuning.

Each line of a JSONL file, or row of a table (see `training.data.data_source`), is one of

    {"prompt", "completion", "finish_reason"?}
        `prompt` is a string or messages, and so is `completion`: a string, or one message of the assistant. A finish
        reason `length` tells that the completion does not end where it stops, so that the end is not learnt.
    {"messages"}
        a conversation; its last message, the assistant's, is what is learnt.
    {"text"}
        a text that is learnt whole.

Other columns are not read, and an empty cell of a table is a column left out.
"""

from typing import Any

from reranker.candidate import Prompt
from training.data.preferences import CUT, PreferenceRow, messages_of, text_of


def demonstration(line: int, fields: dict[str, Any]) -> PreferenceRow:
    """The row of one line; its one text is what is learnt.

    Raises:
        TypeError, ValueError: the fields make no demonstration; the message says why.
    """
    prompt, text = _prompt_and_text(fields)
    return PreferenceRow(
        line, prompt, (text,), (0.0,), line, cut=frozenset({0} if fields.get("finish_reason") == CUT else ())
    )


def _prompt_and_text(fields: dict[str, Any]) -> tuple[Prompt, str]:
    if {"prompt", "completion"} <= fields.keys():
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(completion, str):
            asked = Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=messages_of(fields, "prompt"))
            return asked, completion
        (*before, said) = messages_of(fields, "completion")
        if before or said.role != "assistant":
            raise ValueError("completion is neither a string nor one message of the role assistant")
        if isinstance(prompt, str):
            raise ValueError("completion is a message, so prompt is messages too")
        return Prompt(messages=messages_of(fields, "prompt")), said.content
    if "messages" in fields:
        *asked_before, said = messages_of(fields, "messages")
        if not asked_before or said.role != "assistant":
            raise ValueError("messages end with what the assistant says, after at least one other message")
        return Prompt(messages=tuple(asked_before)), said.content
    if "text" in fields:
        return Prompt(text=""), text_of(fields, "text")
    raise ValueError(
        f"the fields are {', '.join(sorted(fields)) or 'none'}; a line has prompt and completion, or messages, or text"
    )
