"""A prompt as one string, for scorers that read text: functions, judges, encoders, models without a chat template.

A text prompt is unchanged. A conversation of one message, the most common case, becomes the content of that message.
Any other conversation becomes its turns, each written `role: content`, with a blank line between them.
"""

from reranker.candidate import Prompt


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one string, by the rules of the module header."""
    if prompt.text is not None:
        return prompt.text
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def finished_text(prompt: Prompt, candidate: str) -> str:
    """Prompt and candidate as one string: a text is continued, a conversation gets an assistant turn."""
    if prompt.text is not None:
        return prompt.text + candidate
    turns = [f"{message.role}: {message.content}" for message in prompt.messages]
    return "\n\n".join([*turns, f"assistant: {candidate}"])
