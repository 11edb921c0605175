"""The command: light, plain about mistakes, and gone without a trace when it is told to go.

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
from server import assembly
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

@contextlib.asynccontextmanager
async def start(settings, *hooks):
    {start}
    generator = ScriptedGenerator(["a", "abc", "ab"], delays_s={{3: 5, 4: 3600}})
    yield BestOfN(generator, {{"length": ScriptedScorer()}})
    {stop}

if __name__ == "__main__":
    assembly.start = start
    from server.cli import main
    sys.argv = ["nbest", "serve", "--port", "0"]
    main()
"""
ENGINE_PROCESS = """
    engine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    await asyncio.to_thread(engine.start)
    print(f"engine {{engine.pid}}", file=sys.stderr, flush=True)
"""
WAITING_FOR_IT = "    await asyncio.to_thread(engine.join)"
"""As in vLLM's start: a thread that waits for a process, and cannot be cancelled."""


@pytest.fixture
def environment() -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("NBEST_")}
    return bare | {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}  # children then have it as an argument


def nbest(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def is_running(pid: int) -> bool:
    """Whether it still does anything: one that has ended and whose parent is gone may wait for init to notice."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class Server:
    """`nbest serve` with doubles, as a process of its own; what it says goes to a file."""

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
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        """The first group of the pattern, once it has been said."""
        while self.process.poll() is None:
            if found := re.search(pattern, self.said, re.MULTILINE):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(f"it ended without saying {pattern}:\n{self.said}")

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Signals all its processes, as Ctrl-C in a terminal does; the exit code and the seconds it took."""
        begun_s = time.monotonic()
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=30), time.monotonic() - begun_s


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, environment: dict[str, str]) -> Iterator[Serve]:
    """Starts a server whose models start and stop with these lines, and makes sure that none outlives the test."""
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


def test_help_imports_nothing_heavy(environment: dict[str, str]) -> None:
    program = (
        "import sys; from server.cli import app; app(['--help'], standalone_mode=False);"
        "print(*sorted({'torch', 'transformers', 'vllm', 'ray', 'fastapi'} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "serve" in result.stdout
    assert result.stderr.split() == []


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (["serve", "--prot", "1"], {}, "No such option: --prot"),
        (["serve", "--port", "high"], {}, "Invalid value for '--port'"),
        (["serve", "--port", "-1"], {}, "Error: --port is -1, but: input should be greater than or equal to 0"),
        (["serve"], {"NBEST_DEVICE": "tpu"}, "Error: NBEST_DEVICE is 'tpu', but: input should be 'auto', 'cpu' or"),
        (["serve", "--model", "./no-model"], {}, "Error: The model ./no-model is not there; give a directory, a hub"),
        (["serve", "--reward-model", "r=nope"], {}, "Error: The reward model r nope is not there; give a directory"),
        (["prepare", "nope"], {}, "Error: no model 'nope' can be prepared; there are"),
        (["sevre"], {}, "No such command 'sevre'"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_exit_code(
    arguments: list[str], variables: dict[str, str], told: str, environment: dict[str, str]
) -> None:
    result = nbest(*arguments, environment={**environment, **variables})
    assert result.returncode in (1, 2)
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_told_before_anything_is_loaded(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = nbest("serve", "--port", str(port), environment=environment)
    assert result.returncode == 2
    assert result.stderr == (
        f"Error: Cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --host or --port, or "
        "stop the program that has it.\n"
    )


def test_it_says_where_it_serves_answers_there_and_ctrl_c_ends_it(serve: Serve) -> None:
    server = serve()
    url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "best_of": 3}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
    assert reply["choices"][0]["message"]["content"] == "abc"
    code, seconds = server.end(signal.SIGINT)
    assert (code, "Traceback" in server.said) == (130, False), server.said
    assert seconds < 5
    assert f"curl {url}/v1/chat/completions" in server.said


class Draining:
    """A request that is under way when the server is told to stop. Its fourth candidate takes 5 s, a fifth an hour."""

    def __init__(self, server: Server, best_of: int) -> None:
        url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "best_of": best_of}
        self.ask = partial(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=30)
        self._asking = ThreadPoolExecutor(1)
        self.answer = self._asking.submit(self.ask)
        self.until(lambda: f"nbest_candidates_in_flight {best_of - 3}.0" in httpx.get(f"{url}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        self.until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        self.health = httpx.get(f"{url}/health")

    def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            time.sleep(0.02)


def test_sigterm_refuses_what_comes_and_finishes_what_is_under_way(serve: Serve) -> None:
    server = serve(ENGINE_PROCESS)
    engine = int(server.wait_for(r"engine (\d+)"))
    draining = Draining(server, best_of=4)
    refused = draining.ask()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert refused.json()["error"]["message"] == "The engine is stopping; try again in a few seconds."
    assert draining.health.status_code == 200
    answer = draining.answer.result()
    assert (answer.status_code, answer.json()["nbest"]["completed"]) == (200, 4)
    assert server.process.wait(timeout=30) == 0, server.said
    assert not is_running(engine)
    assert "Traceback" not in server.said


def test_what_outlasts_drain_s_is_told_to_come_back(serve: Serve, environment: dict[str, str]) -> None:
    environment["NBEST_DRAIN_S"] = "1"
    server = serve()
    answer = Draining(server, best_of=5).answer.result()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert server.process.wait(timeout=30) == 0, server.said


def test_a_second_signal_does_not_wait(serve: Serve) -> None:
    server = serve()
    draining = Draining(server, best_of=5)
    server.process.send_signal(signal.SIGTERM)
    assert draining.answer.result().status_code == 503
    assert server.process.wait(timeout=30) == 0, server.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_starting_it_leaves_no_process_behind(serve: Serve, number: signal.Signals) -> None:
    server = serve(ENGINE_PROCESS + WAITING_FOR_IT)
    engine = int(server.wait_for(r"engine (\d+)"))
    code, seconds = server.end(number)
    assert code == 128 + number, server.said
    assert seconds < 5
    assert not is_running(engine)
    assert "Traceback" not in server.said


def test_ctrl_c_does_not_reach_the_engine_before_it_is_closed(serve: Serve) -> None:
    server = serve(ENGINE_PROCESS, "print(f'at closing {{engine.exitcode}}', file=sys.stderr); engine.kill()")
    server.wait_for("^(Ready)")
    assert server.end(signal.SIGINT)[0] == 130
    assert "at closing None" in server.said


def test_an_engine_that_does_not_start_ends_the_server_with_the_reason(serve: Serve) -> None:
    server = serve("raise OSError('the weights are unreadable')")
    assert server.process.wait(timeout=30) == 1
    assert "Error: The server did not start: the weights are unreadable" in server.said
    assert "Traceback" not in server.said


def test_metrics_have_a_port_of_their_own_and_a_server_without_keys_warns(
    serve: Serve, environment: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment |= {"NBEST_METRICS_PORT": str(port), "NBEST_HOST": "0.0.0.0"}
    server = serve()
    url = server.wait_for(r"at (http://127\.0\.0\.1:\d+)$")
    assert "Warning: whoever reaches this address may use the server" in server.said
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert "nbest_requests_total" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404


def test_a_missing_keys_file_is_told_before_anything_is_loaded(environment: dict[str, str]) -> None:
    result = nbest("serve", "--port", "0", "--keys-file", "no/such.toml", environment=environment)
    assert result.returncode == 2
    assert result.stderr == ("Error: The keys file no/such.toml does not exist; make it with `nbest keys new NAME`.\n")


@pytest.mark.parametrize("command", DEFERRED, ids=lambda command: str(command.name))
def test_the_help_of_a_command_that_is_not_imported_yet_is_the_command_s_own(command: DeferredCommand) -> None:
    own = " ".join(str(command.load().help).partition("\n\n")[0].split())
    assert own.partition(":")[0].startswith(str(command.help).partition(",")[0].partition(":")[0].rstrip("."))
