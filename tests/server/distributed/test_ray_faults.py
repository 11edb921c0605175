"""Faults of a cluster during twenty running requests, none of which may be lost: replicas killed, nodes removed.

A real cluster of several nodes runs on this machine. Generators and scorers are scripted and pause until the test lets
them continue, so that every fault happens while its requests run, however slow the machine is.
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
from tests.support.pausable_replicas import PausePoints, started_generator, started_scorers
from tests.support.ray_nodes import TIMEOUT_S, RayNodes
from tests.support.waiting import eventually

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # warnings of Ray

NUM_REQUESTS = 20
SETTINGS = Settings(ray=True, generator_replicas="2", generator_cpus=2, scorer_replicas="2", scorer_cpus=0.5)
BODY = {"model": "scripted", "prompt": "Well?", "best_of": 2}


class PausableServer:
    """The running server, its nodes and its pause points."""

    def __init__(self, url: str, nodes: RayNodes, pause_points: Any) -> None:
        self.url = url
        self.nodes = nodes
        self._pause_points = pause_points

    def block(self, point: str) -> None:
        ray.get(self._pause_points.set_blocked.remote(point, True))

    def unblock(self, point: str) -> None:
        ray.get(self._pause_points.set_blocked.remote(point, False))

    async def waiting_pids(self, point: str, count: int) -> list[int]:
        async with asyncio.timeout(TIMEOUT_S):
            pids: list[int] = await self._pause_points.waiting_pids.remote(point, count)
            return pids

    async def complete_all(self) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=3 * TIMEOUT_S, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(NUM_REQUESTS)))

    def has_status(self, path: str, status: int) -> bool:
        return httpx.get(self.url + path, timeout=TIMEOUT_S).status_code == status

    async def until_status(self, path: str, status: int) -> None:
        assert await asyncio.to_thread(eventually, lambda: self.has_status(path, status), TIMEOUT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[PausableServer]:
    """Scorers, router and pause points on the head node, a generator on each of two others."""
    application = deployments.application(SETTINGS, started_generator, started_scorers)
    with RayNodes.joined(SETTINGS) as nodes:
        pause_points = PausePoints.start()
        ray.get(pause_points.set_blocked.remote("death", True))
        with nodes.serving(application, SETTINGS) as url:
            server = PausableServer(url, nodes, pause_points)
            asyncio.run(server.until_status("/ready", 200))
            yield server


def assert_all_answered(replies: list[httpx.Response]) -> None:
    """Every reply has both candidates and their rewards; the longer text wins."""
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == "great fun"
        assert reply.json()["nbest"]["completed"] == 2
        assert reply.json()["nbest"]["ranked_by"] == "reward"


async def test_one_of_two_generator_replicas_is_killed(server: PausableServer) -> None:
    server.block("generator")
    replies = asyncio.create_task(server.complete_all())
    pids = await server.waiting_pids("generator", 2 * NUM_REQUESTS)
    assert len(set(pids)) == 2
    os.kill(pids[0], signal.SIGKILL)
    server.unblock("generator")
    assert_all_answered(await replies)


async def test_all_generator_replicas_are_killed(server: PausableServer) -> None:
    await kill_all_replicas(server, "generator", 2 * NUM_REQUESTS)


async def test_the_engines_of_all_replicas_die(server: PausableServer) -> None:
    server.block("generator")
    replies = asyncio.create_task(server.complete_all())
    await server.waiting_pids("generator", 2 * NUM_REQUESTS)
    server.block("start")
    server.unblock("death")
    await server.until_status("/ready", 503)
    await server.until_status("/health", 200)
    server.block("death")
    server.unblock("generator")
    server.unblock("start")
    await server.until_status("/ready", 200)
    assert_all_answered(await replies)


async def test_one_of_two_scorer_replicas_is_killed(server: PausableServer) -> None:
    server.block("scorer")
    replies = asyncio.create_task(server.complete_all())
    pids = await server.waiting_pids("scorer", NUM_REQUESTS)
    os.kill(pids[0], signal.SIGKILL)
    server.unblock("scorer")
    assert_all_answered(await replies)


async def test_all_scorer_replicas_are_killed(server: PausableServer) -> None:
    await kill_all_replicas(server, "scorer", NUM_REQUESTS)


async def kill_all_replicas(server: PausableServer, point: str, count: int) -> None:
    """Kills all replicas that wait at the point; no other can start until `/ready` has returned 503."""
    server.block(point)
    replies = asyncio.create_task(server.complete_all())
    pids = set(await server.waiting_pids(point, count))
    server.block("start")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.unblock(point)
    await server.until_status("/ready", 503)
    await server.until_status("/health", 200)
    server.unblock("start")
    await server.until_status("/ready", 200)
    assert_all_answered(await replies)


async def test_one_of_two_worker_nodes_is_removed(server: PausableServer) -> None:
    server.block("generator")
    replies = asyncio.create_task(server.complete_all())
    pids = await server.waiting_pids("generator", 2 * NUM_REQUESTS)
    server.nodes.kill_node_of(pids[0])
    server.unblock("generator")
    assert_all_answered(await replies)


async def test_the_last_worker_node_is_removed_and_another_joins(server: PausableServer) -> None:
    server.block("generator")
    replies = asyncio.create_task(server.complete_all())
    pids = await server.waiting_pids("generator", 2 * NUM_REQUESTS)
    server.nodes.kill_node_of(pids[0])
    server.unblock("generator")
    await server.until_status("/ready", 503)
    await server.until_status("/health", 200)
    server.nodes.add()
    await server.until_status("/ready", 200)
    assert_all_answered(await replies)
