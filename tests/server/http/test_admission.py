"""Who starts, who waits, who is sent away and for how long; the numbers are worked by hand."""

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
ROOMY_TOKENS = 10**9


def line(running: int, queued: int, tokens: int = ROOMY_TOKENS) -> AdmissionQueue:
    return AdmissionQueue(Limits(running, queued, tokens))


def entered(line: AdmissionQueue, candidates: int, tokens: int = 0, now_s: float = 0) -> Ticket:
    ticket = Ticket(candidates, tokens)
    line.enter(ticket, now_s)
    return ticket


class TestLine:
    def test_candidates_run_until_the_limit_and_the_next_wait(self) -> None:
        eight = line(8, 4)
        first, second, third = (entered(eight, 4) for _ in range(3))
        assert (first.started_s, second.started_s, third.started_s) == (0, 0, None)
        assert (eight.running_candidates, eight.queued_candidates) == (8, 4)

    def test_those_who_wait_start_in_order_when_there_is_room(self) -> None:
        eight = line(8, 8)
        running = entered(eight, 8)
        four, six, two = (entered(eight, n) for n in (4, 2, 2))
        assert eight.leave(running, now_s=3) == [four, six, two]
        assert four.started_s == 3

    def test_a_small_request_does_not_overtake_a_large_one(self) -> None:
        eight = line(8, 8)
        six, two = entered(eight, 6), entered(eight, 2)
        large, small = entered(eight, 4), entered(eight, 1)
        assert eight.leave(two, 1) == []  # 6 run, 4 do not fit, and 1 stays behind them
        assert eight.leave(six, 2) == [large, small]

    def test_one_that_gives_up_waiting_lets_the_next_ones_through(self) -> None:
        eight = line(8, 8)
        entered(eight, 6)
        large, small = entered(eight, 4), entered(eight, 2)
        assert eight.leave(large, 1) == [small]
        assert (eight.running_candidates, eight.queued_candidates) == (8, 0)

    def test_no_more_wait_than_may(self) -> None:
        eight = line(8, 4)
        entered(eight, 8)
        entered(eight, 3)
        with pytest.raises(OverloadedError):
            entered(eight, 2)
        entered(eight, 1)
        assert eight.queued_candidates == 4

    def test_waiting_is_counted_in_tokens_too(self) -> None:
        eight = line(8, 8, tokens=100)
        entered(eight, 8, tokens=5000)  # running ones are not counted
        entered(eight, 1, tokens=60)
        with pytest.raises(OverloadedError):
            entered(eight, 1, tokens=41)
        entered(eight, 1, tokens=40)
        assert eight.queued_tokens == 100

    def test_a_request_over_every_limit_is_served_when_it_is_alone(self) -> None:
        eight = line(8, 4, tokens=100)
        huge = entered(eight, 20)
        assert huge.started_s == 0
        next_huge = entered(eight, 20, tokens=1000)  # nobody waits
        assert eight.leave(huge, 1) == [next_huge]

    def test_without_a_queue_nobody_waits(self) -> None:
        eight = line(8, 0)
        entered(eight, 8)
        with pytest.raises(OverloadedError):
            entered(eight, 1)

    def test_the_time_to_come_back_is_the_queue_over_the_drain_rate(self) -> None:
        eight = line(8, 4)
        taught = entered(eight, 8, now_s=0)
        eight.leave(taught, now_s=4)  # a request takes 4 s, so 8 running candidates drain at 2 a second
        entered(eight, 8, now_s=10)
        entered(eight, 4, now_s=10)
        with pytest.raises(OverloadedError) as shed:
            entered(eight, 2, now_s=10)
        assert shed.value.retry_after_s == pytest.approx((4 + 2) / 2)

    def test_the_newest_request_moves_the_mean_by_a_tenth(self) -> None:
        one = line(1, 0)
        for service_s in (10, 20):
            one.leave(entered(one, 1, now_s=0), now_s=service_s)
        entered(one, 1)  # mean 10 + 0.1 * (20 - 10) = 11
        with pytest.raises(OverloadedError) as shed:
            entered(one, 1)
        assert shed.value.retry_after_s == pytest.approx(11)

    @pytest.mark.parametrize(("service_s", "told_s"), [(None, 1), (0.01, 1), (1000, 60)])
    def test_the_time_to_come_back_stays_within_what_clients_honour(
        self, service_s: float | None, told_s: float
    ) -> None:
        one = line(1, 0)
        if service_s is not None:
            one.leave(entered(one, 1, now_s=0), now_s=service_s)
        entered(one, 1)
        with pytest.raises(OverloadedError) as shed:
            entered(one, 1)
        assert shed.value.retry_after_s == told_s


@dataclass
class Rush:
    """What became of requests at Poisson times, in simulated time."""

    latencies_s: list[float]
    num_shed: int
    most_queued: int

    @property
    def p95_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=20)[-1]


def rush(limits: Limits, rate_per_s: float, num_requests: int = 5000, best_of: int = 4, service_s: float = 2.0) -> Rush:
    """Every request runs for `service_s` once it has started, as in an engine that is not overfilled."""
    clock, line = random.Random(0), AdmissionQueue(limits)
    arrivals_s: dict[Ticket, float] = {}
    leaving: list[tuple[float, int, Ticket]] = []
    outcome = Rush([], 0, 0)
    now_s, tie = 0.0, itertools.count()

    def leave_until(until_s: float) -> None:
        while leaving and leaving[0][0] <= until_s:
            at_s, _, ticket = heapq.heappop(leaving)
            outcome.latencies_s.append(at_s - arrivals_s.pop(ticket))
            for started in line.leave(ticket, at_s):
                heapq.heappush(leaving, (at_s + service_s, next(tie), started))

    for _ in range(num_requests):
        now_s += clock.expovariate(rate_per_s)
        leave_until(now_s)
        ticket = Ticket(best_of, tokens=best_of * 10)
        try:
            line.enter(ticket, now_s)
        except OverloadedError:
            outcome.num_shed += 1
            continue
        arrivals_s[ticket] = now_s
        outcome.most_queued = max(outcome.most_queued, line.queued_candidates)
        if ticket.started_s is not None:
            heapq.heappush(leaving, (now_s + service_s, next(tie), ticket))
    leave_until(math.inf)
    assert not arrivals_s
    assert (line.running_candidates, line.queued_candidates, line.queued_tokens) == (0, 0, 0)
    return outcome


def test_at_ten_times_capacity_the_admitted_wait_no_longer_than_the_queue_takes_to_drain() -> None:
    """32 candidates at once, 4 a request, 2 s each: 8 requests in 2 s are capacity; 16 candidates drain in 1 s."""
    limits = Limits.of(Settings(max_num_seqs=32))
    capacity, tenfold = rush(limits, rate_per_s=4), rush(limits, rate_per_s=40)
    assert max(tenfold.latencies_s) <= 2 + 2  # none waits longer than a whole service time
    assert tenfold.p95_s <= 2 * capacity.p95_s
    assert tenfold.num_shed == pytest.approx(0.9 * 5000, rel=0.05)  # nine tenths are too many
    assert tenfold.most_queued == 16


@pytest.mark.parametrize(
    ("max_tokens", "best_of", "tokens"),
    [(10, 4, 2 + 40), (None, 2, 2 + 2 * ASSUMED_MAX_TOKENS)],
)
def test_a_request_asks_for_its_prompt_once_and_max_tokens_a_candidate(
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
def test_limits_follow_from_the_settings(settings: dict[str, Any], limits: Limits) -> None:
    assert Limits.of(Settings(**settings)) == limits


class TestAdmission:
    async def test_turns_come_in_the_order_of_arrival_and_the_gauges_follow(self) -> None:
        metrics, order = Metrics(), list[str]()
        admission = Admission(Limits(1, 2, ROOMY_TOKENS), metrics)

        async def visit(name: str) -> None:
            async with admission.turn(1, tokens=5):
                order.append(name)

        async with admission.turn(1, tokens=5):
            visits = [asyncio.create_task(visit(name)) for name in "ab"]
            await settled(lambda: gauge(metrics, "nbest_queued_candidates") == 2)
            assert gauge(metrics, "nbest_queued_tokens") == 10
            assert order == []
        await asyncio.gather(*visits)
        assert order == ["a", "b"]
        assert gauge(metrics, "nbest_admitted_candidates") == gauge(metrics, "nbest_queued_candidates") == 0

    async def test_a_visitor_cancelled_just_as_its_turn_comes_frees_it_again(self) -> None:
        admission = Admission(Limits(1, 2, ROOMY_TOKENS), Metrics())

        async def visit() -> None:
            async with admission.turn(1, tokens=1):
                pass

        async with admission.turn(1, tokens=1):
            first, second = asyncio.create_task(visit()), asyncio.create_task(visit())
            await asyncio.sleep(0)
            first.cancel()  # and leaving the block gives it its turn before it hears of that
        await second
        assert first.cancelled()

    async def test_the_deadline_runs_while_waiting(self) -> None:
        admission = Admission(Limits(1, 2, ROOMY_TOKENS), Metrics())
        async with admission.turn(1, tokens=1):
            with pytest.raises(DeadlineError, match=r"deadline_s=0\.01"):
                async with admission.turn(1, tokens=1, deadline_s=0.01):
                    raise AssertionError("it was let in")


def gauge(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name)


async def settled(holds: Callable[[], bool]) -> None:
    """Gives the other tasks their turns until the condition holds."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # the gauges tell nobody when they move
            await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_over_capacity_is_429_with_the_time_to_come_back(stream: bool) -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s=dict.fromkeys(range(4), 60))
    app = app_over(pipeline(generator), metrics, max_running_candidates=4, max_queued_candidates=4)
    async with client_of(app) as client:
        first, second = (asyncio.create_task(client.post(CHAT, json=HELLO | {"best_of": 4})) for _ in range(2))
        await settled(lambda: gauge(metrics, "nbest_queued_candidates") == 4)
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


async def test_the_wait_for_admission_is_told_as_queue_and_counts_towards_the_deadline() -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s={0: 0.2})
    app = app_over(pipeline(generator), metrics, max_running_candidates=1, max_queued_candidates=2)
    async with client_of(app) as client:
        body = HELLO | {"best_of": 1}
        first = asyncio.create_task(client.post(CHAT, json=body))
        await settled(lambda: gauge(metrics, "nbest_admitted_candidates") == 1)
        second = asyncio.create_task(client.post(CHAT, json=body))
        hasty = await client.post(CHAT, json=body | {"nbest": {"deadline_s": 0.01}})
        timings = [(await task).json()["nbest"]["timings_s"] for task in (first, second)]
    assert (hasty.status_code, hasty.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert timings[0]["queue"] < timings[1]["queue"]
    assert timings[1]["queue"] >= 0.1
    assert timings[1]["total"] >= timings[1]["queue"] + timings[1]["generate"]


async def test_a_client_that_hangs_up_in_the_queue_leaves_it() -> None:
    metrics = Metrics()
    generator = ScriptedGenerator(["word"], delays_s={0: 60})
    app = app_over(pipeline(generator), metrics, max_running_candidates=1, max_queued_candidates=2)
    async with address_of(app) as address, httpx.AsyncClient(base_url=address) as client:
        tasks = [asyncio.create_task(client.post(CHAT, json=HELLO | {"best_of": 1})) for _ in range(2)]
        await settled(lambda: gauge(metrics, "nbest_queued_candidates") == 1)
        for task in reversed(tasks):
            task.cancel()
        await settled(lambda: not gauge(metrics, "nbest_queued_candidates"))
        await settled(lambda: not gauge(metrics, "nbest_admitted_candidates"))
    assert len(generator.calls) == 1


async def test_the_official_client_comes_back_when_it_was_told_to_and_is_served() -> None:
    """Without the header it would ask again after half a second, and then, too early, again."""
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


def test_routers_on_ray_share_what_all_engines_take() -> None:
    """At most 3 engines of 10 candidates, at least 2 routers: 15 each."""
    settings = Settings(ray=True, max_num_seqs=10, generator_replicas="1-3", router_replicas="2-5")
    assert Limits.of(settings).running_candidates == 15
