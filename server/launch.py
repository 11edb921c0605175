"""Runs a server in this process: listens, loads the models, serves until a signal, and ends all child processes.

The port is opened before any model is loaded: a port in use is reported at once, and HTTP answers from the start. A
signal while models are loading ends all processes at once: there is no work to finish, and neither an import nor the
thread that waits for the engine could be interrupted otherwise. After loading, a signal lets the requests in flight
finish (server/http/graceful_shutdown.py) and then closes the engine.

Ctrl-C in a terminal sends SIGINT to every process of the server. The engine's processes must ignore it, or they would
end before the requests are finished. A process inherits the blocked signals of the thread that starts it, so the
threads that start the engine block SIGINT.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import psutil
import uvicorn
from rich.console import Console

from server import factory
from server.app import create_app
from server.config import ConfigError, Settings
from server.http.graceful_shutdown import DrainingServer
from server.http.limits import bounded_protocol
from server.observability import logs
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN

if TYPE_CHECKING:
    from server.observability.tracing import Tracing

BACKLOG = 2048
"""Connections that may wait to be accepted; uvicorn's own default."""

RESOURCE_TRACKER = "from multiprocessing.resource_tracker import main"
"""Start of the command-line argument by which multiprocessing's resource tracker is recognised."""

NO_KEYS_WARNING = (
    "Warning: everyone who can reach this address may use the server; make keys with `nbest keys new` and give "
    "--keys-file, or listen on 127.0.0.1."
)

log = logging.getLogger("nbest")

Started = TypeVar("Started")


class StartError(Exception):
    """The server did not start; the message says why."""


def serve(settings: Settings, console: Console) -> None:
    """Serves until a signal ends it.

    Raises:
        ConfigError: the server cannot listen on the address.
        StartError: a model could not be loaded, or the engine did not start.
        KeyboardInterrupt: Ctrl-C; raised after everything is closed.
    """
    console = configure_output(settings, console)
    listener = listen(settings.host, settings.port)
    listeners = [listener]
    if settings.metrics_port is not None:
        listeners.append(listen(settings.metrics_host, settings.metrics_port))
    warn_without_keys(settings, listener, console)
    metrics = Metrics()
    tracing = tracing_of(settings)
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def start() -> AbstractAsyncContextManager[BestOfN]:
        started = factory.start(settings, metrics.observe_batch, metrics.observe_restart, metrics.observe_lookup)
        if tracing is not None:
            started = tracing.instrument(started)
        return announced(started, settings, f"http://{address_of(listener)}", console)

    app = create_app(
        start,
        settings,
        metrics,
        on_start_failure=stop,
        tracing=tracing,
    )
    server = DrainingServer(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=bounded_protocol(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=settings.log_level,
            access_log=False,  # the app writes its own access log
            server_header=False,
        ),
        drain_s=settings.drain_s,
        refuse=app.state.drain,
    )
    try:
        server.run(sockets=listeners)
    finally:
        kill_children()
    if failures:
        log.info("The server did not start.", exc_info=failures[0])
        raise StartError(f"The server did not start: {failures[0]}") from failures[0]


def configure_output(settings: Settings, console: Console) -> Console:
    """Configures logging; returns the console for messages, which prints nothing if the log is for machines (JSON)."""
    logs.configure(settings.log_level, settings.log_format)
    return Console(quiet=True) if settings.log_format == "json" else console


def warn_without_keys(settings: Settings, listener: socket.socket, console: Console) -> None:
    """Warns if the server has no keys and other machines can reach it."""
    if settings.keys_file is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        console.print(NO_KEYS_WARNING, style="yellow")


def tracing_of(settings: Settings) -> "Tracing | None":
    """The tracing that the settings configure, or None."""
    if settings.otlp_endpoint is None:
        return None  # without importing OpenTelemetry
    from server.observability.tracing import Tracing

    return Tracing.to_collector(settings.otlp_endpoint, settings.trace_sample_ratio)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address.

    Raises:
        ConfigError: the address cannot be used; the message says what to do.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        remedy = "choose another with --host or --port, or stop the program that uses it"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"Cannot listen on {host}:{port}: {reason}; {remedy}.") from error


def address_of(listener: socket.socket) -> str:
    """HOST:PORT at which a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # every address includes this one
    host = loopback.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def announced(
    started: AbstractAsyncContextManager[BestOfN], settings: Settings, url: str, console: Console
) -> AsyncIterator[BestOfN]:
    """Like `loaded`, and then prints what is served, its address, and a command to try it."""
    models = f"{settings.model} and {', '.join(settings.reward_models)}"
    async with loaded(started, models, console) as best_of_n:
        log.info("Serving %s at %s.", settings.model, url)
        console.print(welcome(settings, url))
        yield best_of_n


@asynccontextmanager
async def loaded(
    started: AbstractAsyncContextManager[Started], models: str, console: Console
) -> AsyncIterator[Started]:
    """Enters `started` while showing that these models are loading.

    During loading a signal ends all processes at once; afterwards the caller handles signals.
    """
    # The resource tracker would warn about the shared memory that it frees after processes are killed.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    resource_tracker.ensure_running()  # now, since it unblocks SIGINT in the thread that starts it
    block_ctrl_c = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=block_ctrl_c))
    begun_s = time.perf_counter()
    loading = f"Loading {models} …"
    if not console.is_terminal:
        console.print(loading)
    async with contextlib.AsyncExitStack() as stack:
        with console.status(loading) as status, exit_on_signals(status.stop):
            opened = await stack.enter_async_context(started)
        console.print(f"Ready after {time.perf_counter() - begun_s:.0f} s.")
        yield opened


@contextlib.contextmanager
def exit_on_signals(before_exit: Callable[[], None]) -> Iterator[None]:
    """Inside of the block, SIGINT and SIGTERM end this process and its children at once."""

    def exit_now(number: int, _: FrameType | None) -> None:
        before_exit()
        kill_children()
        os._exit(128 + number)

    previous = {number: signal.signal(number, exit_now) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def welcome(settings: Settings, url: str) -> str:
    """The message of a server that has started: what it serves, its address, and a request to copy."""
    model = settings.served_model_name or settings.model
    return f"""\
Serving {model}, best of {settings.default_best_of} by {next(iter(settings.reward_models))}, at {url}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "best_of": {settings.default_best_of}, "max_tokens": 40,
    "messages": [{{"role": "user", "content": "Write one sentence about a film you saw."}}]}}'

Ctrl-C stops it."""


def kill_children() -> None:
    """Kills all descendants of this process except multiprocessing's resource tracker.

    The resource tracker ends on its own after this process, and frees the shared memory of the killed processes. It is
    recognised by the program it runs; a search for its name would also match other children, which have it in
    PYTHONWARNINGS on their command line.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any(argument.startswith(RESOURCE_TRACKER) for argument in child.cmdline()):
                child.kill()
