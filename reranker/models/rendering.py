"""Renders a prompt and a candidate as token ids, the last of which is the scored token: the only renderer.

Reward training, reward serving and PPO all use it, so a reward model reads the same tokens in production as in
training.

The text depends on the style:

    chat       the tokenizer's chat template over the conversation, with the candidate as the assistant's turn;
               for a text prompt, which has no turns, the prompt followed by the candidate
    document   the finished text as a reader would see it, followed by EOS: a text prompt and its continuation,
               or a chat reply without the conversation

The text becomes tokens by these rules:

1. The prompt part (everything before the candidate's first character) and the rest are tokenised separately and
   concatenated. No token crosses the border, so the prompt's tokens are the same for all N candidates and are computed
   once. A policy works in the same way: its prompt is tokenised before the first candidate token is sampled.
2. The special tokens that the tokenizer adds around a text (BOS, or [CLS] and [SEP]) stand around the whole exactly
   once, even if the chat template wrote them too.
3. If the sequence is too long, prompt tokens are cut, the oldest first; the special tokens of rule 2 stay. The
   candidate is never cut.
4. The scored token is the last one under the attention mask. "The rightmost token that is not padding" would be wrong
   if pad equals EOS, as in most chat models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from reranker.candidate import Message, Prompt

RenderingStyle = Literal["chat", "document"]


class RenderingError(ValueError):
    """The prompt and candidate cannot be rendered. The message gives the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A token sequence that is scored at its last token.

    The first `prompt_length` tokens do not depend on the candidate, unless `cut_tokens` of the prompt were left out to
    make room for it. `is_beginning` marks a candidate that later candidates continue, so that caching its keys and
    values saves work.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    cut_tokens: int = 0
    is_beginning: bool = False

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that can be computed once for all candidates: the prompt, without the scored token."""
        return self.token_ids[: min(self.prompt_length, len(self.token_ids) - 1)]


class Renderer:
    """Renders (prompt, candidate) for one reward model; not thread-safe, because tokenizers are not.

    `max_length` is in tokens and includes the prompt, the candidate and the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: RenderingStyle, max_length: int) -> None:
        if style not in get_args(RenderingStyle):
            raise ValueError(
                f"there is no rendering style {style!r}; choose from {', '.join(get_args(RenderingStyle))}"
            )
        self.tokenizer = tokenizer
        self.style = style
        self.max_length = max_length
        self._before, self._after = _special_tokens(tokenizer)
        if style == "document" and not self._after:
            if tokenizer.eos_token_id is None:
                raise ValueError("the document style ends a text with EOS, and this tokenizer has no EOS token")
            self._after = (int(tokenizer.eos_token_id),)
        self._cached_opening = lru_cache(maxsize=64)(self._opening)  # N candidates share a prompt

    def render(self, prompt: Prompt, candidate: str) -> Rendered:
        """The tokens of one candidate.

        Raises:
            RenderingError: there is no token to score, the candidate does not fit, or the tokenizer has no chat
                template for a conversation.
        """
        opening, prompt_ids = self._cached_opening(prompt)
        text = candidate
        if opening is not None:
            text = self._chat(prompt, candidate)
            if text.startswith(opening):
                text = text[len(opening) :]
            else:  # a template that separates reasoning from the answer may open this reply differently
                prompt_ids = ()
        body_ids = self._tokenize(text)
        if body_ids[: len(self._before)] == self._before and not prompt_ids:
            body_ids = body_ids[len(self._before) :]
        if self._after and body_ids[-len(self._after) :] == self._after:
            body_ids = body_ids[: -len(self._after)]
        room = self.max_length - len(self._before) - len(body_ids) - len(self._after)
        if room < 0:
            raise RenderingError(
                f"the candidate alone is {len(body_ids)} tokens and the reward model reads {self.max_length}; "
                "ask for shorter answers (max_tokens) or serve a reward model with a longer context"
            )
        cut = max(0, len(prompt_ids) - room)
        kept_ids = self._before + prompt_ids[cut:]
        token_ids = kept_ids + body_ids + self._after
        if not token_ids:
            raise RenderingError("prompt and candidate are both empty, so there is no token to score")
        return Rendered(token_ids, prompt_length=len(kept_ids), cut_tokens=cut)

    def _opening(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """(the chat template's text before any reply, None if no template is used; the tokens of the prompt part).

        Raises:
            RenderingError: the tokenizer has no chat template for a conversation.
        """
        opening: str | None = None
        if not prompt.messages:
            prompt_text = prompt.text or ""
        elif self.style == "document":
            prompt_text = ""
        elif not self.tokenizer.chat_template:
            raise RenderingError(
                "this reward model's tokenizer has no chat template, so it cannot read a conversation in the chat "
                "style; use a reward model trained in the document style"
            )
        else:
            # The common start of the texts with two different replies precedes every reply. The template's generation
            # prompt would not do: some templates open a given reply differently from one to be generated.
            pairs = zip(self._chat(prompt, "a"), self._chat(prompt, "b"), strict=False)
            opening = prompt_text = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt_ids = self._tokenize(prompt_text)
        if prompt_ids[: len(self._before)] == self._before:
            prompt_ids = prompt_ids[len(self._before) :]
        return opening, prompt_ids

    def _chat(self, prompt: Prompt, reply: str) -> str:
        turns = [*prompt.messages, Message("assistant", reply)]
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        except Exception as error:
            raise RenderingError(f"the reward model's chat template refused the conversation: {error}") from error

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer adds (before, after) a text, such as (BOS,), () or ([CLS],), ([SEP],).

    Raises:
        ValueError: the text itself has other tokens when the special tokens are added.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    complete = list(tokenizer("a")["input_ids"])
    for start in range(len(complete) - len(plain) + 1):
        if complete[start : start + len(plain)] == plain:
            return tuple(complete[:start]), tuple(complete[start + len(plain) :])
    raise ValueError("this tokenizer changes a text's own tokens when it adds its special tokens; it cannot be used")


def pad(batch: Sequence[Rendered], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids_N_T, attention_mask_N_T), padded on the right; only the mask shows where a text ends."""
    width = max(len(rendered.token_ids) for rendered in batch)
    input_ids_N_T = torch.full((len(batch), width), pad_id, dtype=torch.long)
    attention_mask_N_T = torch.zeros_like(input_ids_N_T)
    for row, rendered in enumerate(batch):
        length = len(rendered.token_ids)
        input_ids_N_T[row, :length] = torch.tensor(rendered.token_ids)
        attention_mask_N_T[row, :length] = 1
    return input_ids_N_T, attention_mask_N_T


def scored_index(attention_mask_N_T: torch.Tensor) -> torch.Tensor:
    """Index of the last token under the mask, shape (N,); works for right and for left padding."""
    indices_T = torch.arange(attention_mask_N_T.shape[1], device=attention_mask_N_T.device)
    return (attention_mask_N_T * indices_T).argmax(dim=1)
