"""Computes a prompt once for its N candidates, and computes nothing for padding.

A batch is one row of tokens in which each prompt is followed by its candidates:

    [prompt A][candidate][candidate][candidate][prompt B][candidate][candidate]

All parts of a decoder except attention treat each token on its own, so they need only the right position ids: those of
a candidate begin where those of its prompt end. Attention splits the row: each prompt attends to itself, and each
candidate to its prompt and itself (`attend_along_row`). transformers can replace a model's attention by name, and
passes it the extra keyword arguments of the trunk's call; one of them is the row.

The keys and values of a prompt are cached after its batch. Candidates are scored as they finish, so the next candidate
of the prompt is in a later batch, where the prompt is not computed again. The keys and values of a candidate that is
scored before its end are cached too (`Rendered.is_beginning`), so that only the rest of its continuations is computed.
The cache keeps the most recently used ones, up to `CACHE_TOKENS` (`reranker.models.prefix_cache`).

Two prompts are the same if their tokens are the same (`Rendered.prefix_ids`). A prompt that was cut to make room for a
long candidate is a different prompt, and is not shared.

The method works for models whose attention can be replaced and that then compute the same states as before. Each model
is tested for that when it is loaded (`PrefixSharingTrunk.if_supported`); there is no list of models. Llama, Qwen2,
Qwen3, Mistral, Gemma and similar models pass. Encoders, recurrent layers and custom model code use padded batches
instead.

Splitting attention at the prompt is the idea of Hydragen (Juravsky et al. 2024, arXiv 2402.05099). Hydragen computes
all candidates over the prompt together and combines the two halves by their softmax sums, which was slower here:
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

CACHE_TOKENS = 8192
"""Capacity of the cache in tokens. A token takes 45 KiB with SmolLM2 in float32 and 128 KiB with Llama-3-8B in
bfloat16, which is 1 GiB for the whole cache. That is enough for dozens of concurrent requests with prompts of ordinary
length."""

ATTENTION = "nbest_along_row"
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of the row, and the cache slots to write its keys and values to; None if they are not cached."""

    span: slice
    slots_T: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.span.stop - self.span.start)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt and its candidates.

    `prompt` is a segment of the row, or the cache slots of tokens that are cached: a prompt, or a prompt with the
    beginning of a candidate.
    """

    prompt: Segment | torch.Tensor
    candidates: list[Segment] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch as a row of T tokens, the input of the trunk.

    `scored_N` and `computed_tokens_N` are in the order of the batch: the index of each candidate's last token in the
    row, and the tokens computed for the candidate. Those are its own, and its prompt's if it is the first to need them.
    `masks` caches attention masks by (queries, keys, window).
    """

    cache: PrefixCache
    input_ids_T: list[int] = field(default_factory=list)
    position_ids_T: list[int] = field(default_factory=list)
    groups: list[PromptGroup] = field(default_factory=list)
    scored_N: list[int] = field(default_factory=list)
    computed_tokens_N: list[int] = field(default_factory=list)
    masks: dict[tuple[int, int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def append(self, token_ids: Sequence[int], first_position: int) -> slice:
        """Appends tokens to the row and returns their range in it."""
        start, length = len(self.input_ids_T), len(token_ids)
        self.input_ids_T.extend(token_ids)
        self.position_ids_T.extend(range(first_position, first_position + length))
        return slice(start, start + length)


class PrefixSharingTrunk:
    """A decoder trunk that reads packed rows; not thread-safe, because it caches prompts and beginnings."""

    def __init__(self, trunk: Any, device: torch.device, cache_tokens: int = CACHE_TOKENS) -> None:
        self._trunk = trunk
        self._device = device
        self._cache = PrefixCache(cache_tokens, device)

    @classmethod
    def if_supported(cls, model: Any, device: torch.device) -> "PrefixSharingTrunk | None":
        """Changes the trunk of a sequence classifier to read packed rows; None, with no change, if it cannot.

        It can if two candidates of one prompt have the same states in a packed row as alone, up to rounding.
        """
        trunk = model.base_model
        if not (
            hasattr(model, "score")
            and getattr(trunk, "_supports_attention_backend", False)
            and trunk.config._attn_implementation == "sdpa"
            and set(getattr(trunk.config, "layer_types", None) or ()) <= SUPPORTED_LAYERS
        ):
            return None
        ids = [17 * number % trunk.get_input_embeddings().num_embeddings for number in range(1, 25)]
        pair = [Rendered((*ids[:9], *own), prompt_length=9) for own in (ids[9:16], ids[16:])]
        with torch.inference_mode():
            inputs = [_row(rendered.token_ids, device) for rendered in pair]
            alone_N_D = torch.stack([trunk(**ids, use_cache=False).last_hidden_state[0, -1] for ids in inputs])
            model.set_attn_implementation(ATTENTION)
            try:
                packed_N_D, _ = cls(trunk, device, cache_tokens=0).scored_states(pair)
            except (TypeError, KeyError, AttributeError, RuntimeError) as error:  # it does not support this call
                reason = str(error)
            else:
                difference = float((packed_N_D - alone_N_D).norm() / alone_N_D.norm())
                if difference <= torch.finfo(alone_N_D.dtype).eps ** 0.5:  # no more than rounding
                    return cls(trunk, device)
                reason = f"the states differ by {difference:.0%}"
        model.set_attn_implementation("sdpa")
        log.info("Candidates of %s do not share their prompt's computation: %s", type(model).__name__, reason)
        return None

    def scored_states(self, batch_N: Sequence[Rendered]) -> tuple[torch.Tensor, list[int]]:
        """(states_N_D at the scored tokens, computed_tokens_N; see `PackedBatch`)."""
        added: list[TokenIds] = []
        try:
            row = self._pack(batch_N, added)
            states_T_D = self._trunk(
                **_row(row.input_ids_T, self._device),
                position_ids=torch.tensor([row.position_ids_T], device=self._device),
                use_cache=False,
                row=row,
            ).last_hidden_state[0]
        except BaseException:  # the new cache entries may be incomplete
            for token_ids in reversed(added):
                self._cache.evict(token_ids)
            raise
        return states_T_D[torch.tensor(row.scored_N, device=self._device)], row.computed_tokens_N

    def _pack(self, batch_N: Sequence[Rendered], added: list[TokenIds]) -> PackedBatch:
        """Groups candidates by their longest cached prefix, or by their prompts; `added` collects new cache entries."""
        row = PackedBatch(self._cache, scored_N=[0] * len(batch_N), computed_tokens_N=[0] * len(batch_N))
        prompts_N = [rendered.prefix_ids for rendered in batch_N]
        matches_N = [
            self._cache.longest_match(prompt_ids, rendered.token_ids)
            for prompt_ids, rendered in zip(prompts_N, batch_N, strict=True)
        ]
        needed = {*prompts_N, *(match.token_ids for match in matches_N)}

        def cache(token_ids: TokenIds, **position: Any) -> torch.Tensor | None:
            slots_T = self._cache.add(token_ids, needed, **position)
            if slots_T is not None:
                added.append(token_ids)
                needed.add(token_ids)
            return slots_T

        groups: dict[TokenIds, PromptGroup] = {}
        for index, (rendered, prompt_ids, match) in enumerate(zip(batch_N, prompts_N, matches_N, strict=True)):
            shared_ids, own_ids = rendered.token_ids[: match.length], rendered.token_ids[match.length :]
            if shared_ids not in groups:
                prompt: Segment | torch.Tensor | None = match.slots_T
                if prompt is None:
                    prompt = Segment(row.append(shared_ids, first_position=0), cache(shared_ids))
                    row.computed_tokens_N[index] = match.length
                groups[shared_ids] = PromptGroup(prompt)
                row.groups.append(groups[shared_ids])
            slots_T = None
            if rendered.is_beginning and match.token_ids in self._cache:
                slots_T = cache(rendered.token_ids, prompt_ids=prompt_ids, after=match)
            span = row.append(own_ids, first_position=match.length)
            groups[shared_ids].candidates.append(Segment(span, slots_T))
            row.scored_N[index] = span.stop - 1
            row.computed_tokens_N[index] += len(own_ids)
        return row


def _row(token_ids_T: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """The tokens as a batch of one row; without a mask some models take tokens that equal the pad token for padding."""
    input_ids_1_T = torch.tensor([token_ids_T], device=device)
    return {"input_ids": input_ids_1_T, "attention_mask": torch.ones_like(input_ids_1_T)}


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
    """The attention of one layer over a row; it replaces transformers' own and has the same signature.

    `query` is (1, heads, T, D), `key` and `value` (1, KV heads, T, D); returns (1, T, heads, D). The queries that share
    a KV head get a dimension of their own, along which the keys are an expanded view, so no keys are copied for it. The
    candidates of a prompt are written one after the other into the same buffer behind the prompt's keys, so these keys
    are copied once per layer and not N times.
    """
    query = query[0].view(key.shape[1], -1, *query.shape[2:])
    key, value = key[0, :, None], value[0, :, None]
    attended = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype, device=value.device)

    def attend(span: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        queries = query[:, :, span]
        shape = (queries.shape[2], keys.shape[2], sliding_window)
        if shape not in row.masks:
            row.masks[shape] = _mask(*shape, query.dtype, query.device)
        mask = row.masks[shape]
        attended[:, :, span] = F.scaled_dot_product_attention(
            queries,
            keys.expand(-1, queries.shape[1], -1, -1),
            values.expand(-1, queries.shape[1], -1, -1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )

    for group in row.groups:
        keys, values = _prompt_keys_values(group.prompt, row.cache, module.layer_idx, key, value)
        length, longest = keys.shape[2], max(candidate.num_tokens for candidate in group.candidates)
        if isinstance(group.prompt, Segment) and length:
            attend(group.prompt.span, keys, values)
        keys, values = F.pad(keys, (0, 0, 0, longest)), F.pad(values, (0, 0, 0, longest))
        for candidate in group.candidates:
            end = length + candidate.num_tokens
            own = _segment_keys_values(candidate, row.cache, module.layer_idx, key, value)
            keys[:, :, length:end], values[:, :, length:end] = own
            attend(candidate.span, keys[:, :, :end], values[:, :, :end])
    return attended.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def _prompt_keys_values(
    prompt: Segment | torch.Tensor, cache: PrefixCache, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a group's prompt, each (KV heads, 1, tokens, D), from the row or from the cache."""
    if isinstance(prompt, Segment):
        return _segment_keys_values(prompt, cache, layer, key, value)
    keys, values = cache.read(layer, prompt)
    return keys[:, None], values[:, None]


def _segment_keys_values(
    segment: Segment, cache: PrefixCache, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a segment, each (KV heads, 1, tokens, D); writes them to its cache slots, if any."""
    keys, values = key[:, :, segment.span], value[:, :, segment.span]
    if segment.slots_T is not None:
        cache.write(layer, segment.slots_T, keys[:, 0], values[:, 0])
    return keys, values


def _mask(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """The additive attention mask if the queries are the last of the keys; None if plain causal attention will do."""
    if num_queries == num_keys and (window is None or num_keys <= window):
        return None
    distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(ATTENTION, attend_along_row)
