"""A KV cache of prompts and partial candidates, in buffers of a fixed size.

Candidates are scored as they finish, so the keys and values of a prompt are needed again for its later candidates. A
"beginning" is a candidate that is scored before its end, such as a block of a blockwise search. Its keys and values are
cached too, for the candidates that continue it. The entry of a beginning comes after its parent, which is the prompt or
an earlier beginning, and occupies slots for only its own tokens.

Each layer has one buffer for keys and one for values, with a slot for each of `capacity` tokens. An entry takes any
free slots. The least recently used entries are evicted first, and never before the entries that continue them.

Fixed buffers avoid fragmentation. If each prompt's tensors were allocated separately, they would lie between the
temporary tensors of batches, and little of the freed memory could be used again: in a quarter of an hour of short
prompts, the loss exceeded the prompts themselves.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

TokenIds = tuple[int, ...]

MIN_SHARED_TOKENS = 4
"""Fewest tokens after the prompt that a candidate must share with a beginning; fewer are as fast to compute."""


@dataclass(slots=True)
class CacheEntry:
    """The slots of a prompt or of a beginning.

    `slots_T` are the slots of all tokens from the first prompt token on; `own_slots` are the last of them, which this
    entry occupies itself. `parent_ids` are the tokens of the entry that it continues, and `prompt_ids` those of its
    prompt; both are None for a prompt. `beginnings` are the entries of a prompt's beginnings.
    """

    slots_T: torch.Tensor
    own_slots: list[int]
    parent_ids: TokenIds | None = None
    prompt_ids: TokenIds | None = None
    beginnings: list[TokenIds] = field(default_factory=list)


class PrefixMatch(NamedTuple):
    """The entry `token_ids`, whose first `length` tokens a candidate shares, and their slots; None if not cached."""

    token_ids: TokenIds
    length: int
    slots_T: torch.Tensor | None


class PrefixCache:
    """The cached prompts and beginnings, by their tokens; not thread-safe."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._free_slots = list(range(capacity))
        self._entries: OrderedDict[TokenIds, CacheEntry] = OrderedDict()
        """Least recently used first; an entry comes before its parent."""
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def longest_match(self, prompt_ids: TokenIds, token_ids: TokenIds) -> PrefixMatch:
        """The entry that shares most tokens with a candidate, except its last; otherwise its prompt, cached or not."""
        if prompt_ids not in self._entries:
            return PrefixMatch(prompt_ids, len(prompt_ids), None)
        best, longest = prompt_ids, len(prompt_ids)
        for beginning in self._entries[prompt_ids].beginnings:
            shared = _common_length(beginning, token_ids[:-1], len(prompt_ids))
            if shared >= max(longest + 1, len(prompt_ids) + MIN_SHARED_TOKENS):
                best, longest = beginning, shared
        self._mark_used(best)
        return PrefixMatch(best, longest, self._entries[best].slots_T[:longest])

    def add(
        self,
        token_ids: TokenIds,
        needed: Collection[TokenIds],
        *,
        prompt_ids: TokenIds | None = None,
        after: PrefixMatch | None = None,
    ) -> torch.Tensor | None:
        """Adds an entry and returns the slots to write its own tokens to.

        Returns None if the tokens are cached already, or do not fit beside the entries that the batch has `needed`. A
        beginning has `prompt_ids`, and comes `after` a match that is cached.
        """
        if token_ids in self._entries:
            return None
        parent_ids, shared = (after.token_ids, after.length) if after else (None, 0)
        count = len(token_ids) - shared
        while len(self._free_slots) < count <= self._capacity:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in needed:
                return None
            self.evict(oldest)
        if len(self._free_slots) < count:
            return None
        first = len(self._free_slots) - count
        own_slots = self._free_slots[first:]
        del self._free_slots[first:]
        own_slots_T = torch.tensor(own_slots, dtype=torch.long, device=self._device)
        slots_T = own_slots_T
        if parent_ids is not None:
            slots_T = torch.cat([self._entries[parent_ids].slots_T[:shared], own_slots_T])
        self._entries[token_ids] = CacheEntry(slots_T, own_slots, parent_ids, prompt_ids)
        if prompt_ids is not None:
            self._entries[prompt_ids].beginnings.append(token_ids)
        self._mark_used(token_ids)
        return own_slots_T

    def evict(self, token_ids: TokenIds) -> None:
        """Frees the slots of a prompt without beginnings, or of a beginning that no entry continues."""
        entry = self._entries.pop(token_ids)
        self._free_slots += entry.own_slots
        if entry.prompt_ids is not None:
            self._entries[entry.prompt_ids].beginnings.remove(token_ids)

    def __contains__(self, token_ids: TokenIds) -> bool:
        return token_ids in self._entries

    def write(self, layer: int, slots_T: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values of one layer, each (KV heads, T, D)."""
        if layer not in self._buffers:
            self._buffers[layer] = self._buffer(keys), self._buffer(values)
        for buffer, tokens in zip(self._buffers[layer], (keys, values), strict=True):
            buffer[:, slots_T] = tokens

    def read(self, layer: int, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values in these slots, each (KV heads, T, D)."""
        keys, values = self._buffers[layer]
        return keys[:, slots_T], values[:, slots_T]

    def _mark_used(self, token_ids: TokenIds | None) -> None:
        """Makes an entry the most recently used, followed by the entries that it continues."""
        while token_ids is not None:
            self._entries.move_to_end(token_ids)
            token_ids = self._entries[token_ids].parent_ids

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        # Not initialised: on a CPU, memory is then used only for slots that were written to.
        return torch.empty((like.shape[0], self._capacity, like.shape[2]), dtype=like.dtype, device=like.device)


def _common_length(left: TokenIds, right: TokenIds, start: int) -> int:
    """The length of the common prefix, of which the first `start` tokens are known to be equal."""
    end = min(len(left), len(right))
    return next((index for index in range(start, end) if left[index] != right[index]), end)
