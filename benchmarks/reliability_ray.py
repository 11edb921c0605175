"""Outcomes of requests on Ray when a replica or a node is lost: the Ray rows of docs/reliability.md.

Generator, scorer and router run with the default models on a Ray cluster of two nodes on this machine: the head, and a
worker node that runs the generator alone. There is one replica of each, so after a loss no other replica can answer.
Faults, each with 20 requests in flight:

- engine: the process of the generator's engine is killed;
- generator: the process of the generator's replica is killed, and its engine with it;
- scorer: the process of the scorer's replica is killed;
- node: the worker node is killed, and another node joins.

    python -m benchmarks.reliability_ray [engine] [generator] [scorer] [node]

Writes benchmarks/results/reliability_ray.json; faults that are not named keep their figures there.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil

from benchmarks.provenance import RESULTS, provenance
from benchmarks.reliability import TOGETHER, WORK, counted, send_all
from benchmarks.stats import write_result
from server.config import Settings
from server.distributed.deployments import application
from tests.end_to_end.served import START_TIMEOUT_S, candidates_in_flight, is_ready
from tests.support.ray_nodes import RayNodes
from tests.support.waiting import eventually

SETTINGS = Settings(ray=True, max_model_len=1024, kv_cache_gib=1, generator_cpus=2, scorer_cpus=1)
ENGINE, GENERATOR, SCORER = "VLLM::EngineCore", "ray::ServeReplica:nbest:generator", "ray::ServeReplica:nbest:scorer"


def process_of(name: str) -> psutil.Process:
    """The descendant of this process with that name; there must be exactly one."""
    processes = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name() == name:
                processes.append(child)
    (process,) = processes
    return process


def replace_node(nodes: RayNodes) -> None:
    nodes.kill_node_of(process_of(GENERATOR).pid)
    nodes.add()


FAULTS: dict[str, Callable[[RayNodes], None]] = {
    "engine": lambda _: process_of(ENGINE).kill(),
    "generator": lambda _: process_of(GENERATOR).kill(),
    "scorer": lambda _: process_of(SCORER).kill(),
    "node": replace_node,
}


def lost(url: str, nodes: RayNodes, fault: str) -> dict[str, Any]:
    """Causes the fault with requests in flight; returns their statuses and the seconds until `/ready` is 200 again."""
    with ThreadPoolExecutor(1) as load:
        replies = load.submit(asyncio.run, send_all(url, [WORK] * TOGETHER, START_TIMEOUT_S))
        assert eventually(lambda: candidates_in_flight(url) > TOGETHER, 60)
        FAULTS[fault](nodes)
        killed_s = time.perf_counter()
        assert eventually(lambda: not is_ready(url), 60)
        healthy = httpx.get(f"{url}/health", timeout=30).is_success
        assert eventually(lambda: is_ready(url), START_TIMEOUT_S)
        recovery_s = time.perf_counter() - killed_s
        statuses = replies.result()
    return {
        "in_flight": TOGETHER,
        "statuses": counted(statuses),
        "lost": sum(status not in {200, 503} for status in statuses),
        "recovery_s": recovery_s,
        "health_stayed_up": healthy,
        "in_flight_after": candidates_in_flight(url),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help=f"{', '.join(FAULTS)}; default: all of them")
    flags = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # as on a cluster that the server starts itself
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers would lose the cores to other programs otherwise
    path = RESULTS / "reliability_ray.json"
    faults = json.loads(path.read_text())["faults"] if path.exists() else {}
    with RayNodes.joined(SETTINGS) as nodes, nodes.serving(application(SETTINGS), SETTINGS) as url:
        assert eventually(lambda: is_ready(url), START_TIMEOUT_S)
        for fault in flags.faults or FAULTS:
            faults[fault] = lost(url, nodes, fault) | {"provenance": provenance(flags=vars(flags))}
            write_result("reliability_ray", {"faults": faults, "provenance": provenance(flags=vars(flags))})


if __name__ == "__main__":
    main()
