"""Faults of a cluster, each under twenty requests of which none may be lost: replicas killed, nodes removed.

A real cluster of several nodes on this machine; generators and scorers are scripted, and wait at a gate that the
tests open, so that every fault meets its requests in the midst of their work, however slow the machine is.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray

from server.config import Settings
from server.distributed import deployments
from tests.support.gated import Gate, started_generator, started_scorers
from tests.support.ray_nodes import PATIENCE_S, Nodes
from tests.support.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

TOGETHER = 20
SETTINGS = Settings(ray=True, generator_replicas="2", generator_cpus=2, scorer_replicas="2", scorer_cpus=0.5)
BODY = {"model": "scripted", "prompt": "Well?", "best_of": 2}


class Faulty:
    """The running server, its nodes and the gate."""

    def __init__(self, url: str, nodes: Nodes, gate: Any) -> None:
        self.url = url
        self.nodes = nodes
        self._gate = gate

    def close(self, place: str) -> None:
        ray.get(self._gate.set_closed.remote(place, True))

    def open(self, place: str) -> None:
        ray.get(self._gate.set_closed.remote(place, False))

    async def waiting(self, place: str, count: int) -> list[int]:
        async with asyncio.timeout(PATIENCE_S):
            pids: list[int] = await self._gate.waiting.remote(place, count)
            return pids

    async def ask(self) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=3 * PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(TOGETHER)))

    def has_status(self, path: str, status: int) -> bool:
        return httpx.get(self.url + path, timeout=PATIENCE_S).status_code == status

    async def until_status(self, path: str, status: int) -> None:
        assert await asyncio.to_thread(eventually, lambda: self.has_status(path, status), PATIENCE_S)


@pytest.fixture(scope="module")
def faulty() -> Iterator[Faulty]:
    """Scorers, router and gate on the head node, a generator on each of two others."""
    application = deployments.application(SETTINGS, started_generator, started_scorers)
    with Nodes.joined(SETTINGS) as nodes:
        gate = Gate.start()
        ray.get(gate.set_closed.remote("death", True))
        with nodes.serving(application, SETTINGS) as url:
            faulty = Faulty(url, nodes, gate)
            asyncio.run(faulty.until_status("/ready", 200))
            yield faulty


def all_answered(replies: list[httpx.Response]) -> None:
    """With both candidates, scored: of the two texts the longer wins."""
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == "great fun"
        assert reply.json()["nbest"]["completed"] == 2
        assert reply.json()["nbest"]["ranked_by"] == "reward"


async def test_one_of_two_generator_replicas_is_killed(faulty: Faulty) -> None:
    faulty.close("generator")
    asking = asyncio.create_task(faulty.ask())
    pids = await faulty.waiting("generator", 2 * TOGETHER)
    assert len(set(pids)) == 2
    os.kill(pids[0], signal.SIGKILL)
    faulty.open("generator")
    all_answered(await asking)


async def test_all_generator_replicas_are_killed(faulty: Faulty) -> None:
    await unready_meanwhile(faulty, "generator", 2 * TOGETHER)


async def test_the_engines_of_all_replicas_die(faulty: Faulty) -> None:
    faulty.close("generator")
    asking = asyncio.create_task(faulty.ask())
    await faulty.waiting("generator", 2 * TOGETHER)
    faulty.close("start")
    faulty.open("death")
    await faulty.until_status("/ready", 503)
    await faulty.until_status("/health", 200)
    faulty.close("death")
    faulty.open("generator")
    faulty.open("start")
    await faulty.until_status("/ready", 200)
    all_answered(await asking)


async def test_one_of_two_scorer_replicas_is_killed(faulty: Faulty) -> None:
    faulty.close("scorer")
    asking = asyncio.create_task(faulty.ask())
    pids = await faulty.waiting("scorer", TOGETHER)
    os.kill(pids[0], signal.SIGKILL)
    faulty.open("scorer")
    all_answered(await asking)


async def test_all_scorer_replicas_are_killed(faulty: Faulty) -> None:
    await unready_meanwhile(faulty, "scorer", TOGETHER)


async def unready_meanwhile(faulty: Faulty, place: str, count: int) -> None:
    """All replicas there die under their requests, and none can start until `/ready` has said so."""
    faulty.close(place)
    asking = asyncio.create_task(faulty.ask())
    pids = set(await faulty.waiting(place, count))
    faulty.close("start")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    faulty.open(place)
    await faulty.until_status("/ready", 503)
    await faulty.until_status("/health", 200)
    faulty.open("start")
    await faulty.until_status("/ready", 200)
    all_answered(await asking)


async def test_one_of_two_worker_nodes_is_removed(faulty: Faulty) -> None:
    faulty.close("generator")
    asking = asyncio.create_task(faulty.ask())
    pids = await faulty.waiting("generator", 2 * TOGETHER)
    faulty.nodes.remove_that_of(pids[0])
    faulty.open("generator")
    all_answered(await asking)


async def test_the_last_worker_node_is_removed_and_another_one_joins(faulty: Faulty) -> None:
    faulty.close("generator")
    asking = asyncio.create_task(faulty.ask())
    pids = await faulty.waiting("generator", 2 * TOGETHER)
    faulty.nodes.remove_that_of(pids[0])
    faulty.open("generator")
    await faulty.until_status("/ready", 503)
    await faulty.until_status("/health", 200)
    faulty.nodes.add()
    await faulty.until_status("/ready", 200)
    all_answered(await asking)
