"""Verifier functions in their own process: their rewards, and faults that must not stop the server."""

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.scorers.base import ScoringError
from reranker.scorers.spec import FunctionSpec, ScorerSpecError
from reranker.scorers.verifier import VerifierScorer, source_exists
from tests.support.paths import ROOT

QUESTION = Prompt(messages=(Message("user", "2 + 2?"),))
FUNCTIONS = """\
import ctypes, os, sys, time

def length(prompt, completions):
    return [len(completion) for completion in completions]

def echoes(prompt, completions):
    return [float(completion == prompt) for completion in completions]

def obeys(prompt, completions):
    rewards = []
    for completion in completions:
        if completion == "raise":
            raise ValueError("no such luck")
        if completion == "crash":
            os.abort()
        if completion == "exit":
            sys.exit(3)
        if completion == "hang":
            time.sleep(600)
        if completion == "drop":
            continue
        if completion == "print":
            print('{"rewards": [666.0]}')
            sys.stdout.flush()
            os.write(1, b'{"rewards": [667.0]}\\n')
            ctypes.CDLL(None).puts(b'{"rewards": [668.0]}')
        rewards.append({"nan": float("nan"), "text": "high", "pid": os.getpid()}.get(completion, 1.0))
    return rewards

def none(prompt, completions):
    return None

number = 7
"""

Start = Callable[..., Awaitable[VerifierScorer]]


@pytest.fixture
def functions(tmp_path: Path) -> str:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return str(file)


@pytest.fixture
async def start(functions: str) -> AsyncIterator[Start]:
    """Starts a scorer for one of the functions, and makes sure that no process outlives the test."""
    started: list[VerifierScorer] = []

    async def start(name: str = "obeys", timeout_s: float = 20) -> VerifierScorer:
        started.append(await VerifierScorer.create("check", FunctionSpec(functions, name), timeout_s=timeout_s))
        return started[-1]

    yield start
    for scorer in started:
        await scorer.close()


async def rewards(scorer: VerifierScorer, *texts: str, prompt: Prompt = QUESTION) -> tuple[float, ...]:
    candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
    return (await scorer.score(prompt, candidates)).rewards_N


async def test_the_function_gets_the_prompt_and_the_texts(start: Start) -> None:
    assert await rewards(await start("length"), "a", "abc") == (1.0, 3.0)
    scorer = await start("echoes")
    assert await rewards(scorer, "2 + 2?", "4") == (1.0, 0.0)
    turns = Prompt(messages=(Message("system", "Be brief."), Message("user", "2 + 2?")))
    assert await rewards(scorer, "2 + 2?", "system: Be brief.\n\nuser: 2 + 2?", prompt=turns) == (0.0, 1.0)
    assert await rewards(scorer, "It was", prompt=Prompt(text="It was")) == (1.0,)


async def test_all_calls_run_in_one_other_process(start: Start) -> None:
    scorer = await start()
    first, second = await rewards(scorer, "pid"), await rewards(scorer, "pid")
    assert first == second
    assert first != (float(os.getpid()),)


async def test_printed_text_is_not_taken_for_an_answer(start: Start) -> None:
    assert await rewards(await start(), "print", "ok", "print") == (1.0, 1.0, 1.0)


async def test_nan_is_a_missing_reward(start: Start) -> None:
    reward, missing = await rewards(await start(), "ok", "nan")
    assert reward == 1.0
    assert math.isnan(missing)


@pytest.mark.parametrize("fault", ["raise", "crash", "exit", "drop", "text"])
async def test_only_the_candidate_at_which_the_function_fails_has_no_reward(start: Start, fault: str) -> None:
    scorer = await start()
    good, missing, also_good = await rewards(scorer, "ok", fault, "ok")
    assert (good, also_good) == (1.0, 1.0)
    assert math.isnan(missing)
    assert await rewards(scorer, "ok") == (1.0,)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "check: ValueError: no such luck"),
        ("crash", "its process exited with code -6"),
        ("exit", "its process exited with code 3"),
        ("drop", "0 numbers were returned for 1 completions"),
    ],
)
async def test_if_the_function_fails_at_every_candidate_the_error_has_the_reason(
    start: Start, fault: str, message: str
) -> None:
    scorer = await start()
    with pytest.raises(ScoringError, match=message):
        await rewards(scorer, fault)
    assert await rewards(scorer, "ok") == (1.0,)


async def test_a_function_that_returns_none_is_an_error(start: Start) -> None:
    with pytest.raises(ScoringError, match="'NoneType' object is not iterable"):
        await rewards(await start("none"), "a", "b")


async def test_a_hanging_call_is_killed_at_the_limit_and_the_next_works(start: Start) -> None:
    scorer = await start(timeout_s=0.5)
    (pid,) = await rewards(scorer, "pid")
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(ScoringError, match=r"took more than 0\.5 s"):
        await rewards(scorer, "ok", "hang", "hang")  # the limit is for the whole call, however many candidates hang
    assert asyncio.get_running_loop().time() - started_s < 5
    assert not psutil.pid_exists(int(pid))
    (new_pid,) = await rewards(scorer, "pid")
    assert new_pid != pid


async def test_the_answer_of_a_cancelled_call_is_not_returned_to_the_next(start: Start) -> None:
    scorer = await start()
    call = asyncio.create_task(rewards(scorer, "hang"))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await rewards(scorer, "ok", "ok") == (1.0, 1.0)


async def test_a_process_that_exits_between_calls_is_started_again(start: Start) -> None:
    scorer = await start()
    (pid,) = await rewards(scorer, "pid")
    psutil.Process(int(pid)).kill()
    for _ in range(1000):
        await asyncio.sleep(0.01)
        if not psutil.pid_exists(int(pid)):  # the event loop has reaped it
            break
    assert await rewards(scorer, "ok") == (1.0,)


async def test_concurrent_calls_get_their_own_answers(start: Start) -> None:
    scorer = await start("length")
    assert await asyncio.gather(*(rewards(scorer, "x" * size) for size in range(8))) == [(float(s),) for s in range(8)]


async def test_closing_the_scorer_kills_the_process(start: Start) -> None:
    scorer = await start()
    (pid,) = await rewards(scorer, "pid")
    await scorer.close()
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "has no attribute 'missing'"), ("number", "TypeError: number is not a function")]
)
async def test_a_missing_function_is_an_error_at_the_start(start: Start, name: str, message: str) -> None:
    with pytest.raises(ScorerSpecError, match=f"{name} of .*functions.py cannot be used: .*{message}"):
        await start(name)


async def test_a_module_that_cannot_be_imported_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(ScorerSpecError, match="No module named 'nothing_of_that_name'"):
        await VerifierScorer.create("check", FunctionSpec(str(tmp_path / "broken.py"), "f"), timeout_s=1)


async def test_a_module_of_the_working_folder_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checks"
    package.mkdir()
    (package / "arithmetic.py").write_text(
        "def right(prompt, completions):\n    return [c == '4' for c in completions]"
    )
    monkeypatch.chdir(tmp_path)
    function = FunctionSpec("checks.arithmetic", "right")
    assert source_exists(function)
    scorer = await VerifierScorer.create("check", function, timeout_s=20)
    try:
        assert await rewards(scorer, "4", "5") == (1.0, 0.0)
    finally:
        await scorer.close()


def test_a_missing_source_is_recognised_without_importing(functions: str) -> None:
    assert source_exists(FunctionSpec(functions, "whatever"))
    assert not source_exists(FunctionSpec(f"{functions}.py", "f"))
    assert source_exists(FunctionSpec("json.decoder", "f"))
    assert not source_exists(FunctionSpec("nothing_of_that_name", "f"))


async def test_the_documented_example_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scorers.md").read_text(), re.DOTALL)
    (tmp_path / "checks.py").write_text(code)
    scorer = await VerifierScorer.create("check", FunctionSpec(f"{tmp_path}/checks.py", "check"), timeout_s=20)
    try:
        prompt = Prompt(text="What is 17 + 25?")
        assert await rewards(scorer, "17 + 25 = 42.", "It is 41", "No idea", prompt=prompt) == (1.0, 0.0, 0.0)
    finally:
        await scorer.close()
