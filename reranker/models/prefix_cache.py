"""The keys and values of what was scored last and will be read again, in buffers that never grow.

Kept are prompts, because candidates are scored as they finish and each follows its prompt, and beginnings: candidates
that were scored before their end, and of which the rest is to come. A beginning is kept behind the prompt or the
beginning that it goes on from, and holds places for its own tokens alone.

Every layer has one buffer for keys and one for values, with a place for each of `capacity` tokens. What is kept takes
any places that are free, what was used longest ago giving up its own; nothing is given up before all that goes on from
it. Were each prompt's tensors allocated on their own, they would lie about between what a batch needs for a moment, so
that little of what is freed could be used again: in a quarter of an hour of short prompts that came to more than the
prompts themselves.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

TokenIds = tuple[int, ...]

LEAST_SHARED = 4
"""Tokens after the prompt that a candidate must have in common with a beginning; fewer are as soon computed."""


@dataclass(slots=True)
class Kept:
    """`places_T` are of all tokens from the first of the prompt on, `own` the last of them, which it holds itself.

    `before` is what it goes on from, and `prompt_ids` what that goes back to; None for a prompt. `beginnings` are those
    of a prompt.
    """

    places_T: torch.Tensor
    own: list[int]
    before: TokenIds | None = None
    prompt_ids: TokenIds | None = None
    beginnings: list[TokenIds] = field(default_factory=list)


class Found(NamedTuple):
    """The first `length` of `token_ids` are a candidate's too; `places_T` are theirs, None if they are not kept."""

    token_ids: TokenIds
    length: int
    places_T: torch.Tensor | None


class PrefixCache:
    """Places of prompts and beginnings by their tokens; not for two threads at once."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._free = list(range(capacity))
        self._kept: OrderedDict[TokenIds, Kept] = OrderedDict()
        """Used longest ago first; what goes on from another one stands before it."""
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def longest(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Found:
        """What is kept that has most of a candidate's tokens in common, but the last; else its prompt, kept or not."""
        if prompt_ids not in self._kept:
            return Found(prompt_ids, len(prompt_ids), None)
        best, most = prompt_ids, len(prompt_ids)
        for one in self._kept[prompt_ids].beginnings:
            shared = _common(one, token_ids[:-1], len(prompt_ids))
            if shared >= max(most + 1, len(prompt_ids) + LEAST_SHARED):
                best, most = one, shared
        self._use(best)
        return Found(best, most, self._kept[best].places_T[:most])

    def add(
        self,
        token_ids: TokenIds,
        needed: Collection[TokenIds],
        *,
        prompt_ids: TokenIds | None = None,
        after: Found | None = None,
    ) -> torch.Tensor | None:
        """Places to write the tokens to; None where they are kept already, or have no room beside those `needed` too.

        A beginning of `prompt_ids` goes on `after` something kept.
        """
        if token_ids in self._kept:
            return None
        before, shared = (after.token_ids, after.length) if after else (None, 0)
        count = len(token_ids) - shared
        while len(self._free) < count <= self._capacity:
            oldest = next(iter(self._kept), None)
            if oldest is None or oldest in needed:
                return None
            self.forget(oldest)
        if len(self._free) < count:
            return None
        first = len(self._free) - count
        own = self._free[first:]
        del self._free[first:]
        places_T = torch.tensor(own, dtype=torch.long, device=self._device)
        path_T = places_T if before is None else torch.cat([self._kept[before].places_T[:shared], places_T])
        self._kept[token_ids] = Kept(path_T, own, before, prompt_ids)
        if prompt_ids is not None:
            self._kept[prompt_ids].beginnings.append(token_ids)
        self._use(token_ids)
        return places_T

    def forget(self, token_ids: TokenIds) -> None:
        """Frees the places of a prompt without beginnings, or of a beginning that nothing goes on from."""
        gone = self._kept.pop(token_ids)
        self._free += gone.own
        if gone.prompt_ids is not None:
            self._kept[gone.prompt_ids].beginnings.remove(token_ids)

    def __contains__(self, token_ids: TokenIds) -> bool:
        return token_ids in self._kept

    def write(self, layer: int, places_T: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values of one layer, each (KV heads, T, D)."""
        if layer not in self._buffers:
            self._buffers[layer] = self._buffer(keys), self._buffer(values)
        for buffer, tokens in zip(self._buffers[layer], (keys, values), strict=True):
            buffer[:, places_T] = tokens

    def read(self, layer: int, places_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was written there, copied out: (KV heads, T, D) each."""
        keys, values = self._buffers[layer]
        return keys[:, places_T], values[:, places_T]

    def _use(self, token_ids: TokenIds | None) -> None:
        """It is used last, and what it goes on from after it."""
        while token_ids is not None:
            self._kept.move_to_end(token_ids)
            token_ids = self._kept[token_ids].before

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        # Not filled: on a CPU memory is only taken for places that were written to.
        return torch.empty((like.shape[0], self._capacity, like.shape[2]), dtype=like.dtype, device=like.device)


def _common(one: TokenIds, other: TokenIds, start: int) -> int:
    """How many tokens they begin with alike, of which the first `start` are known to be."""
    end = min(len(one), len(other))
    return next((place for place in range(start, end) if one[place] != other[place]), end)
