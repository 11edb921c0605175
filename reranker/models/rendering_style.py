"""The forms in which a reward model reads a prompt and a candidate.

    chat         the tokenizer's chat template over the conversation, with the candidate as the assistant's turn;
                 for a text prompt, which has no turns, the prompt followed by the candidate
    pair         the prompt and the candidate as a text pair, as encoders are trained on question and answer:
                 [CLS] prompt [SEP] candidate [SEP], with segment ids where the model reads them
    transcript   the conversation as plain text, a turn as `role: content`, followed by EOS;
                 for a text prompt, the prompt followed by the candidate and EOS
    document     the finished text as a reader would see it, followed by EOS: a text prompt and its continuation,
                 or a chat reply without the conversation

Only `document` leaves a conversation out, so it is never guessed.
"""

from typing import Literal, get_args

RenderingStyle = Literal["chat", "pair", "transcript", "document"]
STYLES: tuple[RenderingStyle, ...] = get_args(RenderingStyle)
