"""A prompt and a candidate become token ids, and one of them is the scored token: the ONE renderer.

Reward training, reward serving and PPO all come through here, so a reward model reads in production exactly what it
read in training.

What is written depends on the style:

    chat       the tokenizer's chat template over the conversation with the candidate as the assistant's turn;
               a text prompt has no turns: prompt and candidate, one after the other
    document   the finished text a reader would see, closed by EOS: a text prompt and its continuation,
               or a chat reply on its own

How it becomes tokens:

1. The prompt part (everything before the candidate's first character) and the rest are tokenised apart and
   concatenated. No token ever straddles the border, so the prompt's tokens are the same for all N candidates and can
   be computed once; it is also what a policy does, whose prompt is tokens before the first candidate token is drawn.
2. What the tokenizer itself puts round a text (BOS, or [CLS] and [SEP]) goes round the whole exactly once, also where
   the template wrote it too.
3. Too long: tokens of the prompt go, the oldest first, those of (2) stay. The candidate is never cut.
4. The scored token is the last one under the attention mask. "The rightmost token that is not padding" would be wrong
   wherever pad equals EOS, as it does in most chat models.
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
    """A prompt and candidate that cannot be put into tokens. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens to be scored at the last one.

    The first `prompt_length` of them do not depend on the candidate, unless the prompt had to be cut to make room:
    `cut_tokens` of it are left out then. `is_beginning`: more is to come, so what is computed for it is worth keeping.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    cut_tokens: int = 0
    is_beginning: bool = False

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What can be computed for all candidates at once: the prompt, but never the token to be scored."""
        return self.token_ids[: min(self.prompt_length, len(self.token_ids) - 1)]


class Renderer:
    """Writes (prompt, candidate) for one reward model; not for two threads at once, as tokenizers are not.

    `max_length` is in tokens and covers everything: prompt, candidate, and what the tokenizer puts round them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: RenderingStyle, max_length: int) -> None:
        if style not in get_args(RenderingStyle):
            raise ValueError(f"no rendering style {style!r}; there are {', '.join(get_args(RenderingStyle))}")
        self.tokenizer = tokenizer
        self.style = style
        self.max_length = max_length
        self._before, self._after = _surroundings(tokenizer)
        if style == "document" and not self._after:
            if tokenizer.eos_token_id is None:
                raise ValueError("the document style ends a text with EOS, and this tokenizer has no EOS token")
            self._after = (int(tokenizer.eos_token_id),)
        self._open_once = lru_cache(maxsize=64)(self._open)  # N candidates follow one prompt

    def render(self, prompt: Prompt, candidate: str) -> Rendered:
        """The tokens of one candidate.

        Raises:
            RenderingError: it leaves no token to score, does not fit, or the tokenizer has no chat template for it.
        """
        opening, prompt_ids = self._open_once(prompt)
        text = candidate
        if opening is not None:
            text = self._chat(prompt, candidate)
            if text.startswith(opening):
                text = text[len(opening) :]
            else:  # a template that tells reasoning from answer may open this one reply in another way
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

    def _open(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """(what the chat template writes before any reply, None if none is used; the tokens of the prompt part)."""
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
            # What stands before two replies that begin differently stands before any. Not the template's generation
            # prompt: some open the reply they wait for otherwise than a reply they are given.
            both = zip(self._chat(prompt, "a"), self._chat(prompt, "b"), strict=False)
            opening = prompt_text = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], both))
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


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens this tokenizer puts (before, after) a text: (BOS,), (), or ([CLS],), ([SEP],), or neither."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(dressed[:start]), tuple(dressed[start + len(bare) :])
    raise ValueError("this tokenizer writes a text in other tokens when it adds its special tokens; it cannot be used")


def pad(batch: Sequence[Rendered], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids_N_T, attention_mask_N_T), padded on the right; the mask alone tells where a text ends."""
    width = max(len(rendered.token_ids) for rendered in batch)
    input_ids_N_T = torch.full((len(batch), width), pad_id, dtype=torch.long)
    attention_mask_N_T = torch.zeros_like(input_ids_N_T)
    for row, rendered in enumerate(batch):
        length = len(rendered.token_ids)
        input_ids_N_T[row, :length] = torch.tensor(rendered.token_ids)
        attention_mask_N_T[row, :length] = 1
    return input_ids_N_T, attention_mask_N_T


def scored_index(attention_mask_N_T: torch.Tensor) -> torch.Tensor:
    """Place of the last token under the mask, shape (N,); right or left padding."""
    places_T = torch.arange(attention_mask_N_T.shape[1], device=attention_mask_N_T.device)
    return (attention_mask_N_T * places_T).argmax(dim=1)
