"""Renders a prompt and a candidate as token ids, the last of which is the scored token: the only renderer.

Reward training, reward serving and PPO all use it, so a reward model reads the same tokens in production as in
training.

The text depends on the style (`reranker.models.rendering_style`), which `style_of` decides: as the user or the model's
`reward_config.json` says, else the chat template if there is one, else by a guess that is logged.

The text becomes tokens by these rules:

1. The prompt part (everything before the candidate's first character) and the rest are tokenised separately and
   concatenated. No token crosses the border, so the prompt's tokens are the same for all N candidates and are computed
   once. A policy works in the same way: its prompt is tokenised before the first candidate token is sampled.
2. The special tokens that the tokenizer adds around a text (BOS, or [CLS] and [SEP]), and between the texts of a pair,
   stand there exactly once, even if the chat template wrote them too.
3. If the sequence is too long, prompt tokens are cut, the oldest first; the special tokens of rule 2 stay. The
   candidate is never cut.
4. The scored token is the last one under the attention mask. "The rightmost token that is not padding" would be wrong
   if pad equals EOS, as in most chat models.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedTokenizerBase

from reranker.candidate import Message, Prompt
from reranker.models.rendering_style import STYLES, RenderingStyle
from reranker.prompt_text import finished_text, prompt_text

log = logging.getLogger("nbest")


class RenderingError(ValueError):
    """The prompt and candidate cannot be rendered. The message is a clause with the reason."""


class TooLongError(RenderingError):
    """The candidate alone has more tokens than the model reads."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A token sequence that is scored at its last token.

    The first `prompt_length` tokens do not depend on the candidate, unless `cut_tokens` of the prompt were left out to
    make room for it. `is_beginning` marks a candidate that later candidates continue, so that caching its keys and
    values saves work. `segment_ids` tell the texts of a pair apart (token type ids); empty if the model reads none.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    cut_tokens: int = 0
    is_beginning: bool = False
    segment_ids: tuple[int, ...] = ()

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens that can be computed once for all candidates: the prompt, without the scored token."""
        return self.token_ids[: min(self.prompt_length, len(self.token_ids) - 1)]


def style_of(tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> RenderingStyle:
    """The style of a reward model for which neither the user nor its `reward_config.json` says one.

    A chat template says it. Without one it can only be guessed, and a warning is logged: encoders are usually trained
    on pairs, and a decoder gets the whole conversation as plain text. `config` is the model's configuration.
    """
    if tokenizer.chat_template:
        return "chat"
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    style: RenderingStyle = "pair" if is_encoder else "transcript"
    log.warning(
        "%s has no chat template, so nbest guesses that it reads prompts in the style %s. Give its style in the SPEC "
        "(style:STYLE:MODEL) or in its reward_config.json; the styles are %s.",
        name,
        style,
        ", ".join(STYLES),
    )
    return style


def reads_segments(config: Any) -> bool:
    """Whether a model of this configuration has embeddings for the segments of a pair."""
    return getattr(config, "type_vocab_size", 0) > 1


class Renderer:
    """Renders (prompt, candidate) for one reward model; not thread-safe, because tokenizers are not.

    `max_length` is in tokens and includes the prompt, the candidate and the tokenizer's special tokens. With `segments`
    the tokens of a pair have segment ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, style: RenderingStyle, max_length: int, *, segments: bool = False
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"there is no rendering style {style!r}; choose from {', '.join(STYLES)}")
        self.tokenizer = tokenizer
        self.style = style
        self.max_length = max_length
        self._frame = _pair_frame(tokenizer) if style == "pair" else _frame(tokenizer)
        self._segments = segments and style == "pair"
        if style in ("transcript", "document") and not self._frame.after:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the style {style} ends a text with EOS, and this tokenizer has no EOS token")
            self._frame = replace(self._frame, after=(int(tokenizer.eos_token_id),))
        self._cached_opening = lru_cache(maxsize=64)(self._opening)  # N candidates share a prompt

    def check(self, prompt: Prompt) -> None:
        """Returns if a short candidate of this prompt could be rendered.

        Raises:
            RenderingError: no candidate can be.
        """
        self.render(prompt, "a")

    def render(self, prompt: Prompt, candidate: str) -> Rendered:
        """The tokens of one candidate.

        Raises:
            RenderingError: there is no token to score, a text is not valid Unicode, or the tokenizer has no chat
                template for a conversation, or one that refuses it.
            TooLongError: the candidate does not fit.
        """
        before, between, after = self._frame.before, self._frame.between, self._frame.after
        opening, prompt_ids = self._cached_opening(prompt)
        text = candidate
        if opening is not None:
            text = self._whole(prompt, candidate)
            if text.startswith(opening):
                text = text[len(opening) :]
            else:  # a template that separates reasoning from the answer may open this reply differently
                prompt_ids = ()
        body_ids = self._tokenize(text)
        if body_ids[: len(before)] == before and not prompt_ids:
            body_ids = body_ids[len(before) :]
        if after and body_ids[-len(after) :] == after:
            body_ids = body_ids[: -len(after)]
        room = self.max_length - len(before) - len(between) - len(body_ids) - len(after)
        if room < 0:
            raise TooLongError(
                f"the candidate alone is {len(body_ids)} tokens and the reward model reads {self.max_length}"
            )
        cut = max(0, len(prompt_ids) - room)
        kept_ids = before + prompt_ids[cut:] + between
        token_ids = kept_ids + body_ids + after
        if not token_ids:
            raise RenderingError("prompt and candidate are both empty, so there is no token to score")
        segment_ids: tuple[int, ...] = ()
        if self._segments:
            segment_ids = (0,) * len(kept_ids) + (self._frame.second_segment,) * (len(token_ids) - len(kept_ids))
        return Rendered(token_ids, prompt_length=len(kept_ids), cut_tokens=cut, segment_ids=segment_ids)

    def _opening(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """(the text of a conversation before any reply, None if replies follow no such text; the prompt's tokens).

        Raises:
            RenderingError: the tokenizer has no chat template for a conversation, or one that refuses it.
        """
        opening: str | None = None
        if self.style == "pair":
            text = prompt_text(prompt)
        elif not prompt.messages:
            text = prompt.text or ""
        elif self.style == "document":
            text = ""
        else:
            # The common start of the texts with two different replies precedes every reply. The template's generation
            # prompt would not do: some templates open a given reply differently from one to be generated.
            pairs = zip(self._whole(prompt, "a"), self._whole(prompt, "b"), strict=False)
            opening = text = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt_ids = self._tokenize(text)
        before = self._frame.before
        if prompt_ids[: len(before)] == before:
            prompt_ids = prompt_ids[len(before) :]
        return opening, prompt_ids

    def _whole(self, prompt: Prompt, reply: str) -> str:
        """The text of a conversation with its reply."""
        if self.style == "transcript":
            return finished_text(prompt, reply)
        if not self.tokenizer.chat_template:
            raise RenderingError(
                "the reward model's tokenizer has no chat template, so it cannot read a conversation in the style "
                "chat; choose the style transcript, pair or document"
            )
        turns = [*prompt.messages, Message("assistant", reply)]
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        except Exception as error:
            raise RenderingError(f"the reward model's chat template refused the conversation: {error}") from error

    def _tokenize(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        try:
            # Not verbose: the tokenizer would warn of texts over the context, which are cut or refused here.
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except TypeError as error:
            raise RenderingError("a text is not valid Unicode: it contains a lone surrogate") from error


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens that a tokenizer adds around a text or around and between the texts of a pair.

    (BOS,), (), () for example, or ([CLS],), ([SEP],), ([SEP],). `second_segment` is the segment id of the second text.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second_segment: int = 0


def _frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """The special tokens around a single text.

    Raises:
        ValueError: the text itself has other tokens when the special tokens are added.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    complete = list(tokenizer("a")["input_ids"])
    start = _index(complete, plain)
    return _Frame(tuple(complete[:start]), (), tuple(complete[start + len(plain) :]))


def _pair_frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """The special tokens around and between the texts of a pair; raises as `_frame`."""
    first, second = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", "b"))
    encoded = tokenizer("a", "b", return_token_type_ids=True)
    complete = list(encoded["input_ids"])
    start = _index(complete, first)
    middle = _index(complete, second, start + len(first))
    return _Frame(
        before=tuple(complete[:start]),
        between=tuple(complete[start + len(first) : middle]),
        after=tuple(complete[middle + len(second) :]),
        second_segment=encoded["token_type_ids"][middle],
    )


def _index(token_ids: list[int], part: list[int], start: int = 0) -> int:
    """The index from `start` on at which the part is in the tokens."""
    for index in range(start, len(token_ids) - len(part) + 1):
        if token_ids[index : index + len(part)] == part:
            return index
    raise ValueError("this tokenizer changes a text's own tokens when it adds its special tokens; it cannot be used")


def pad(batch: Sequence[Rendered], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids_N_T, attention_mask_N_T), padded on the right; only the mask shows where a text ends."""
    input_ids_N_T = _padded([rendered.token_ids for rendered in batch], pad_id)
    return input_ids_N_T, _padded([(1,) * len(rendered.token_ids) for rendered in batch], 0)


def pad_segments(batch: Sequence[Rendered]) -> torch.Tensor | None:
    """segment_ids_N_T, padded as by `pad`; None if the model reads none."""
    if not batch[0].segment_ids:
        return None
    return _padded([rendered.segment_ids for rendered in batch], 0)


def _padded(rows_N: Sequence[tuple[int, ...]], fill: int) -> torch.Tensor:
    width = max(map(len, rows_N))
    return torch.tensor([row + (fill,) * (width - len(row)) for row in rows_N])


def scored_index(attention_mask_N_T: torch.Tensor) -> torch.Tensor:
    """Index of the last token under the mask, shape (N,); works for right and for left padding."""
    indices_T = torch.arange(attention_mask_N_T.shape[1], device=attention_mask_N_T.device)
    return (attention_mask_N_T * indices_T).argmax(dim=1)
