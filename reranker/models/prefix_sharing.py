"""The prompt is computed once for its N candidates, and nothing is computed for padding.

A batch is one row of tokens in which every prompt is followed by the candidates that continue it:

    [prompt A][candidate][candidate][candidate][prompt B][candidate][candidate]

Everything in a decoder but attention treats each token by itself, so the row needs no more than the right position ids:
a candidate's begin where its prompt's end. Attention is the one place where the row is taken apart again. There each
prompt reads itself, and each candidate reads its prompt and itself (`attend_along_row`). transformers lets a model's
attention be replaced by name, and hands it whatever keyword the trunk was called with: that is how it learns the row.

The keys and values of a prompt are kept when its batch is done, because candidates are scored as they finish: the
next of them goes into a later batch, and then its prompt is not computed again. So are those of a candidate that is
scored before its end (`Rendered.is_beginning`): of what goes on from it only the rest is computed. The ones used
last are kept, up to `KEPT_TOKENS` (`reranker.models.prefix_cache`).

What is the same prompt is decided by its tokens (`Rendered.prefix_ids`) and nothing else. A prompt that was cut to make
room for a long candidate is another prompt, and shares with nobody.

Which models can: those whose attention can be replaced, and that then give the same states as before. That is tried
when they are loaded (`SharingTrunk.where_equal`), not looked up in a list. It holds for Llama, Qwen2, Qwen3, Mistral,
Gemma and their like. Encoders, recurrent layers and code from elsewhere fall back to padded batches.

The idea of splitting attention at the prompt is Hydragen's (Juravsky et al. 2024, arXiv 2402.05099). Its way of doing
so, all candidates over the prompt at once and the halves put together by their softmax sums, was slower here:
docs/decisions/0005.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from reranker.models.prefix_cache import PrefixCache, TokenIds
from reranker.models.rendering import Rendered

log = logging.getLogger("nbest")

KEPT_TOKENS = 8192
"""Tokens of prompts and beginnings whose keys and values are kept. SmolLM2 in float32 takes 45 KiB a token, and
Llama-3-8B in bfloat16 128 KiB: 1 GiB in all. Dozens of requests can be under way at once with prompts of ordinary
length."""

ATTENTION = "nbest_along_row"
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens as places in the row; `keep_at` is where their keys and values are to be kept, if they are."""

    place: slice
    keep_at: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt and the candidates that continue it.

    A prompt that was kept has its places among the kept ones instead, and so has one with the beginning of a candidate.
    """

    prompt: Segment | torch.Tensor
    candidates: list[Segment] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch as the trunk reads it.

    `scored_N` and `computed_tokens_N` are in the order of the batch: the place of a candidate's last token, and the
    tokens computed for it: its own, and its prompt's if it is the first to need them.
    """

    kept: PrefixCache
    input_ids_T: list[int] = field(default_factory=list)
    position_ids_T: list[int] = field(default_factory=list)
    groups: list[PromptGroup] = field(default_factory=list)
    scored_N: list[int] = field(default_factory=list)
    computed_tokens_N: list[int] = field(default_factory=list)
    masks: dict[tuple[int, int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def append(self, token_ids: Sequence[int], first_position: int) -> slice:
        """Puts tokens at the end and says where."""
        start, length = len(self.input_ids_T), len(token_ids)
        self.input_ids_T.extend(token_ids)
        self.position_ids_T.extend(range(first_position, first_position + length))
        return slice(start, start + length)


class SharingTrunk:
    """A decoder trunk that reads rows; not for two threads at once, as it keeps prompts and beginnings."""

    def __init__(self, trunk: Any, device: torch.device, kept_tokens: int = KEPT_TOKENS) -> None:
        self._trunk = trunk
        self._device = device
        self._kept = PrefixCache(kept_tokens, device)

    @classmethod
    def where_equal(cls, model: Any, device: torch.device) -> "SharingTrunk | None":
        """The trunk of a sequence classifier, reading rows from now on; None, and left as it was, if it cannot."""
        trunk = model.base_model
        if not (
            hasattr(model, "score")
            and getattr(trunk, "_supports_attention_backend", False)
            and trunk.config._attn_implementation == "sdpa"
            and set(getattr(trunk.config, "layer_types", None) or ()) <= SUPPORTED_LAYERS
        ):
            return None
        ids = [17 * place % trunk.get_input_embeddings().num_embeddings for place in range(1, 25)]
        pair = [Rendered((*ids[:9], *own), prompt_length=9) for own in (ids[9:16], ids[16:])]
        with torch.inference_mode():
            alone = [trunk(torch.tensor([one.token_ids], device=device), use_cache=False) for one in pair]
            alone_N_D = torch.stack([states.last_hidden_state[0, -1] for states in alone])
            model.set_attn_implementation(ATTENTION)
            try:
                shared_N_D, _ = cls(trunk, device, kept_tokens=0).scored_states(pair)
            except (
                TypeError,
                KeyError,
                AttributeError,
                RuntimeError,
            ) as error:  # it is not built to be called like this
                reason = str(error)
            else:
                difference = float((shared_N_D - alone_N_D).norm() / alone_N_D.norm())
                if difference <= torch.finfo(alone_N_D.dtype).eps ** 0.5:  # rounding and nothing more
                    return cls(trunk, device)
                reason = f"the states differ by {difference:.0%}"
        model.set_attn_implementation("sdpa")
        log.info("prompts are not shared between candidates of %s: %s", type(model).__name__, reason)
        return None

    def scored_states(self, batch_N: Sequence[Rendered]) -> tuple[torch.Tensor, list[int]]:
        """(states_N_D at the scored tokens, tokens computed for each candidate: see `PackedBatch`)."""
        added: list[TokenIds] = []
        try:
            row = self._lay_out(batch_N, added)
            states_T_D = self._trunk(
                input_ids=torch.tensor([row.input_ids_T], device=self._device),
                position_ids=torch.tensor([row.position_ids_T], device=self._device),
                use_cache=False,
                row=row,
            ).last_hidden_state[0]
        except BaseException:  # the new ones may be half written
            for token_ids in reversed(added):
                self._kept.forget(token_ids)
            raise
        return states_T_D[torch.tensor(row.scored_N, device=self._device)], row.computed_tokens_N

    def _lay_out(self, batch_N: Sequence[Rendered], added: list[TokenIds]) -> PackedBatch:
        """Groups by what is kept of the candidates, else by their prompts; `added` takes what is kept from now on."""
        row = PackedBatch(self._kept, scored_N=[0] * len(batch_N), computed_tokens_N=[0] * len(batch_N))
        prompts_N = [one.prefix_ids for one in batch_N]
        starts_N = [self._kept.longest(ids, one.token_ids) for ids, one in zip(prompts_N, batch_N, strict=True)]
        needed = {*prompts_N, *(start.token_ids for start in starts_N)}

        def keep(token_ids: TokenIds, **behind: Any) -> torch.Tensor | None:
            places_T = self._kept.add(token_ids, needed, **behind)
            if places_T is not None:
                added.append(token_ids)
                needed.add(token_ids)
            return places_T

        groups: dict[TokenIds, PromptGroup] = {}
        for index, (rendered, prompt_ids, start) in enumerate(zip(batch_N, prompts_N, starts_N, strict=True)):
            start_ids, own_ids = rendered.token_ids[: start.length], rendered.token_ids[start.length :]
            if start_ids not in groups:
                prompt: Segment | torch.Tensor | None = start.places_T
                if prompt is None:
                    prompt = Segment(row.append(start_ids, first_position=0), keep(start_ids))
                    row.computed_tokens_N[index] = start.length
                groups[start_ids] = PromptGroup(prompt)
                row.groups.append(groups[start_ids])
            keep_at = None
            if rendered.is_beginning and start.token_ids in self._kept:
                keep_at = keep(rendered.token_ids, prompt_ids=prompt_ids, after=start)
            place = row.append(own_ids, first_position=start.length)
            groups[start_ids].candidates.append(Segment(place, keep_at))
            row.scored_N[index] = place.stop - 1
            row.computed_tokens_N[index] += len(own_ids)
        return row


def attend_along_row(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _no_mask: None,
    *,
    row: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a row, in place of transformers' own and with its signature.

    `query` is (1, heads, T, D), `key` and `value` (1, KV heads, T, D); returns (1, T, heads, D). The queries that share
    a KV head are told apart by a dimension of their own, along which the keys are a view: nothing is repeated. The
    candidates of a prompt take turns in one buffer behind its keys, which are so copied once a layer and not N times.
    """
    query = query[0].view(key.shape[1], -1, *query.shape[2:])
    key, value = key[0, :, None], value[0, :, None]
    attended = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype, device=value.device)

    def attend(place: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        queries = query[:, :, place]
        shape = (queries.shape[2], keys.shape[2], sliding_window)
        if shape not in row.masks:
            row.masks[shape] = _mask(*shape, query.dtype, query.device)
        mask = row.masks[shape]
        attended[:, :, place] = F.scaled_dot_product_attention(
            queries,
            keys.expand(-1, queries.shape[1], -1, -1),
            values.expand(-1, queries.shape[1], -1, -1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )

    for group in row.groups:
        keys, values = _of_prompt(group.prompt, row.kept, module.layer_idx, key, value)
        length, longest = keys.shape[2], max(one.place.stop - one.place.start for one in group.candidates)
        if isinstance(group.prompt, Segment) and length:
            attend(group.prompt.place, keys, values)
        keys, values = F.pad(keys, (0, 0, 0, longest)), F.pad(values, (0, 0, 0, longest))
        for one in group.candidates:
            end = length + one.place.stop - one.place.start
            own = _of_segment(one, row.kept, module.layer_idx, key, value)
            keys[:, :, length:end], values[:, :, length:end] = own
            attend(one.place, keys[:, :, :end], values[:, :, :end])
    return attended.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def _of_prompt(
    prompt: Segment | torch.Tensor, kept: PrefixCache, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a group's prompt, each (KV heads, 1, tokens, D), from the row or from among the kept."""
    if isinstance(prompt, Segment):
        return _of_segment(prompt, kept, layer, key, value)
    keys, values = kept.read(layer, prompt)
    return keys[:, None], values[:, None]


def _of_segment(
    segment: Segment, kept: PrefixCache, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of tokens of the row; kept, if they are to be."""
    keys, values = key[:, :, segment.place], value[:, :, segment.place]
    if segment.keep_at is not None:
        kept.write(layer, segment.keep_at, keys[:, 0], values[:, 0])
    return keys, values


def _mask(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """What is added to the scores when the queries are the last of the keys; None: all queries, causal, no window."""
    if num_queries == num_keys and (window is None or num_keys <= window):
        return None
    distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(ATTENTION, attend_along_row)
