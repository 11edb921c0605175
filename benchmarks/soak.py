"""Soak test: a server under mixed load and random engine kills for a long time, with every answer checked.

`nbest serve` runs as a separate process. Clients send requests without pause: of all sizes, plain and streamed, with
deadlines and with invalid fields; some disconnect. At random times the engine's process is killed.

An answer is wrong if the winner is not the candidate with the highest reward, if the usage is not the sum over the
candidates, if the counts do not add up to best_of, or if its status is not one that the request may get. A request
that gets a 503 is sent again after Retry-After; it is lost if it never gets an answer, and hangs if no reply comes for
`HANG_S`. Memory is the server's resident set: the median of the last tenth of the run against one after the warm-up.
Before the run starts, the reward model's prompt cache is filled. The engine is a separate process, new after every
kill; its memory is recorded too.

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
from benchmarks.stats import write_result
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
"""A request that gets 503 for this long is lost."""
CACHED_PROMPTS = ("film " * 400, 24)
"""(text, number of prompts): together more tokens than the reward model's prompt cache holds."""
SAMPLE_S = 5.0
WARM_UP = (0.2, 0.3)
"""Part of the run, from and to as shares, whose memory is the reference."""
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
"""Kind of request -> its share in percent."""


@dataclass
class Tally:
    """Counts of requests and answers, and descriptions of the faulty ones."""

    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    retries: int = 0
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    memory: list[dict[str, float]] = field(default_factory=list)


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A random request: (kind, body)."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    prompt = " ".join(rng.choices(WORDS, k=40))
    prompt = prompt[: rng.randint(1, len(prompt))]
    if kind == "score":
        return kind, {"prompt": prompt, "candidates": [f" {prompt[:20]}"] * rng.randint(1, 16)}
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "best_of": rng.choice((1, 2, 4, 8, 16)),
        "max_tokens": rng.randint(1, 48),
        "nbest": {"return_candidates": True, "reward_model": rng.choice(("movie-sentiment", "likely"))},
    }
    if rng.random() < 0.3:
        body["seed"] = rng.randrange(1000)
    if kind == "stream" or (kind == "hang_up" and rng.random() < 0.5):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "hang_up":
        body |= {"max_tokens": 400, "prompt": prompt[:100]}
    if kind == "deadline":
        body["nbest"]["deadline_s"] = rng.choice((0.05, 0.5, 3.0))
    if kind == "mistake":
        body |= rng.choice(MISTAKES)[0]
    return kind, body


def mistakes_of(body: dict[str, Any], reply: dict[str, Any]) -> list[str]:
    """The mistakes of an answer. A streamed reply is joined before, so `usage` is in every reply."""
    details, choice = reply["nbest"], reply["choices"][0]
    candidates = details["candidates"]
    rewards = [candidate["reward"] for candidate in candidates]

    def rank(candidate: dict[str, Any]) -> tuple[bool, float, int]:
        return candidate["reward"] is not None, candidate["reward"] or 0.0, -candidate["index"]

    best = max(candidates, key=rank)
    mistakes = []
    if choice["reward"] != best["reward"] or choice["text"] != best["text"]:
        mistakes.append(f"the winner has reward {choice['reward']}, the rewards are {rewards}")
    if reply["usage"]["completion_tokens"] != sum(candidate["num_tokens"] for candidate in candidates):
        mistakes.append(f"usage {reply['usage']} is not the sum over the candidates")
    if details["completed"] + details["failed"] + details["cancelled"] != body["best_of"]:
        mistakes.append(f"the counts do not add up to best_of {body['best_of']}: {details}")
    if len(candidates) != details["completed"]:
        mistakes.append(f"{len(candidates)} candidates were returned of {details['completed']} completed")
    if details["stopped_by"] == "deadline" and "deadline_s" not in body["nbest"]:
        mistakes.append("stopped by a deadline that the request did not set")
    return mistakes


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The reply that a stream's chunks add up to."""
    choices = [chunk["choices"][0] for chunk in events if chunk.get("choices")]
    return {
        "choices": [
            {"text": "".join(choice.get("text") or "" for choice in choices), "reward": choices[-1].get("reward")}
        ],
        "nbest": next(chunk["nbest"] for chunk in events if chunk.get("nbest")),
        "usage": events[-1]["usage"],
    }


class Client:
    """Sends one request after another until the time is up."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, seed: str) -> None:
        self._http = http
        self._tally = tally
        self._rng = random.Random(seed)

    async def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.request()

    async def request(self) -> None:
        """Sends a random request until it is answered, and records every mistake."""
        kind, body = draw(self._rng)
        self._tally.requests[kind] += 1
        try:
            await self._until_answered(kind, body)
        except (httpx.TimeoutException, TimeoutError):
            self._tally.hung.append(f"{kind} {body}")
        except (httpx.TransportError, ValueError, LookupError, StopIteration) as error:
            self._tally.wrong.append(f"{kind} {body}: {error!r}")

    async def _until_answered(self, kind: str, body: dict[str, Any]) -> None:
        start_s = time.monotonic()
        while time.monotonic() - start_s < GIVE_UP_S:
            async with asyncio.timeout(HANG_S):
                wait_s = await self._send(kind, body)
            if wait_s is None:
                return
            self._tally.retries += 1
            await asyncio.sleep(wait_s)
        self._tally.lost.append(f"{kind} {body}")

    async def _send(self, kind: str, body: dict[str, Any]) -> float | None:
        """Sends a request and checks the answer. Returns the seconds to wait before a retry, None where none is due."""
        if kind == "hang_up":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.uniform(0.05, 2)):
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
        """(status, headers, joined reply). A stream that ends with an error event counts as a 503, despite its 200."""
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
            if [line["index"] for line in reply["data"]] != list(range(len(body["candidates"]))):
                self._tally.wrong.append(f"{kind} {body}: {reply}")
        elif status == 200:
            self._tally.wrong += [f"{kind} {body}: {mistake}" for mistake in mistakes_of(body, reply)]


async def kill_engines(served: ServeProcess, tally: Tally, every_s: float, until_s: float, seed: str) -> None:
    """Kills the engine at random times at least 30 s apart, only while the server is ready."""
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(30 + rng.expovariate(1 / every_s))
        if time.monotonic() > until_s - 60:  # leaves time for the last recovery
            return
        victim = served.child_named(ENGINE_CORE)
        if victim is not None and await asyncio.to_thread(served.is_ready):
            victim.kill()
            tally.kills[ENGINE_CORE] += 1


async def watch_memory(served: ServeProcess, tally: Tally) -> None:
    """Records the memory of the server and of its child processes every SAMPLE_S, until cancelled."""
    start_s = time.monotonic()
    while True:
        children = served.children()
        with contextlib.suppress(psutil.NoSuchProcess):
            sample = {
                "at_s": time.monotonic() - start_s,
                "server_mib": served.process.memory_info().rss / 2**20,
                "engine_mib": sum(child.memory_info().rss for child in children) / 2**20,
            }
            tally.memory.append(sample)
        await asyncio.sleep(SAMPLE_S)


def growth(memory: list[dict[str, float]], duration_s: float) -> dict[str, float]:
    """The server's memory after the warm-up and at the end, in MiB, and its relative growth."""

    def median_mib(start: float, end: float) -> float:
        return statistics.median(
            sample["server_mib"] for sample in memory if start * duration_s <= sample["at_s"] <= end * duration_s
        )

    early, late = median_mib(*WARM_UP), median_mib(*LAST)
    return {"after_warm_up_mib": early, "at_the_end_mib": late, "growth": late / early - 1}


async def fill_prompt_cache(http: httpx.AsyncClient) -> None:
    """Fills the reward model's prompt cache, so that its memory does not count as growth."""
    text, count = CACHED_PROMPTS
    for number in range(count):
        answer = await http.post(
            "/v1/score", json={"prompt": f"{number} {text}", "candidates": ["good"]}, timeout=HANG_S
        )
        answer.raise_for_status()


async def load(served: ServeProcess, tally: Tally, flags: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=served.url, limits=httpx.Limits(max_connections=None)) as http:
        await fill_prompt_cache(http)
        until_s = time.monotonic() + 60 * flags.minutes
        watching = asyncio.create_task(watch_memory(served, tally))
        killing = asyncio.create_task(kill_engines(served, tally, flags.kill_every_s, until_s, f"kills {flags.seed}"))
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
        code, processes = served.stop()
    return {
        "provenance": provenance(flags=vars(flags) | {"serve": " ".join(FLAGS)}),
        "minutes": flags.minutes,
        "requests": dict(tally.requests),
        "answers": dict(sorted(tally.answers.items())),
        "retries": tally.retries,
        "wrong": len(tally.wrong),
        "hung": len(tally.hung),
        "lost": len(tally.lost),
        "examples": [*tally.wrong[:5], *tally.hung[:5], *tally.lost[:5]],
        "kills": dict(tally.kills),
        "engine_restarts": restarts,
        "mean_recovery_s": recovery_s,
        "in_flight_at_the_end": in_flight,
        "exit_code": code,
        "processes_left": len(processes),
        "server_memory": growth(tally.memory, 60 * flags.minutes),
        "samples": tally.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kill-every-s", type=float, default=150, help="mean time between kills, after the first 30 s")
    parser.add_argument("--seed", type=int, default=0)
    write_result("soak", soak(parser.parse_args()))


if __name__ == "__main__":
    main()
