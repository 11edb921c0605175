"""Starts or joins a Ray cluster and runs the deployments on it.

`serve` runs all three until a signal ends them, as `server.launch` does in one process. `started` runs generator and
scorer alone for a pipeline in this process, as `server.factory.start` does in one process.

Without an address a Ray cluster on this machine starts as children of this process and ends with it. With an address
the application joins an existing cluster, and only the application is removed at the end.

Ray's output is suppressed except for errors, its usage statistics are off, and there is no dashboard.
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
from server.launch import address_of, configure_output, kill_children, listen, warn_without_keys, welcome
from server.pipeline.best_of_n import BestOfN

NAME_WITHOUT_ROUTER = "nbest-models"
OBJECT_STORE_BYTES = 200 << 20
"""Far more than the messages between the deployments need; Ray's default is a third of the memory."""


class _SignalReceived(BaseException):
    """Ends the running work when a signal arrives; the context managers on the way out close everything."""

    def __init__(self, number: int) -> None:
        self.number = number


def serve(settings: Settings, console: Console) -> None:
    """Serves until a signal ends it; Ctrl-C raises KeyboardInterrupt after everything is closed.

    Raises:
        ConfigError: the address cannot be bound, the settings do not fit Ray, or the cluster cannot be joined.
        StartError: a replica did not start.
    """
    console = configure_output(settings, console)
    with listen(settings.host, settings.port) as listener:  # a port in use is reported before anything is started
        port, url = listener.getsockname()[1], f"http://{address_of(listener)}"
        warn_without_keys(settings, listener, console)
    application = deployments.application(settings)
    started_s = time.perf_counter()
    loading = f"Starting generator, scorer and router on Ray, loading {settings.model} …"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ray_output_suppressed(settings))
            with console.status(loading):
                if not console.is_terminal:
                    console.print(loading)
                stack.enter_context(joined_cluster(settings))
                set_signal_handlers(_raise_signal_received)  # replaces Ray's own handler of SIGTERM
                stack.enter_context(deployments.deployed(application, settings, port))
            console.print(f"Ready after {time.perf_counter() - started_s:.0f} s.\n{welcome(settings, url)}")
            while True:
                signal.pause()
    except _SignalReceived as received:
        if received.number == signal.SIGINT:
            raise KeyboardInterrupt from None


@contextlib.asynccontextmanager
async def started(settings: Settings, *, tempered_logprobs: bool = False) -> AsyncIterator[BestOfN]:
    """Runs generators and scorers as replicas until the block is left, and yields their pipeline in this process.

    For `tempered_logprobs` see `server.generation.engine_arguments.EngineOptions`.

    Raises:
        ConfigError: the cluster cannot be joined, or already runs such an application.
        StartError: a replica did not start.
    """
    start_generator = partial(factory.started_generator, tempered_logprobs=tempered_logprobs)
    models = deployments.application_without_router(settings, start_generator, factory.started_scorers)
    async with entered_in_thread(_deployed_without_router(models, settings)):
        yield await deployments.connected(*deployments.handles(NAME_WITHOUT_ROUTER))


@contextlib.contextmanager
def _deployed_without_router(models: Any, settings: Settings) -> Iterator[None]:
    with (
        _ray_output_suppressed(settings),
        joined_cluster(settings),
        deployments.deployed(models, settings, None, name=NAME_WITHOUT_ROUTER),
    ):
        yield


@contextlib.contextmanager
def _ray_output_suppressed(settings: Settings) -> Iterator[None]:
    """Discards stdout, where only Ray writes, unless the log level is info or debug."""
    if _verbose(settings):
        yield
        return
    with Path(os.devnull).open("w") as devnull, contextlib.redirect_stdout(devnull):
        yield


@contextlib.asynccontextmanager
async def entered_in_thread(blocking: contextlib.AbstractContextManager[None]) -> AsyncIterator[None]:
    """Enters and leaves `blocking` in another thread.

    The event loop continues meanwhile, and Ray installs no signal handlers, which it does only in the main thread.
    """
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
    """Makes this process a driver of the cluster at `settings.ray_address`; with None, of a new cluster.

    Raises:
        ConfigError: no cluster answers at that address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns about its own default
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
    """Starts a cluster on this machine that declares the cores that the replicas reserve, even beyond the real ones."""
    cores = os.cpu_count() or 1
    reserved = math.ceil(deployments.reserved_cpus(settings))
    # By default each replica computes with as many threads as it reserves cores, which suits shared machines.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    # The server has the machine to itself: its replicas need no lower priority than other processes, and the proxy must
    # not be taken for dead when loading models leave it no core for some seconds.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    ray.init(num_cpus=max(cores, reserved), include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _verbose(settings: Settings) -> bool:
    return settings.log_level in ("debug", "info")


def set_signal_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _raise_signal_received(number: int, _: FrameType | None) -> None:
    set_signal_handlers(_exit_at_once)  # a second signal does not wait for anything
    raise _SignalReceived(number)


def _exit_at_once(number: int, _: FrameType | None) -> None:
    kill_children()
    os._exit(128 + number)
