"""The soak: a real server for a long time under mixed load, with faults at random, and every answer checked.

`nbest serve` runs as a process of its own. Clients ask without a pause for answers of all sizes, plain and streamed,
with deadlines, with mistakes in them, and some hang up. Now and then the engine's process, or its worker, is killed.

An answer is wrong if the winner is not the candidate with the highest reward, if the usage is not the sum over the
candidates, if candidates are missing from the account, or if its status is not one that its request may get. A request
that was told to come back (503) does so after Retry-After; it is lost if it never gets an answer, and hangs if nothing
at all is heard for `HANG_S`. Memory is the server's resident set, the median of its last tenth against an earlier one;
before it all begins, the reward model is given as many prompts as it keeps. The engine is another process, new after
every kill, and is sampled beside it.

    python -m benchmarks.soak --minutes 20

Writes benchmarks/results/soak.json; the last line of output is the same JSON.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.provenance import provenance
from benchmarks.stats import hand_in
from tests.end_to_end.process import ENGINE_CORE, ServeProcess, nbest_serve

MODEL = "smollm2-135m-instruct"
FLAGS = (
    *("--max-model-len", "512", "--kv-cache-gib", "1", "--max-best-of", "16", "--drain-s", "120"),
    *("--reward-model", "movie-sentiment=movie-sentiment", "--reward-model", "likely=logprob"),
)
WORDS = ("I", "saw", "a", "film", "and", "it", "was", "long", "warm", "dull", "great", "the", "actors", "story")
HANG_S = 180.0
"""Longer than the longest answer and an engine's start together."""
GIVE_UP_S = 600.0
"""A request that was told so long to come back is lost."""
KEPT_PROMPTS = ("film " * 400, 24)
"""So many prompts of so many tokens are more than the reward model keeps, which is bounded by tokens, not by time."""
SAMPLE_S = 5.0
WARM_UP = (0.2, 0.3)
"""The part of the run whose memory the end is compared with."""
LAST = (0.9, 1.0)
MISTAKES: tuple[tuple[dict[str, Any], int], ...] = (
    ({"best_of": 0}, 400),
    ({"best_of": 17}, 400),
    ({"temperature": -1}, 400),
    ({"colour": "red"}, 400),
    ({"prompt": "word " * 600}, 400),
    ({"model": "gpt-9"}, 404),
)
KINDS = {"plain": 40, "stream": 20, "hang_up": 15, "deadline": 10, "mistake": 10, "score": 5}
"""Kind of request -> its share in per cent."""


@dataclass
class Tally:
    """What has happened so far."""

    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    told_to_come_back: int = 0
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    memory: list[dict[str, float]] = field(default_factory=list)


def draw(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A request: its kind, and its body."""
    kind = dice.choices(list(KINDS), weights=list(KINDS.values()))[0]
    prompt = " ".join(dice.choices(WORDS, k=40))
    prompt = prompt[: dice.randint(1, len(prompt))]
    if kind == "score":
        return kind, {"prompt": prompt, "candidates": [f" {prompt[:20]}"] * dice.randint(1, 16)}
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "best_of": dice.choice((1, 2, 4, 8, 16)),
        "max_tokens": dice.randint(1, 48),
        "nbest": {"return_candidates": True, "reward_model": dice.choice(("movie-sentiment", "likely"))},
    }
    if dice.random() < 0.3:
        body["seed"] = dice.randrange(1000)
    if kind == "stream" or (kind == "hang_up" and dice.random() < 0.5):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "hang_up":
        body |= {"max_tokens": 400, "prompt": prompt[:100]}
    if kind == "deadline":
        body["nbest"]["deadline_s"] = dice.choice((0.05, 0.5, 3.0))
    if kind == "mistake":
        body |= dice.choice(MISTAKES)[0]
    return kind, body


def mistakes_of(body: dict[str, Any], reply: dict[str, Any]) -> list[str]:
    """What is wrong with an answer; `usage` is in the reply however it came."""
    account, choice = reply["nbest"], reply["choices"][0]
    candidates = account["candidates"]
    rewards = [one["reward"] for one in candidates]
    best = max(candidates, key=lambda one: (one["reward"] is not None, one["reward"] or 0.0, -one["index"]))
    found = []
    if choice["reward"] != best["reward"] or choice["text"] != best["text"]:
        found.append(f"the winner has {choice['reward']}, the rewards are {rewards}")
    if reply["usage"]["completion_tokens"] != sum(one["num_tokens"] for one in candidates):
        found.append(f"usage {reply['usage']} is not the sum over the candidates")
    if account["completed"] + account["failed"] + account["cancelled"] != body["best_of"]:
        found.append(f"{body['best_of']} candidates are not accounted for in {account}")
    if len(candidates) != account["completed"]:
        found.append(f"{len(candidates)} candidates came back of {account['completed']}")
    if account["stopped_by"] == "deadline" and "deadline_s" not in body["nbest"]:
        found.append("a deadline that nobody set")
    return found


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's chunks as the reply they add up to."""
    choices = [chunk["choices"][0] for chunk in events if chunk.get("choices")]
    return {
        "choices": [{"text": "".join(one.get("text") or "" for one in choices), "reward": choices[-1].get("reward")}],
        "nbest": next(chunk["nbest"] for chunk in events if chunk.get("nbest")),
        "usage": events[-1]["usage"],
    }


class Client:
    """Asks one request after another until the time is up."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, seed: str) -> None:
        self._http = http
        self._tally = tally
        self._dice = random.Random(seed)

    async def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.one()

    async def one(self) -> None:
        """One request, until it has its answer; whatever is wrong with it is noted."""
        kind, body = draw(self._dice)
        self._tally.requests[kind] += 1
        try:
            await self._until_answered(kind, body)
        except (httpx.TimeoutException, TimeoutError):
            self._tally.hung.append(f"{kind} {body}")
        except (httpx.TransportError, ValueError, LookupError, StopIteration) as error:
            self._tally.wrong.append(f"{kind} {body}: {error!r}")

    async def _until_answered(self, kind: str, body: dict[str, Any]) -> None:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < GIVE_UP_S:
            async with asyncio.timeout(HANG_S):
                wait_s = await self._ask(kind, body)
            if wait_s is None:
                return
            self._tally.told_to_come_back += 1
            await asyncio.sleep(wait_s)
        self._tally.lost.append(f"{kind} {body}")

    async def _ask(self, kind: str, body: dict[str, Any]) -> float | None:
        """Asks and checks what comes; the seconds to wait where it is to be asked again."""
        if kind == "hang_up":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._dice.uniform(0.05, 2)):
                    await self._http.post("/v1/completions", json=body, timeout=HANG_S)
            return None
        if body.get("stream"):
            status, headers, reply = await self._stream(body)
        else:
            path = "/v1/score" if kind == "score" else "/v1/completions"
            answer = await self._http.post(path, json=body, timeout=HANG_S)
            status, headers, reply = answer.status_code, answer.headers, answer.json()
        self._tally.answers[f"{kind} {status}"] += 1
        if status == 503:
            return float(headers["retry-after"])
        self._check(kind, body, status, reply)
        return None

    async def _stream(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, dict[str, Any]]:
        """A stream that breaks off with an error counts as that error: it may have had its text handed on already."""
        async with self._http.stream("POST", "/v1/completions", json=body, timeout=HANG_S) as answer:
            if answer.status_code != 200:
                return answer.status_code, answer.headers, json.loads(await answer.aread())
            lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
        last = json.loads(lines[-1]) if lines[-1] != "[DONE]" else {}
        if "error" in last:
            return 503, httpx.Headers({"retry-after": "5"}), last
        if lines[-1] != "[DONE]":
            raise ValueError("the stream ended without [DONE]")
        return 200, answer.headers, joined([json.loads(line) for line in lines[:-1]])

    def _check(self, kind: str, body: dict[str, Any], status: int, reply: dict[str, Any]) -> None:
        expected = {"deadline": {200, 504}}.get(kind, {200})
        if kind == "mistake":
            expected = {status for mistake, status in MISTAKES if mistake.items() <= body.items()}
        if status not in expected:
            self._tally.wrong.append(f"{kind} {body}: {status} {reply}")
        elif status == 200 and kind == "score":
            if [one["index"] for one in reply["data"]] != list(range(len(body["candidates"]))):
                self._tally.wrong.append(f"{kind} {body}: {reply}")
        elif status == 200:
            self._tally.wrong += [f"{kind} {body}: {wrong}" for wrong in mistakes_of(body, reply)]


async def kill_now_and_then(served: ServeProcess, tally: Tally, every_s: float, until_s: float, seed: str) -> None:
    """Kills the engine, half a minute apart at least, and never while there is none."""
    dice = random.Random(seed)
    while True:
        await asyncio.sleep(30 + dice.expovariate(1 / every_s))
        if time.monotonic() > until_s - 60:  # so that it can come back
            return
        victim = served.named(ENGINE_CORE)
        if victim is not None and await asyncio.to_thread(served.is_ready):
            victim.kill()
            tally.kills[ENGINE_CORE] += 1


async def watch_memory(served: ServeProcess, tally: Tally) -> None:
    begun_s = time.monotonic()
    while True:
        engine = served.children()
        with contextlib.suppress(psutil.NoSuchProcess):
            sample = {
                "at_s": time.monotonic() - begun_s,
                "server_mib": served.process.memory_info().rss / 2**20,
                "engine_mib": sum(one.memory_info().rss for one in engine) / 2**20,
            }
            tally.memory.append(sample)
        await asyncio.sleep(SAMPLE_S)


def growth(memory: list[dict[str, float]], whole_s: float) -> dict[str, float]:
    """The server's memory after the warm-up and at the end, in MiB, and by how much of it it has grown."""

    def median_mib(start: float, end: float) -> float:
        return statistics.median(one["server_mib"] for one in memory if start * whole_s <= one["at_s"] <= end * whole_s)

    early, late = median_mib(*WARM_UP), median_mib(*LAST)
    return {"after_warm_up_mib": early, "at_the_end_mib": late, "growth": late / early - 1}


async def fill_what_is_kept(http: httpx.AsyncClient) -> None:
    """Has the reward model keep as many prompts as it ever will: that is no growth."""
    rest, count = KEPT_PROMPTS
    for number in range(count):
        answer = await http.post(
            "/v1/score", json={"prompt": f"{number} {rest}", "candidates": ["good"]}, timeout=HANG_S
        )
        answer.raise_for_status()


async def load(served: ServeProcess, tally: Tally, flags: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=served.url, limits=httpx.Limits(max_connections=None)) as http:
        await fill_what_is_kept(http)
        until_s = time.monotonic() + 60 * flags.minutes
        watching = asyncio.create_task(watch_memory(served, tally))
        killing = asyncio.create_task(
            kill_now_and_then(served, tally, flags.kill_every_s, until_s, f"kills {flags.seed}")
        )
        clients = [Client(http, tally, f"{flags.seed} {number}") for number in range(flags.clients)]
        await asyncio.gather(*(client.run(until_s) for client in clients))
        for task in (killing, watching):
            task.cancel()
        await asyncio.gather(killing, watching, return_exceptions=True)


def soak(flags: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    with nbest_serve(*FLAGS) as served:
        asyncio.run(load(served, tally, flags))
        in_flight = served.metric("nbest_candidates_in_flight")
        restarts = served.metric("nbest_engine_restarts_total")
        recovery_s = served.metric("nbest_engine_recovery_seconds_sum") / (restarts or 1)
        code, left = served.stop()
    return {
        "provenance": provenance(flags=vars(flags) | {"serve": " ".join(FLAGS)}),
        "minutes": flags.minutes,
        "requests": dict(tally.requests),
        "answers": dict(sorted(tally.answers.items())),
        "told_to_come_back": tally.told_to_come_back,
        "wrong": len(tally.wrong),
        "hung": len(tally.hung),
        "lost": len(tally.lost),
        "examples": [*tally.wrong[:5], *tally.hung[:5], *tally.lost[:5]],
        "kills": dict(tally.kills),
        "engine_restarts": restarts,
        "mean_recovery_s": recovery_s,
        "in_flight_at_the_end": in_flight,
        "exit_code": code,
        "processes_left": len(left),
        "server_memory": growth(tally.memory, 60 * flags.minutes),
        "samples": tally.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kill-every-s", type=float, default=150, help="mean time between kills, after the first 30 s")
    parser.add_argument("--seed", type=int, default=0)
    hand_in("soak", soak(parser.parse_args()))


if __name__ == "__main__":
    main()
