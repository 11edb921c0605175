"""Which waiting sequences are computed together, and when.

One worker computes one batch at a time; while it does, others gather. A batch closes as soon as the worker is free and

- the waiting tokens fill `max_batch_tokens`, or
- the first of them has waited `max_wait_ms`: candidates that finish in the same engine step arrive together anyway,
  so a longer wait only adds latency.

Batches are formed across requests. Each holds the sequence that has waited longest, so none starves. What joins it
depends on how the model computes a batch:

    PACKED   one row without padding, each prompt once (`reranker.models.prefix_sharing`): first the candidates of
             the same prompt, then other prompts with all of theirs, in order of arrival
    PADDED   every sequence as long as the longest: those nearest in length, so that little is computed for padding

Sequences of the same tokens are computed once, and all who asked get the result.

A policy is two pure functions over lengths. `Batcher` is the thin loop that applies one. Which model computes a batch
and what comes out of it are not its business.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

MAX_PADDING_SHARE = 0.1
"""Padding tokens a batch may carry for each real one; past it a sequence waits for a batch of its own length."""


class Sized(Protocol):
    """A sequence of tokens to be computed; `prefix_ids` are those at its start that others may have too."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


class Length(NamedTuple):
    """Tokens of a sequence: its own, and those before them, which are the same wherever `prompt` is."""

    own: int
    shared: int = 0
    prompt: Hashable = None

    @property
    def total(self) -> int:
        return self.own + self.shared


class BatchingPolicy(NamedTuple):
    """Which of the waiting to compute now, as positions, and how many tokens a batch comes to.

    `choose` is given the lengths in order of arrival and the most tokens a batch may have. It always takes the first;
    a single sequence over the budget is computed alone.
    """

    choose: Callable[[Sequence[Length], int], list[int]]
    size: Callable[[Sequence[Length]], int]


def packed_size(batch: Sequence[Length]) -> int:
    """Tokens with every prompt once. A prompt whose keys are kept counts too: they are in memory all the same."""
    return sum(one.own for one in batch) + sum({one.prompt: one.shared for one in batch}.values())


def choose_packed(waiting: Sequence[Length], max_batch_tokens: int) -> list[int]:
    """The first and those of its prompt, then prompt by prompt in order of arrival, while there is room."""
    arrival: dict[Hashable, int] = {}
    for position, one in enumerate(waiting):
        arrival.setdefault(one.prompt, position)
    chosen: list[int] = []
    prompts: set[Hashable] = set()
    size = 0
    for position in sorted(range(len(waiting)), key=lambda position: (arrival[waiting[position].prompt], position)):
        one = waiting[position]
        added = one.own if one.prompt in prompts else one.total
        if not chosen or size + added <= max_batch_tokens:
            chosen.append(position)
            prompts.add(one.prompt)
            size += added
    return chosen


def padded_size(batch: Sequence[Length]) -> int:
    return len(batch) * max(one.total for one in batch)


def choose_padded(waiting: Sequence[Length], max_batch_tokens: int) -> list[int]:
    """A run of the sequences sorted by length that contains the first to arrive, shortest first.

    It grows by whichever neighbour wastes less, while its padded size stays within `max_batch_tokens` and its padding
    within `MAX_PADDING_SHARE` of its real tokens.
    """
    lengths = [one.total for one in waiting]
    by_length = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    low = high = by_length.index(0)
    real = lengths[0]

    def fits(new_low: int, new_high: int, new_real: int) -> bool:
        padded = lengths[by_length[new_high]] * (new_high - new_low + 1)
        return padded <= max_batch_tokens and padded - new_real <= MAX_PADDING_SHARE * new_real

    while True:
        longest, size = lengths[by_length[high]], high - low + 1
        wasted: list[tuple[int, int, int]] = []
        if low > 0:
            wasted.append((longest - lengths[by_length[low - 1]], low - 1, high))
        if high + 1 < len(by_length):
            wasted.append(((lengths[by_length[high + 1]] - longest) * size, low, high + 1))
        for _, new_low, new_high in sorted(wasted):
            added = by_length[new_low] if new_low < low else by_length[new_high]
            if fits(new_low, new_high, real + lengths[added]):
                low, high, real = new_low, new_high, real + lengths[added]
                break
        else:
            return by_length[low : high + 1]


PACKED = BatchingPolicy(choose_packed, packed_size)
PADDED = BatchingPolicy(choose_padded, padded_size)


@dataclass(slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    length: Length
    arrived_s: float
    results: list[asyncio.Future[Result]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        return not all(result.done() for result in self.results)


class Batcher(Generic[Item, Result]):
    """Computes one result per sequence, in batches formed across concurrent callers.

    `compute` blocks; it runs in one thread of its own, so the event loop goes on meanwhile. `on_batch` hears the
    number of sequences and of tokens, padding included, of every batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        policy: BatchingPolicy,
        max_batch_tokens: int,
        max_wait_ms: float,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        self._compute = compute
        self._policy = policy
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_s = max_wait_ms / 1000
        self._on_batch = on_batch
        self._waiting: dict[tuple[int, ...], _Waiting[Item, Result]] = {}  # by tokens, in order of arrival
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of these sequences, in order. A caller that is cancelled takes its waiting sequences along."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        results = [self._enqueue(item) for item in items]
        self._arrival.set()
        return await asyncio.gather(*results)

    def _enqueue(self, item: Item) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        waiting = self._waiting.get(item.token_ids)
        if waiting is None:
            prefix_ids = item.prefix_ids
            own = len(item.token_ids) - len(prefix_ids)
            # A hash is enough to tell prompts apart here: were two alike, a batch would be a little over its budget.
            length = Length(own, len(prefix_ids), hash(prefix_ids))
            waiting = self._waiting[item.token_ids] = _Waiting(item, length, loop.time())
        result: asyncio.Future[Result] = loop.create_future()
        waiting.results.append(result)
        return result

    async def close(self) -> None:
        """Stops the loop and the thread; callers still waiting are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for waiting in self._waiting.values():
            for result in waiting.results:
                result.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            try:
                found = await loop.run_in_executor(self._thread, self._compute, [one.item for one in batch])
            except Exception as error:  # noqa: BLE001 (whatever the model raises belongs to those who asked for it)
                for result in (result for one in batch for result in one.results if not result.done()):
                    result.set_exception(error)
                continue
            for one, value in zip(batch, found, strict=True):
                for result in one.results:
                    if not result.done():
                        result.set_result(value)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """Waits until a batch closes, takes it from those waiting, and tells `on_batch`."""
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = {ids: one for ids, one in self._waiting.items() if one.wanted}  # less what was cancelled
            self._arrival.clear()
            waiting = list(self._waiting.values())
            patience_s = waiting[0].arrived_s + self._max_wait_s - loop.time() if waiting else None
            if patience_s is not None and (
                patience_s <= 0 or self._policy.size([one.length for one in waiting]) >= self._max_batch_tokens
            ):
                break
            try:
                async with asyncio.timeout(patience_s):
                    await self._arrival.wait()
            except TimeoutError:
                pass
        chosen = self._policy.choose([one.length for one in waiting], self._max_batch_tokens)
        batch = [waiting[position] for position in chosen]
        for one in batch:
            del self._waiting[one.item.token_ids]
        if self._on_batch:
            self._on_batch(len(batch), self._policy.size([one.length for one in batch]))
        return batch
