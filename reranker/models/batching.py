"""Forms batches: which waiting sequences are computed together, and when.

One worker computes one batch at a time; sequences that arrive meanwhile wait. A batch closes as soon as the worker is
free and

- the waiting tokens fill `max_batch_tokens`, or
- the first sequence has waited `max_wait_ms`. Candidates that finish in the same engine step arrive together anyway,
  so a longer wait only adds latency.

Batches are formed across requests. Each contains the sequence that has waited longest, so none starves. Which others
join it depends on how the model computes a batch:

    PACKED   one row without padding, with each prompt once (`reranker.models.prefix_sharing`): first the candidates
             of the same prompt, then other prompts with all of their candidates, in order of arrival
    PADDED   all sequences padded to the longest: those nearest in length, so that little padding is computed

Equal sequences are computed once, and all their callers get the result.

A policy consists of two pure functions over lengths. `Batcher` is the loop that applies a policy; it does not depend
on the model or on the type of its results.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

MAX_PADDING_SHARE = 0.1
"""Most padding tokens in a batch per real token; a sequence that would exceed it waits for another batch."""


class Sized(Hashable, Protocol):
    """A sequence of tokens to compute; `prefix_ids` are the first ones, which other sequences may share."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


class Length(NamedTuple):
    """The number of a sequence's own tokens and of shared ones before them, which are those of its `prompt`."""

    own: int
    shared: int = 0
    prompt: Hashable = None

    @property
    def total(self) -> int:
        return self.own + self.shared


class BatchingPolicy(NamedTuple):
    """Chooses the waiting sequences to compute now, and computes the size of a batch.

    `choose` takes the lengths in order of arrival and `max_batch_tokens`, and returns positions in them. It always
    includes the first; a sequence over the budget is computed alone. `size` returns the tokens of a batch.
    """

    choose: Callable[[Sequence[Length], int], list[int]]
    size: Callable[[Sequence[Length]], int]


def packed_size(batch: Sequence[Length]) -> int:
    """The tokens with each prompt once; a prompt with cached keys counts too, because they still occupy memory."""
    return sum(length.own for length in batch) + sum({length.prompt: length.shared for length in batch}.values())


def choose_packed(waiting: Sequence[Length], max_batch_tokens: int) -> list[int]:
    """The first sequence and others of its prompt, then prompt by prompt in order of arrival, while there is room."""
    arrival: dict[Hashable, int] = {}
    for position, length in enumerate(waiting):
        arrival.setdefault(length.prompt, position)
    chosen: list[int] = []
    prompts: set[Hashable] = set()
    size = 0
    for position in sorted(range(len(waiting)), key=lambda position: (arrival[waiting[position].prompt], position)):
        length = waiting[position]
        added = length.own if length.prompt in prompts else length.total
        if not chosen or size + added <= max_batch_tokens:
            chosen.append(position)
            prompts.add(length.prompt)
            size += added
    return chosen


def padded_size(batch: Sequence[Length]) -> int:
    """The tokens with every sequence padded to the longest."""
    return len(batch) * max(length.total for length in batch)


def choose_padded(waiting: Sequence[Length], max_batch_tokens: int) -> list[int]:
    """A contiguous run of the sequences sorted by length, shortest first, which contains the first to arrive.

    The run grows on the side that adds less padding, while its padded size stays within `max_batch_tokens` and its
    padding within `MAX_PADDING_SHARE` of its real tokens.
    """
    lengths = [length.total for length in waiting]
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
    """A sequence that waits, with the futures of all callers that submitted it."""

    item: Item
    length: Length
    arrived_s: float
    results: list[asyncio.Future[Result]] = field(default_factory=list)

    @property
    def is_needed(self) -> bool:
        """Whether a caller still waits for the result; the future of a cancelled caller is done."""
        return not all(result.done() for result in self.results)


class Batcher(Generic[Item, Result]):
    """Computes one result per sequence, in batches formed across concurrent callers.

    `compute` blocks, so it runs in a separate thread and the event loop continues meanwhile. `on_batch` is called for
    every batch, with the number of sequences and the number of tokens, padding included.
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
        self._waiting: dict[Item, _Waiting[Item, Result]] = {}  # in order of arrival
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of these sequences, in order. If the caller is cancelled, so are its waiting sequences."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        results = [self._enqueue(item) for item in items]
        self._arrival.set()
        return await asyncio.gather(*results)

    def _enqueue(self, item: Item) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        waiting = self._waiting.get(item)
        if waiting is None:
            prefix_ids = item.prefix_ids
            own = len(item.token_ids) - len(prefix_ids)
            # A hash identifies the prompt. In a collision a batch would only exceed its budget a little.
            length = Length(own, len(prefix_ids), hash(prefix_ids))
            waiting = self._waiting[item] = _Waiting(item, length, loop.time())
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
                values = await loop.run_in_executor(self._thread, self._compute, [waiting.item for waiting in batch])
            except Exception as error:  # noqa: BLE001 (the callers get whatever the model raises)
                for result in (result for waiting in batch for result in waiting.results if not result.done()):
                    result.set_exception(error)
                continue
            for waiting, value in zip(batch, values, strict=True):
                for result in waiting.results:
                    if not result.done():
                        result.set_result(value)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """Waits until a batch closes, removes it from the waiting sequences, and calls `on_batch`."""
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = {item: waiting for item, waiting in self._waiting.items() if waiting.is_needed}
            self._arrival.clear()
            queue = list(self._waiting.values())
            lengths = [waiting.length for waiting in queue]
            remaining_s = queue[0].arrived_s + self._max_wait_s - loop.time() if queue else None
            if remaining_s is not None and (remaining_s <= 0 or self._policy.size(lengths) >= self._max_batch_tokens):
                break
            try:
                async with asyncio.timeout(remaining_s):
                    await self._arrival.wait()
            except TimeoutError:
                pass
        batch = [queue[position] for position in self._policy.choose(lengths, self._max_batch_tokens)]
        for waiting in batch:
            del self._waiting[waiting.item]
        if self._on_batch:
            self._on_batch(len(batch), self._policy.size([waiting.length for waiting in batch]))
        return batch
