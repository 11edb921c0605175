"""Runs one server in this process, from the free port to the last child process.

The port is taken before any model is loaded: a port in use is told at once, and the HTTP server answers from then on.
A signal while the models are loading ends everything on the spot: there is no work to finish, and neither an import nor
the thread that waits for the engine could be interrupted otherwise. Once they are loaded a signal lets the requests
under way finish (server/http/graceful_shutdown.py), and closes the engine.

Ctrl-C in a terminal goes to every process of ours. The engine's must not act on it, or it would be gone before the
requests are finished; a process is born with the signals blocked that the thread which starts it has blocked.
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
"""How the program of multiprocessing's own process begins."""

OPEN_TO_ALL = (
    "Warning: whoever reaches this address may use the server; make keys with `nbest keys new` and give --keys-file, "
    "or listen on 127.0.0.1."
)

log = logging.getLogger("nbest")

Started = TypeVar("Started")


class StartError(Exception):
    """The server did not come up; the message says why."""


def serve(settings: Settings, console: Console) -> None:
    """Serves until a signal ends it; Ctrl-C comes out as KeyboardInterrupt after everything is closed.

    Raises:
        ConfigError: the address cannot be listened on.
        StartError: a model could not be loaded or the engine did not start.
    """
    console = prepared_console(settings, console)
    listener = listen(settings.host, settings.port)
    listeners = [listener]
    if settings.metrics_port is not None:
        listeners.append(listen(settings.metrics_host, settings.metrics_port))
    warn_if_open_to_all(settings, listener, console)
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
            access_log=False,  # the app writes a line of its own
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


def prepared_console(settings: Settings, console: Console) -> Console:
    """Sets up the log lines; the console is a silent one where people's words would be in a machine's way."""
    logs.configure(settings.log_level, settings.log_format)
    return Console(quiet=True) if settings.log_format == "json" else console


def warn_if_open_to_all(settings: Settings, listener: socket.socket, console: Console) -> None:
    if settings.keys_file is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        console.print(OPEN_TO_ALL, style="yellow")


def tracing_of(settings: Settings) -> "Tracing | None":
    """The traces that the settings ask for, if they do."""
    if settings.otlp_endpoint is None:
        return None  # and OpenTelemetry is not even imported
    from server.observability.tracing import Tracing

    return Tracing.to_collector(settings.otlp_endpoint, settings.trace_sample_ratio)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: with the way out.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        way_out = "choose another with --host or --port, or stop the program that has it"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"Cannot listen on {host}:{port}: {reason}; {way_out}.") from error


def address_of(listener: socket.socket) -> str:
    """HOST:PORT by which a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # every address includes this one
    host = loopback.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def announced(
    started: AbstractAsyncContextManager[BestOfN], settings: Settings, url: str, console: Console
) -> AsyncIterator[BestOfN]:
    """`loaded`, and then what is served, where, and one command to try it with."""
    models = f"{settings.model} and {', '.join(settings.reward_models)}"
    async with loaded(started, models, console) as best_of_n:
        log.info("Serving %s at %s.", settings.model, url)
        console.print(invitation(settings, url))
        yield best_of_n


@asynccontextmanager
async def loaded(
    started: AbstractAsyncContextManager[Started], models: str, console: Console
) -> AsyncIterator[Started]:
    """Shows that these models are loading, which a signal ends on the spot; later ones are the caller's to heed."""
    # It would tell of the shared memory it frees after killed processes as if that were a mistake.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    resource_tracker.ensure_running()  # now: in the thread that first needs it, it would leave SIGINT unblocked
    block_ctrl_c = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=block_ctrl_c))
    begun_s = time.perf_counter()
    loading = f"Loading {models} …"
    if not console.is_terminal:
        console.print(loading)
    async with contextlib.AsyncExitStack() as stack:
        with console.status(loading) as status, ended_by_signals(status.stop):
            opened = await stack.enter_async_context(started)
        console.print(f"Ready after {time.perf_counter() - begun_s:.0f} s.")
        yield opened


@contextlib.contextmanager
def ended_by_signals(before_the_end: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end this process and its children without delay."""

    def end(number: int, _: FrameType | None) -> None:
        before_the_end()
        kill_children()
        os._exit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def invitation(settings: Settings, url: str) -> str:
    """What is served, and a request to copy."""
    model = settings.served_model_name or settings.model
    return f"""\
Serving {model}, best of {settings.default_best_of} by {next(iter(settings.reward_models))}, at {url}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "best_of": {settings.default_best_of}, "max_tokens": 40,
    "messages": [{{"role": "user", "content": "Write one sentence about a film you saw."}}]}}'

Ctrl-C stops it."""


def kill_children() -> None:
    """Kills every process below this one, but for multiprocessing's resource tracker.

    That one ends by itself with us, and frees the shared memory that the others leave. It is told by what it runs: the
    word alone can stand in the command line of any child, by way of PYTHONWARNINGS.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any(argument.startswith(RESOURCE_TRACKER) for argument in child.cmdline()):
                child.kill()
