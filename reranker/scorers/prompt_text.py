"""A prompt as one string, for scorers that read text: verifier functions, judges, servers whose template is unknown.

A text prompt is itself. A conversation of one message is that message's content, which is what most questions are.
Any other conversation is its turns, each `role: content`, a blank line between them.
"""

from reranker.candidate import Prompt


def prompt_text(prompt: Prompt) -> str:
    """The prompt by the rule above."""
    if prompt.text is not None:
        return prompt.text
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def finished_text(prompt: Prompt, candidate: str) -> str:
    """Prompt and candidate: a text goes on, a conversation gets the candidate as the assistant's turn."""
    if prompt.text is not None:
        return prompt.text + candidate
    turns = [f"{message.role}: {message.content}" for message in prompt.messages]
    return "\n\n".join([*turns, f"assistant: {candidate}"])
