"""Encodes a prompt into the token ids that the policy continues; serving and training use the same function."""

from typing import Any

from reranker.candidate import Prompt
from server.errors import BadRequestError


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt's token ids; a conversation passes through the model's own chat template.

    Raises:
        BadRequestError: there is no chat template, or it refuses the conversation.
    """
    if prompt.text is not None:
        return list(tokenizer(prompt.text)["input_ids"])
    conversation = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is a program that may raise anything
        raise BadRequestError(f"The chat template refuses this conversation: {error}", param="messages") from error
    return list(encoded["input_ids"])
