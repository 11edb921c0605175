"""A Ray cluster of several nodes on this machine, which a test or a benchmark can take away one by one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import psutil
from ray import serve
from ray.cluster_utils import Cluster

from server.config import Settings, replica_range
from server.distributed import deployments
from server.distributed.cluster import joined_cluster
from server.launch import listen
from tests.support.waiting import eventually

PATIENCE_S = 60


class Nodes:
    """A head with room for the scorers alone, and worker nodes with room for one generator each."""

    def __init__(self, settings: Settings) -> None:
        self._node_cpus = settings.generator_cpus
        scorers = replica_range(settings.scorer_replicas)[1] * settings.scorer_cpus
        assert scorers < settings.generator_cpus, "a generator would find its place on the head"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": scorers, "include_dashboard": False},
            shutdown_at_exit=False,  # that would need the main thread for every node, and `joined` ends them
        )

    @classmethod
    @contextmanager
    def joined(cls, settings: Settings) -> Iterator[Self]:
        """Only the head, of whose cluster this process is a driver until the block is left."""
        nodes = cls(settings)
        try:
            with joined_cluster(Settings(ray=True, ray_address=nodes._cluster.address)):
                yield nodes
        finally:
            nodes._cluster.shutdown()

    @contextmanager
    def serving(self, application: object, settings: Settings) -> Iterator[str]:
        """The application's address. A node for each generator is added once scorers and router have found a place."""
        with listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as thread:
            adding = thread.submit(self._add_nodes, settings)
            with deployments.deployed(application, settings, port):
                adding.result()
                yield f"http://127.0.0.1:{port}"

    def _add_nodes(self, settings: Settings) -> None:
        assert eventually(lambda: {deployments.SCORER, deployments.ROUTER} <= self._healthy(), 2 * PATIENCE_S)
        for _ in range(replica_range(settings.generator_replicas)[1]):
            self.add()

    def _healthy(self) -> set[str]:
        found = serve.status().applications.get(deployments.APP_NAME)
        return {name for name, one in found.deployments.items() if one.status == "HEALTHY"} if found else set()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=self._node_cpus)

    def remove_that_of(self, pid: int) -> None:
        """Kills the node whose raylet has started this process, with all that runs there.

        At once, as when a machine loses its power: workers alone would notice a raylet's end seconds later, and go on
        taking requests until then.
        """
        raylet = psutil.Process(psutil.Process(pid).ppid())
        pid_of = {one: one.all_processes["raylet"][0].process.pid for one in self._cluster.worker_nodes}
        (node,) = [one for one, found in pid_of.items() if found == raylet.pid]
        workers = raylet.children(recursive=True)
        for process in (raylet, *workers):
            process.kill()
        psutil.wait_procs(workers, PATIENCE_S)
        self._cluster.remove_node(node, allow_graceful=False)
