"""A Ray cluster of several nodes on this machine, which a test or a benchmark can remove one by one."""

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

TIMEOUT_S = 60


class RayNodes:
    """A head node with cores for the scorers only, and worker nodes with cores for one generator each."""

    def __init__(self, settings: Settings) -> None:
        self._node_cpus = settings.generator_cpus
        scorers = replica_range(settings.scorer_replicas)[1] * settings.scorer_cpus
        assert scorers < settings.generator_cpus, "a generator would fit the head node"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": scorers, "include_dashboard": False},
            shutdown_at_exit=False,  # True would need the main thread for every node; `joined` shuts them down
        )

    @classmethod
    @contextmanager
    def joined(cls, settings: Settings) -> Iterator[Self]:
        """Starts the head node alone; this process is a driver of its cluster until the block is left."""
        nodes = cls(settings)
        try:
            with joined_cluster(Settings(ray=True, ray_address=nodes._cluster.address)):
                yield nodes
        finally:
            nodes._cluster.shutdown()

    @contextmanager
    def serving(self, application: object, settings: Settings) -> Iterator[str]:
        """Runs the application and yields its address; adds a node per generator once scorers and router run."""
        with listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as thread:
            addition = thread.submit(self._add_nodes, settings)
            with deployments.deployed(application, settings, port):
                addition.result()
                yield f"http://127.0.0.1:{port}"

    def _add_nodes(self, settings: Settings) -> None:
        assert eventually(lambda: {deployments.SCORER, deployments.ROUTER} <= self._healthy(), 2 * TIMEOUT_S)
        for _ in range(replica_range(settings.generator_replicas)[1]):
            self.add()

    def _healthy(self) -> set[str]:
        """The names of the deployments that are healthy."""
        application = serve.status().applications.get(deployments.APP_NAME)
        statuses = application.deployments.items() if application else ()
        return {name for name, status in statuses if status.status == "HEALTHY"}

    def add(self) -> None:
        """Adds a worker node."""
        self._cluster.add_node(num_cpus=self._node_cpus)

    def kill_node_of(self, pid: int) -> None:
        """Kills the node whose raylet has started this process, and every process that runs there.

        All die at once, as when a machine loses its power. Workers without their raylet would notice its end seconds
        later, and accept requests until then.
        """
        raylet = psutil.Process(psutil.Process(pid).ppid())
        raylet_pids = {node: node.all_processes["raylet"][0].process.pid for node in self._cluster.worker_nodes}
        (node,) = [node for node, raylet_pid in raylet_pids.items() if raylet_pid == raylet.pid]
        workers = raylet.children(recursive=True)
        for process in (raylet, *workers):
            process.kill()
        psutil.wait_procs(workers, TIMEOUT_S)
        self._cluster.remove_node(node, allow_graceful=False)
