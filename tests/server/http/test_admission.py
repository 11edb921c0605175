"""Which requests start, wait or are refused, and the Retry-After; the expected numbers are computed by hand."""

import asyncio
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from reranker.candidate import Message, Prompt
from server.config import Settings
from server.errors import DeadlineError, OverloadedError
from server.generation.base import SamplingParams
from server.http.admission import ASSUMED_MAX_TOKENS, Admission, AdmissionQueue, Limits, Ticket, requested_tokens
from server.observability.metrics import Metrics
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_of, pipeline

CHAT = "/v1/chat/completions"
NO_TOKEN_LIMIT = 10**9


def queue_of(running: int, queued: int, tokens: int = NO_TOKEN_LIMIT) -> AdmissionQueue:
    return AdmissionQueue(Limits(running, queued, tokens))


def enter(queue: AdmissionQueue, candidates: int, tokens: int = 0, now_s: float = 0) -> Ticket:
    ticket = Ticket(candidates, tokens)
    queue.enter(ticket, now_s)
    return ticket


class TestAdmissionQueue:
    def test_candidates_run_up_to_the_limit_and_the_next_request_waits(self) -> None:
        queue = queue_of(8, 4)
        first, second, third = (enter(queue, 4) for _ in range(3))
        assert (first.started_s, second.started_s, third.started_s) == (0, 0, None)
        assert (queue.running_candidates, queue.queued_candidates) == (8, 4)

    def test_waiting_requests_start_in_order_when_others_end(self) -> None:
        queue = queue_of(8, 8)
        running = enter(queue, 8)
        waiting = [enter(queue, candidates) for candidates in (4, 2, 2)]
        assert queue.leave(running, now_s=3) == waiting
        assert waiting[0].started_s == 3

    def test_a_small_request_does_not_overtake_a_large_one(self) -> None:
        queue = queue_of(8, 8)
        six, two = enter(queue, 6), enter(queue, 2)
        large, small = enter(queue, 4), enter(queue, 1)
        assert queue.leave(two, 1) == []  # 6 run and 4 more do not fit, so the request for 1 waits behind them
        assert queue.leave(six, 2) == [large, small]

    def test_the_next_requests_start_when_the_one_before_them_stops_waiting(self) -> None:
        queue = queue_of(8, 8)
        enter(queue, 6)
        large, small = enter(queue, 4), enter(queue, 2)
        assert queue.leave(large, 1) == [small]
        assert (queue.running_candidates, queue.queued_candidates) == (8, 0)

    def test_a_request_beyond_the_limit_of_waiting_candidates_is_refused(self) -> None:
        queue = queue_of(8, 4)
        enter(queue, 8)
        enter(queue, 3)
        with pytest.raises(OverloadedError):
            enter(queue, 2)
        enter(queue, 1)
        assert queue.queued_candidates == 4

    def test_a_request_beyond_the_limit_of_waiting_tokens_is_refused(self) -> None:
        queue = queue_of(8, 8, tokens=100)
        enter(queue, 8, tokens=5000)  # the tokens of running requests do not count
        enter(queue, 1, tokens=60)
        with pytest.raises(OverloadedError):
            enter(queue, 1, tokens=41)
        enter(queue, 1, tokens=40)
        assert queue.queued_tokens == 100

    def test_a_request_over_every_limit_is_served_when_it_is_alone(self) -> None:
        queue = queue_of(8, 4, tokens=100)
        huge = enter(queue, 20)
        assert huge.started_s == 0
        next_huge = enter(queue, 20, tokens=1000)  # no other request waits
        assert queue.leave(huge, 1) == [next_huge]

    def test_with_a_queue_of_zero_no_request_waits(self) -> None:
        queue = queue_of(8, 0)
        enter(queue, 8)
        with pytest.raises(OverloadedError):
            enter(queue, 1)

    def test_retry_after_is_the_queue_over_the_drain_rate(self) -> None:
        queue = queue_of(8, 4)
        measured = enter(queue, 8, now_s=0)
        queue.leave(measured, now_s=4)  # a request takes 4 s, so 8 running candidates drain at 2 a second
        enter(queue, 8, now_s=10)
        enter(queue, 4, now_s=10)
        with pytest.raises(OverloadedError) as shed:
            enter(queue, 2, now_s=10)
        assert shed.value.retry_after_s == pytest.approx((4 + 2) / 2)

    def test_the_newest_request_moves_the_mean_service_time_by_a_tenth(self) -> None:
        queue = queue_of(1, 0)
        for service_s in (10, 20):
            queue.leave(enter(queue, 1, now_s=0), now_s=service_s)
        enter(queue, 1)  # mean 10 + 0.1 * (20 - 10) = 11
        with pytest.raises(OverloadedError) as shed:
            enter(queue, 1)
        assert shed.value.retry_after_s == pytest.approx(11)

    @pytest.mark.parametrize(("service_s", "retry_after_s"), [(None, 1), (0.01, 1), (1000, 60)])
    def test_retry_after_is_between_a_second_and_a_minute(self, service_s: float | None, retry_after_s: float) -> None:
        queue = queue_of(1, 0)
        if service_s is not None:
            queue.leave(enter(queue, 1, now_s=0), now_s=service_s)
        enter(queue, 1)
        with pytest.raises(OverloadedError) as shed:
            enter(queue, 1)
        assert shed.value.retry_after_s == retry_after_s


@dataclass
class Load:
    """The outcome of requests that arrive at Poisson times, in simulated time."""

    latencies_s: list[float]
    num_shed: int
    max_queued: int

    @property
    def p95_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=20)[-1]


def simulate(
    limits: Limits, rate_per_s: float, num_requests: int = 5000, best_of: int = 4, service_s: float = 2.0
) -> Load:
    """Every request runs for `service_s` once it has started, as in an engine that is not overloaded."""
    random_arrivals, queue = random.Random(0), AdmissionQueue(limits)
    arrivals_s: dict[Ticket, float] = {}
    leaving: list[tuple[float, int, Ticket]] = []
    load = Load([], 0, 0)
    now_s, tie = 0.0, itertools.count()

    def leave_until(until_s: float) -> None:
        while leaving and leaving[0][0] <= until_s:
            at_s, _, ticket = heapq.heappop(leaving)
            load.latencies_s.append(at_s - arrivals_s.pop(ticket))
            for started in queue.leave(ticket, at_s):
                heapq.heappush(leaving, (at_s + service_s, next(tie), started))

    for _ in range(num_requests):
        now_s += random_arrivals.expovariate(rate_per_s)
        leave_until(now_s)
        ticket = Ticket(best_of, tokens=best_of * 10)
        try:
            queue.enter(ticket, now_s)
        except OverloadedError:
            load.num_shed += 1
            continue
        arrivals_s[ticket] = now_s
        load.max_queued = max(load.max_queued, queue.queued_candidates)
        if ticket.started_s is not None:
            heapq.heappush(leaving, (now_s + service_s, next(tie), ticket))
    leave_until(math.inf)
    assert not arrivals_s
    assert (queue.running_candidates, queue.queued_candidates, queue.queued_tokens) == (0, 0, 0)
    return load


def test_at_ten_times_capacity_admitted_requests_wait_no_longer_than_the_queue_takes_to_drain() -> None:
    """32 candidates at once, 4 a request, 2 s each: the capacity is 8 requests in 2 s; 16 candidates drain in 1 s."""
    limits = Limits.of(Settings(max_num_seqs=32))
    capacity, tenfold = simulate(limits, rate_per_s=4), simulate(limits, rate_per_s=40)
    assert max(tenfold.latencies_s) <= 2 + 2  # no request waits longer than a whole service time
    assert tenfold.p95_s <= 2 * capacity.p95_s
    assert tenfold.num_shed == pytest.approx(0.9 * 5000, rel=0.05)  # nine tenths of the requests exceed the capacity
    assert tenfold.max_queued == 16


@pytest.mark.parametrize(
    ("max_tokens", "best_of", "tokens"),
    [(10, 4, 2 + 40), (None, 2, 2 + 2 * ASSUMED_MAX_TOKENS)],
)
def test_the_estimate_is_the_prompt_once_and_max_tokens_for_each_candidate(
    max_tokens: int | None, best_of: int, tokens: int
) -> None:
    prompt = Prompt(messages=(Message("user", "12345"),))  # 5 characters: 2 tokens, rounded up
    assert requested_tokens(BestOfNRequest(prompt, SamplingParams(max_tokens=max_tokens), best_of)) == tokens


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"max_num_seqs": 32}, Limits(32, 16, 16 * 2048)),
        ({"max_running_candidates": 10, "max_queued_candidates": 0}, Limits(10, 0, 0)),
        ({"max_queued_candidates": 3, "max_queued_tokens": 7}, Limits(128, 3, 7)),
    ],
)
def test_the_limits_come_from_the_settings(settings: dict[str, Any], limits: Limits) -> None:
    assert Limits.of(Settings(**settings)) == limits


class TestAdmission:
    async def test_requests_are_admitted_in_the_order_of_arrival_and_the_gauges_follow(self) -> None:
        metrics, order = Metrics(), list[str]()
        admission = Admission(Limits(1, 2, NO_TOKEN_LIMIT), metrics)

        async def request(name: str) -> None:
            async with admission.admitted(1, tokens=5):
                order.append(name)

        async with admission.admitted(1, tokens=5):
            requests = [asyncio.create_task(request(name)) for name in "ab"]
            await wait_until(lambda: gauge(metrics, "nbest_queued_candidates") == 2)
            assert gauge(metrics, "nbest_queued_tokens") == 10
            assert order == []
        await asyncio.gather(*requests)
        assert order == ["a", "b"]
        assert gauge(metrics, "nbest_admitted_candidates") == gauge(metrics, "nbest_queued_candidates") == 0

    async def test_a_request_cancelled_just_as_it_is_admitted_lets_the_next_one_start(self) -> None:
        admission = Admission(Limits(1, 2, NO_TOKEN_LIMIT), Metrics())

        async def request() -> None:
            async with admission.admitted(1, tokens=1):
                pass

        async with admission.admitted(1, tokens=1):
            first, second = asyncio.create_task(request()), asyncio.create_task(request())
            await asyncio.sleep(0)
            first.cancel()  # leaving the block admits the first request before its cancellation is delivered
        await second
        assert first.cancelled()

    async def test_the_deadline_runs_while_a_request_waits(self) -> None:
        admission = Admission(Limits(1, 2, NO_TOKEN_LIMIT), Metrics())
        async with admission.admitted(1, tokens=1):
            with pytest.raises(DeadlineError, match=r"deadline_s=0\.01"):
                async with admission.admitted(1, tokens=1, deadline_s=0.01):
                    raise AssertionError("it was admitted")


def gauge(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name)


async def wait_until(holds: Callable[[], bool]) -> None:
    """Lets the other tasks run until the condition holds."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # the gauges have no event for their changes
            await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_over_capacity_is_429_with_a_retry_after(stream: bool) -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s=dict.fromkeys(range(4), 60))
    app = app_over(pipeline(generator), metrics, max_running_candidates=4, max_queued_candidates=4)
    async with client_of(app) as client:
        first, second = (asyncio.create_task(client.post(CHAT, json=HELLO | {"best_of": 4})) for _ in range(2))
        await wait_until(lambda: gauge(metrics, "nbest_queued_candidates") == 4)
        reply = await client.post(CHAT, json=HELLO | {"best_of": 4, "stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
        assert reply.headers["Retry-After"] == "1"  # nothing has been measured yet
        scoring = await client.post("/v1/score", json={"prompt": "x", "candidates": ["y"]})
        assert scoring.status_code == 429
        assert (await client.get("/ready")).status_code == 200
        assert metrics.registry.get_sample_value("nbest_shed_total", {"reason": "queue"}) == 2
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


async def test_the_wait_for_admission_is_part_of_the_queue_time_and_of_the_deadline() -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s={0: 0.2})
    app = app_over(pipeline(generator), metrics, max_running_candidates=1, max_queued_candidates=2)
    async with client_of(app) as client:
        body = HELLO | {"best_of": 1}
        first = asyncio.create_task(client.post(CHAT, json=body))
        await wait_until(lambda: gauge(metrics, "nbest_admitted_candidates") == 1)
        second = asyncio.create_task(client.post(CHAT, json=body))
        hasty = await client.post(CHAT, json=body | {"nbest": {"deadline_s": 0.01}})
        timings = [(await task).json()["nbest"]["timings_s"] for task in (first, second)]
    assert (hasty.status_code, hasty.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert timings[0]["queue"] < timings[1]["queue"]
    assert timings[1]["queue"] >= 0.1
    assert timings[1]["total"] >= timings[1]["queue"] + timings[1]["generate"]


async def test_a_client_that_disconnects_while_queued_leaves_the_queue() -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s={0: 60})
    app = app_over(pipeline(generator), metrics, max_running_candidates=1, max_queued_candidates=2)
    async with address_of(app) as address, httpx.AsyncClient(base_url=address) as client:
        tasks = [asyncio.create_task(client.post(CHAT, json=HELLO | {"best_of": 1})) for _ in range(2)]
        await wait_until(lambda: gauge(metrics, "nbest_queued_candidates") == 1)
        for task in reversed(tasks):
            task.cancel()
        await wait_until(lambda: not gauge(metrics, "nbest_queued_candidates"))
        await wait_until(lambda: not gauge(metrics, "nbest_admitted_candidates"))
    assert len(generator.calls) == 1


async def test_the_official_client_waits_for_retry_after_and_is_then_served() -> None:
    """Without the header it would retry after half a second, which is too early."""
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s={0: 0.9})
    app = app_over(pipeline(generator, ScriptedScorer()), metrics, max_running_candidates=1, max_queued_candidates=0)
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=1) as client,
    ):
        answers = await asyncio.gather(
            *(client.completions.create(model="scripted", prompt="x", best_of=1) for _ in range(2))
        )
    assert [answer.choices[0].text for answer in answers] == ["word", "word"]
    assert metrics.registry.get_sample_value("nbest_shed_total", {"reason": "queue"}) == 1


def test_routers_on_ray_share_the_capacity_of_all_engines() -> None:
    """At most 3 engines of 10 candidates, at least 2 routers: 15 each."""
    settings = Settings(ray=True, max_num_seqs=10, generator_replicas="1-3", router_replicas="2-5")
    assert Limits.of(settings).running_candidates == 15
