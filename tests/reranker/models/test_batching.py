import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.models.batching import (
    MAX_PADDING_SHARE,
    PACKED,
    PADDED,
    Batcher,
    BatchingPolicy,
    Length,
    choose_packed,
    choose_padded,
    packed_size,
    padded_size,
)


@dataclass(frozen=True)
class Tokens:
    token_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()


def tokens(length: int, first: int = 0) -> Tokens:
    return Tokens((first,) * length)


def alone(*lengths: int) -> list[Length]:
    """Lengths of sequences that share no prompt."""
    return [Length(own=length) for length in lengths]


def of(prompt: str, shared: int, *owns: int) -> list[Length]:
    """Lengths of the candidates of a prompt."""
    return [Length(own, shared, prompt) for own in owns]


@pytest.mark.parametrize(
    ("waiting", "budget", "expected"),
    [
        pytest.param(alone(10, 10, 10), 30, [0, 1, 2], id="all fit the budget exactly"),
        pytest.param(alone(10, 10, 10), 29, [0, 1], id="a sequence beyond the budget waits"),
        pytest.param(alone(100), 30, [0], id="a sequence over the budget is computed alone"),
        pytest.param(alone(20, 100, 19, 21), 1000, [2, 0, 3], id="near lengths are batched: 3 x 21 pads 3 of 60"),
        pytest.param(alone(100, 20, 20), 1000, [0], id="the first to arrive is always served, alone if necessary"),
        pytest.param(of("a", 90, 10, 10), 199, [0], id="a shared prompt counts for each candidate"),
    ],
)
def test_the_padded_policy_chooses(waiting: list[Length], budget: int, expected: list[int]) -> None:
    assert choose_padded(waiting, budget) == expected


@pytest.mark.parametrize(
    ("waiting", "budget", "expected", "size"),
    [
        pytest.param(of("a", 90, 10, 10), 110, [0, 1], 110, id="a shared prompt counts once"),
        pytest.param(of("a", 90, 10, 10), 109, [0], 100, id="a sequence beyond the budget waits"),
        pytest.param(of("a", 90, 10), 30, [0], 100, id="a sequence over the budget is computed alone"),
        pytest.param(
            [*of("a", 9, 1), *of("b", 9, 1), *of("a", 9, 2)],
            15,
            [0, 2],
            12,
            id="candidates of the same prompt come first",
        ),
        pytest.param(
            [*of("a", 9, 1), *of("b", 9, 1), *of("c", 4, 1), *of("b", 9, 3)],
            23,
            [0, 1, 3],
            23,
            id="the next prompt comes with all of its candidates",
        ),
        pytest.param(
            [*of("a", 5, 1), *of("b", 50, 9), *of("c", 5, 4)], 20, [0, 2], 15, id="a sequence that does not fit waits"
        ),
        pytest.param(of("a", 50, 1, 300, 20), 400, [0, 1, 2], 371, id="lengths may differ: nothing is padded"),
    ],
)
def test_the_packed_policy_chooses(waiting: list[Length], budget: int, expected: list[int], size: int) -> None:
    chosen = choose_packed(waiting, budget)
    assert chosen == expected
    assert packed_size([waiting[position] for position in chosen]) == size


prompts = st.integers(0, 4)
waiting_lists = st.lists(
    st.builds(lambda own, prompt: Length(own, 37 * prompt, prompt), st.integers(1, 300), prompts),
    min_size=1,
    max_size=40,
)
policies = pytest.mark.parametrize("policy", [PACKED, PADDED])


@policies
@given(waiting_lists, st.integers(1, 2000))
def test_a_batch_has_the_first_to_arrive_and_stays_within_the_budget(
    policy: BatchingPolicy, waiting: list[Length], budget: int
) -> None:
    chosen = policy.choose(waiting, budget)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == 1 or policy.size([waiting[position] for position in chosen]) <= budget


@given(waiting_lists, st.integers(1, 2000))
def test_a_padded_batch_stays_within_the_padding_share(waiting: list[Length], budget: int) -> None:
    batch = [waiting[position] for position in choose_padded(waiting, budget)]
    real = sum(length.total for length in batch)
    assert padded_size(batch) - real <= MAX_PADDING_SHARE * real


@policies
@given(waiting_lists, st.integers(1, 2000))
def test_every_sequence_is_served_eventually(policy: BatchingPolicy, waiting: list[Length], budget: int) -> None:
    for _ in range(len(waiting)):
        chosen = set(policy.choose(waiting, budget))
        waiting = [length for position, length in enumerate(waiting) if position not in chosen]
        if not waiting:
            return
    raise AssertionError(f"{waiting} never served")


@pytest.mark.parametrize(("policy", "max_per_real_token"), [(PACKED, 0.5), (PADDED, 1.1)])
async def test_a_mixed_load_is_computed_with_little_padding(policy: BatchingPolicy, max_per_real_token: float) -> None:
    # 24 requests at once: prompts of 20 to 1000 tokens, 8 candidates each of 1 to 300.
    random = Random(0)
    computed: list[int] = []
    requests = []
    for request in range(24):
        prompt = (request,) * random.randint(20, 1000)
        owns = [tuple(random.choices(range(100), k=random.randint(1, 300))) for _ in range(8)]
        requests.append([Tokens(prompt + own, prompt) for own in owns])
    batcher: Batcher[Tokens, int] = Batcher(
        lambda items: [0] * len(items),
        policy=policy,
        max_batch_tokens=8192,
        max_wait_ms=20,
        on_batch=lambda _, size: computed.append(size),
    )
    await asyncio.gather(*(batcher.submit(items) for items in requests))
    await batcher.close()
    real = sum(len(item.token_ids) for items in requests for item in items)
    assert sum(computed) < max_per_real_token * real
    if policy is PACKED:
        once = sum(
            len(items[0].prefix_ids) + sum(len(i.token_ids) - len(i.prefix_ids) for i in items) for items in requests
        )
        assert sum(computed) <= 1.1 * once


async def test_concurrent_callers_share_a_batch_and_get_their_own_results() -> None:
    batches: list[tuple[int, int]] = []

    def lengths(items: Sequence[Tokens]) -> list[float]:
        return [float(len(item.token_ids)) for item in items]

    batcher: Batcher[Tokens, float] = Batcher(
        lengths,
        policy=PADDED,
        max_batch_tokens=1000,
        max_wait_ms=20,
        on_batch=lambda count, size: batches.append((count, size)),
    )
    first, second = await asyncio.gather(
        batcher.submit([tokens(10), tokens(11)]), batcher.submit([tokens(11, first=1)])
    )
    await batcher.close()
    assert (first, second) == ([10.0, 11.0], [11.0])
    assert batches == [(3, 33)]


async def test_a_full_batch_does_not_wait() -> None:
    batcher: Batcher[Tokens, float] = Batcher(
        lambda items: [0.0] * len(items), policy=PADDED, max_batch_tokens=20, max_wait_ms=60_000
    )
    async with asyncio.timeout(5):
        assert await batcher.submit([tokens(10), tokens(10, first=1)]) == [0.0, 0.0]
    await batcher.close()


async def test_the_same_tokens_are_computed_once_for_all_callers() -> None:
    computed: list[Tokens] = []

    def compute(items: Sequence[Tokens]) -> list[float]:
        computed.extend(items)
        return [float(len(item.token_ids)) for item in items]

    batcher: Batcher[Tokens, float] = Batcher(compute, policy=PACKED, max_batch_tokens=100, max_wait_ms=20)
    cancelled = asyncio.create_task(batcher.submit([tokens(7)]))
    waiting = asyncio.gather(batcher.submit([tokens(7), tokens(3), tokens(7)]), batcher.submit([tokens(7)]))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert [*await waiting] == [[7.0, 3.0, 7.0], [7.0]]
    await batcher.close()
    assert computed == [tokens(7), tokens(3)]


async def test_the_event_loop_runs_while_a_batch_is_computed() -> None:
    release = threading.Event()

    def compute(items: Sequence[Tokens]) -> list[float]:
        assert release.wait(5), "the event loop did not run"
        return [1.0] * len(items)

    batcher: Batcher[Tokens, float] = Batcher(compute, policy=PADDED, max_batch_tokens=10, max_wait_ms=0)
    asyncio.get_running_loop().call_later(0.01, release.set)
    assert await batcher.submit([tokens(3)]) == [1.0]
    await batcher.close()


async def test_the_waiting_sequences_of_a_cancelled_caller_are_not_computed() -> None:
    computed: list[int] = []
    release = threading.Event()

    def compute(items: Sequence[Tokens]) -> list[float]:
        release.wait(5)
        computed.extend(len(item.token_ids) for item in items)
        return [0.0] * len(items)

    batcher: Batcher[Tokens, float] = Batcher(compute, policy=PADDED, max_batch_tokens=10, max_wait_ms=0)
    running = asyncio.create_task(batcher.submit([tokens(10)]))
    await asyncio.sleep(0.01)
    cancelled = asyncio.create_task(batcher.submit([tokens(9)]))
    waiting = asyncio.create_task(batcher.submit([tokens(8)]))
    await asyncio.sleep(0.01)
    cancelled.cancel()
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(running, waiting)
    await batcher.close()
    assert computed == [10, 8]


async def test_a_failing_batch_fails_only_its_callers() -> None:
    def compute(items: Sequence[Tokens]) -> list[float]:
        if len(items[0].token_ids) == 7:
            raise RuntimeError("out of memory")
        return [1.0] * len(items)

    batcher: Batcher[Tokens, float] = Batcher(compute, policy=PADDED, max_batch_tokens=5, max_wait_ms=0)
    bad, good = await asyncio.gather(batcher.submit([tokens(7)]), batcher.submit([tokens(3)]), return_exceptions=True)
    await batcher.close()
    assert isinstance(bad, RuntimeError)
    assert good == [1.0]
