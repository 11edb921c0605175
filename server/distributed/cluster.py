"""Runs the three deployments on Ray until a signal ends them: the counterpart of `server.launch`.

Or those of generator and scorer alone, under a pipeline in this process: that of `server.factory`.

Without an address a Ray cluster of this machine alone is started below this process and ends with it. With one the
application joins a cluster that is there, and is all that is taken away again.

Nothing is heard of Ray but its errors, nothing is reported to its makers, and there is no dashboard.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from rich.console import Console

from server import factory
from server.config import ConfigError, Settings
from server.distributed import deployments
from server.launch import address_of, invitation, kill_children, listen, prepared_console, warn_if_open_to_all
from server.pipeline.best_of_n import BestOfN

NAME_WITHOUT_ROUTER = "nbest-models"
OBJECT_STORE_BYTES = 200 << 20
"""Far more than the messages between the deployments take; Ray would set a third of the memory aside."""


class _Signalled(BaseException):
    """A signal has come: whatever is being done is left, and everything is closed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


def serve(settings: Settings, console: Console) -> None:
    """Serves until a signal ends it; Ctrl-C comes out as KeyboardInterrupt after everything is closed.

    Raises:
        ConfigError: the address cannot be listened on, the settings do not fit Ray, or the cluster cannot be joined.
        StartError: a replica did not come up.
    """
    console = prepared_console(settings, console)
    with listen(settings.host, settings.port) as listener:  # a port in use is told before anything is started
        port, url = listener.getsockname()[1], f"http://{address_of(listener)}"
        warn_if_open_to_all(settings, listener, console)
    application = deployments.application(settings)
    begun_s = time.perf_counter()
    loading = f"Starting generator, scorer and router on Ray, loading {settings.model} …"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_rays_news(settings))
            with console.status(loading):
                if not console.is_terminal:
                    console.print(loading)
                stack.enter_context(joined_cluster(settings))
                signal_handlers(_raise_signalled)  # Ray has its own for SIGTERM
                stack.enter_context(deployments.deployed(application, settings, port))
            console.print(f"Ready after {time.perf_counter() - begun_s:.0f} s.\n{invitation(settings, url)}")
            while True:
                signal.pause()
    except _Signalled as signalled:
        if signalled.number == signal.SIGINT:
            raise KeyboardInterrupt from None


@contextlib.asynccontextmanager
async def started(settings: Settings, *, tempered_logprobs: bool = False) -> AsyncIterator[BestOfN]:
    """Generators and scorers as replicas, and the pipeline over them in this process, until the block is left.

    For `tempered_logprobs` see `server.generation.vllm_engine.VllmGenerator.create`.

    Raises:
        ConfigError: the cluster cannot be joined, or already has them.
        StartError: a replica did not come up.
    """
    start_generator = partial(factory.started_generator, tempered_logprobs=tempered_logprobs)
    models = deployments.application_without_router(settings, start_generator, factory.started_scorers)
    async with in_thread(_deployed_without_router(models, settings)):
        yield await deployments.connected(*deployments.handles(NAME_WITHOUT_ROUTER))


@contextlib.contextmanager
def _deployed_without_router(models: Any, settings: Settings) -> Iterator[None]:
    with (
        _without_rays_news(settings),
        joined_cluster(settings),
        deployments.deployed(models, settings, None, name=NAME_WITHOUT_ROUTER),
    ):
        yield


@contextlib.contextmanager
def _without_rays_news(settings: Settings) -> Iterator[None]:
    """Ray tells its news on stdout, where what runs on it says nothing."""
    if _verbose(settings):
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.asynccontextmanager
async def in_thread(blocking: contextlib.AbstractContextManager[None]) -> AsyncIterator[None]:
    """Enters and leaves it in another thread, where Ray leaves the signals to us, and the loop goes on meanwhile."""
    entering = asyncio.ensure_future(asyncio.to_thread(blocking.__enter__))
    try:
        await asyncio.shield(entering)  # a thread cannot be cancelled
        yield
    finally:
        await asyncio.wait([entering])
        if entering.exception() is None:
            await asyncio.to_thread(blocking.__exit__, None, None, None)


@contextlib.contextmanager
def joined_cluster(settings: Settings) -> Iterator[None]:
    """Makes this process a driver of the cluster of the settings; where they name none, of one that is made here.

    Raises:
        ConfigError: there is no cluster at that address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of its own default
    verbose = _verbose(settings)
    quiet: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    try:
        if settings.ray_address is not None:
            ray.init(settings.ray_address, **quiet)
        else:
            _start_cluster(settings, quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"No Ray cluster answers at {settings.ray_address}: {error}; correct --ray-address, or leave it out to "
            "start one on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
        kill_children()


def _start_cluster(settings: Settings, quiet: dict[str, Any]) -> None:
    """A cluster of this machine, with as many cores as the replicas reserve: they share what there is."""
    cores = os.cpu_count() or 1
    reserved = math.ceil(deployments.reserved_cpus(settings))
    # By default each replica computes with as many threads as it reserves cores, which is for machines that are shared.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    # The machine is the server's own: its replicas do not stand back behind other processes, and the proxy is not taken
    # for dead when for some seconds models that load leave it no core.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    ray.init(num_cpus=max(cores, reserved), include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _verbose(settings: Settings) -> bool:
    return settings.log_level in ("debug", "info")


def signal_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _raise_signalled(number: int, _: FrameType | None) -> None:
    signal_handlers(_end_at_once)  # a second signal does not wait for anything
    raise _Signalled(number)


def _end_at_once(number: int, _: FrameType | None) -> None:
    kill_children()
    os._exit(128 + number)
