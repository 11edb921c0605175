"""The command line: light imports, one-sentence errors, and a shutdown that leaves no process behind.

The servers here are real processes with scripted doubles for the models.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from server import launch
from server.cli import DEFERRED, app
from server.cli_options import DeferredCommand
from server.config import Settings
from tests.support.paths import ROOT

SCRIPTED = """
import asyncio, contextlib, multiprocessing, sys, time
from server import factory
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

@contextlib.asynccontextmanager
async def start(settings, *hooks):
    {start}
    generator = ScriptedGenerator(["a", "abc", "ab"], delays_s={{3: 5, 4: 3600}})
    yield BestOfN(generator, {{"length": ScriptedScorer()}})
    {stop}

if __name__ == "__main__":
    factory.start = start
    from server.cli import main
    sys.argv = ["nbest", "serve", "--port", "0"]
    main()
"""
ENGINE_PROCESS = """
    engine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    await asyncio.to_thread(engine.start)
    print(f"engine {{engine.pid}}", file=sys.stderr, flush=True)
"""
WAIT_FOR_ENGINE = "    await asyncio.to_thread(engine.join)"
"""Like vLLM's start: a thread waits for a process and cannot be cancelled."""


@pytest.fixture
def environment() -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("NBEST_")}
    return bare | {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}  # children then have it as an argument


def nbest(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def is_running(pid: int) -> bool:
    """Whether the process is alive; an ended process whose parent is gone stays a zombie until init reaps it."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class Server:
    """`nbest serve` with scripted doubles, in its own process; its stderr goes to a file."""

    def __init__(self, folder: Path, environment: dict[str, str], start: str, stop: str) -> None:
        program = folder / "program.py"
        program.write_text(SCRIPTED.format(start=start.format(), stop=stop.format()))
        self._log = folder / "stderr"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(program)],
                cwd=ROOT,
                env={**environment, "PYTHONPATH": str(ROOT)},
                stderr=log,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        """Waits until stderr matches the pattern, and returns its first group."""
        while self.process.poll() is None:
            if match := re.search(pattern, self.stderr, re.MULTILINE):
                return match[1]
            time.sleep(0.05)
        raise AssertionError(f"the server ended without printing {pattern}:\n{self.stderr}")

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Signals all its processes, as Ctrl-C in a terminal does; returns the exit code and the seconds it took."""
        begun_s = time.monotonic()
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=30), time.monotonic() - begun_s


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, environment: dict[str, str]) -> Iterator[Serve]:
    """Starts a server that runs these lines when its models start and stop; no server outlives the test."""
    servers: list[Server] = []

    def start(start: str = "pass", stop: str = "pass") -> Server:
        servers.append(Server(tmp_path, environment, start, stop))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_flags_and_environment_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(launch, "serve", lambda settings, console: served.append(settings))
    monkeypatch.setenv("NBEST_PORT", "1001")
    monkeypatch.setenv("NBEST_MAX_BEST_OF", "9")
    flags = ["--port", "1002", "--reward-model", "b=movie-sentiment", "--reward-model", "a=movie-sentiment"]
    result = CliRunner().invoke(app, ["serve", *flags, "--no-trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert (served[0].port, served[0].max_best_of) == (1002, 9)
    assert list(served[0].reward_models) == ["b", "a"]


def test_help_imports_no_large_library(environment: dict[str, str]) -> None:
    program = (
        "import sys; from server.cli import app; app(['--help'], standalone_mode=False);"
        "print(*sorted({'torch', 'transformers', 'vllm', 'ray', 'fastapi'} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "serve" in result.stdout
    assert result.stderr.split() == []


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["serve", "--prot", "1"], {}, "No such option: --prot"),
        (["serve", "--port", "high"], {}, "Invalid value for '--port'"),
        (["serve", "--port", "-1"], {}, "Error: --port is -1, but: input should be greater than or equal to 0"),
        (["serve"], {"NBEST_DEVICE": "tpu"}, "Error: NBEST_DEVICE is 'tpu', but: input should be 'auto', 'cpu' or"),
        (["serve", "--model", "./no-model"], {}, "Error: The model ./no-model does not exist; give a directory, a"),
        (["serve", "--reward-model", "r=nope"], {}, "Error: The reward model r nope does not exist; give a directory"),
        (["prepare", "nope"], {}, "Error: no model 'nope' can be prepared; there are"),
        (["sevre"], {}, "No such command 'sevre'"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_exit_code(
    arguments: list[str], variables: dict[str, str], message: str, environment: dict[str, str]
) -> None:
    result = nbest(*arguments, environment={**environment, **variables})
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_reported_before_any_model_is_loaded(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = nbest("serve", "--port", str(port), environment=environment)
    assert result.returncode == 2
    assert result.stderr == (
        f"Error: Cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --host or --port, or "
        "stop the program that uses it.\n"
    )


def test_it_prints_its_address_answers_there_and_ends_on_ctrl_c(serve: Serve) -> None:
    server = serve()
    url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "best_of": 3}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
    assert reply["choices"][0]["message"]["content"] == "abc"
    code, seconds = server.end(signal.SIGINT)
    assert (code, "Traceback" in server.stderr) == (130, False), server.stderr
    assert seconds < 5
    assert f"curl {url}/v1/chat/completions" in server.stderr


class DrainedRequest:
    """A request in flight when the server gets SIGTERM. Its fourth candidate takes 5 s, and a fifth an hour."""

    def __init__(self, server: Server, best_of: int) -> None:
        url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "best_of": best_of}
        self.send = partial(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=30)
        self._thread = ThreadPoolExecutor(1)
        self.answer = self._thread.submit(self.send)
        self.wait_until(lambda: f"nbest_candidates_in_flight {best_of - 3}.0" in httpx.get(f"{url}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        self.wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        self.health = httpx.get(f"{url}/health")

    def wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            time.sleep(0.02)


def test_after_sigterm_new_requests_are_refused_and_requests_in_flight_are_finished(serve: Serve) -> None:
    server = serve(ENGINE_PROCESS)
    engine = int(server.wait_for(r"engine (\d+)"))
    request = DrainedRequest(server, best_of=4)
    refused = request.send()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert refused.json()["error"]["message"] == "The engine is stopping; try again in a few seconds."
    assert request.health.status_code == 200
    answer = request.answer.result()
    assert (answer.status_code, answer.json()["nbest"]["completed"]) == (200, 4)
    assert server.process.wait(timeout=30) == 0, server.stderr
    assert not is_running(engine)
    assert "Traceback" not in server.stderr


def test_a_request_that_outlasts_drain_s_is_503_with_a_retry_after(serve: Serve, environment: dict[str, str]) -> None:
    environment["NBEST_DRAIN_S"] = "1"
    server = serve()
    answer = DrainedRequest(server, best_of=5).answer.result()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert server.process.wait(timeout=30) == 0, server.stderr


def test_a_second_signal_ends_the_wait_for_requests(serve: Serve) -> None:
    server = serve()
    request = DrainedRequest(server, best_of=5)
    server.process.send_signal(signal.SIGTERM)
    assert request.answer.result().status_code == 503
    assert server.process.wait(timeout=30) == 0, server.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_leaves_no_process_behind(serve: Serve, number: signal.Signals) -> None:
    server = serve(ENGINE_PROCESS + WAIT_FOR_ENGINE)
    engine = int(server.wait_for(r"engine (\d+)"))
    code, seconds = server.end(number)
    assert code == 128 + number, server.stderr
    assert seconds < 5
    assert not is_running(engine)
    assert "Traceback" not in server.stderr


def test_ctrl_c_does_not_reach_the_engine_before_it_is_closed(serve: Serve) -> None:
    server = serve(ENGINE_PROCESS, "print(f'at closing {{engine.exitcode}}', file=sys.stderr); engine.kill()")
    server.wait_for("^(Ready)")
    assert server.end(signal.SIGINT)[0] == 130
    assert "at closing None" in server.stderr


def test_a_failed_start_of_the_engine_ends_the_server_with_the_reason(serve: Serve) -> None:
    server = serve("raise OSError('the weights are unreadable')")
    assert server.process.wait(timeout=30) == 1
    assert "Error: The server did not start: the weights are unreadable" in server.stderr
    assert "Traceback" not in server.stderr


def test_the_metrics_port_is_separate_and_a_reachable_server_without_keys_warns(
    serve: Serve, environment: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment |= {"NBEST_METRICS_PORT": str(port), "NBEST_HOST": "0.0.0.0"}
    server = serve()
    url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
    assert "Warning: everyone who can reach this address may use the server" in server.stderr
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert "nbest_requests_total" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404


def test_a_missing_keys_file_is_reported_before_any_model_is_loaded(environment: dict[str, str]) -> None:
    result = nbest("serve", "--port", "0", "--keys-file", "no/such.toml", environment=environment)
    assert result.returncode == 2
    assert result.stderr == ("Error: The keys file no/such.toml does not exist; make it with `nbest keys new NAME`.\n")


@pytest.mark.parametrize("command", DEFERRED, ids=lambda command: str(command.name))
def test_the_help_of_a_deferred_command_begins_like_the_help_of_its_module(command: DeferredCommand) -> None:
    own = " ".join(str(command.load().help).partition("\n\n")[0].split())
    assert own.partition(":")[0].startswith(str(command.help).partition(",")[0].partition(":")[0].rstrip("."))
