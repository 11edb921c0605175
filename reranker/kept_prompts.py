"""The keys and values of the prompts that were scored last, in buffers that never grow.

Every layer has one buffer for keys and one for values, with a place for each of `capacity` tokens. A prompt takes any
places that are free, the prompts used longest ago giving up theirs. Were each prompt's tensors allocated on their own,
they would lie about between what a batch needs for a moment, so that little of what is freed could be used again: in a
quarter of an hour of short prompts that came to more than the prompts themselves.
"""

from collections import OrderedDict
from collections.abc import Collection

import torch

TokenIds = tuple[int, ...]


class KeptPrompts:
    """Places of prompts by their tokens; not for two threads at once."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._free = list(range(capacity))
        self._places: OrderedDict[TokenIds, torch.Tensor] = OrderedDict()
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def find(self, prompt_ids: TokenIds) -> torch.Tensor | None:
        """The prompt's places, if it is kept; it is then the one used last."""
        if prompt_ids not in self._places:
            return None
        self._places.move_to_end(prompt_ids)
        return self._places[prompt_ids]

    def add(self, prompt_ids: TokenIds, needed: Collection[TokenIds]) -> torch.Tensor | None:
        """Places to write the prompt to; None where there is no room beside those that are `needed` too."""
        while len(self._free) < len(prompt_ids) <= self._capacity:
            oldest = next(iter(self._places), None)
            if oldest is None or oldest in needed:
                return None
            self.forget(oldest)
        if len(self._free) < len(prompt_ids):
            return None
        first = len(self._free) - len(prompt_ids)
        places = torch.tensor(self._free[first:], dtype=torch.long, device=self._device)
        del self._free[first:]
        self._places[prompt_ids] = places
        return places

    def forget(self, prompt_ids: TokenIds) -> None:
        self._free += self._places.pop(prompt_ids).tolist()

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

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        # Not filled: on a CPU memory is only taken for places that were written to.
        return torch.empty((like.shape[0], self._capacity, like.shape[2]), dtype=like.dtype, device=like.device)
