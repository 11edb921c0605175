"""Best-of-16 by nbest and by everything else that one could do, in turn, in one run, over HTTP where there is a server.

    nbest                 nbest serve, with scoring
    vllm, defaults        vllm serve with its defaults and n=16, nothing scored
    vllm, our settings    the same with the settings of nbest's engine: the floor under anything that draws with it
    vllm, then score      the latter; when all have ended transformers scores them in a padded batch, in this process
    script                transformers alone: generate(num_return_sequences=16), then a padded batch
    its-hub               its-hub 1.2.0 over vllm serve with our settings: 16 requests, then nbest's reward model on all
    optillm               optillm 0.4.0 `bon` over the same: one request for 16, then the policy grades each in turn

The same model, precision, prompt of about 120 tokens and 64 new tokens; the end of a text is biased away where a way
can be told to, and the tokens that each drew are kept. Servers that are not asked wait idle, and before each way all
have two seconds to become so. A round asks each way for
one answer, and then for several at once; the order turns. A way that cannot be installed or that fails is left out, and
why is told.

    python -m benchmarks.side_by_side [--rounds 3] [--at-once 4] [--ways nbest "vllm, defaults"]
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx
from rich.console import Console

from benchmarks.baselines.process import Peer, PeerError, environment
from benchmarks.film_reviews import OPENINGS
from benchmarks.offline import NEVER_ENDING, Transformers, Work
from benchmarks.provenance import provenance
from benchmarks.server_processes import nbest_serve, vllm_serve
from benchmarks.stats import hand_in, paired_ratio
from reranker.models.bundled import resolve
from server.config import Settings
from server.generation.vllm_engine import IN_CORE, pick_dtype

BEST_OF, MAX_TOKENS = 16, 64
SETTLES_S = 2.0
"""Between two ways: by default a worker of vLLM's waits with a core of its own for a second after the last token."""
PROMPT = "Go on with this review of a film that I saw at the festival this year. " * 5 + OPENINGS[0]
PEERS = {
    "its-hub": ("its-hub[lm]==1.2.0", "its_hub_worker.py", False),
    "optillm": ("optillm==0.4.0", "optillm_worker.py", True),
}
"""Requirement, worker, and whether it needs torch."""
BARS = {
    "vllm, defaults": ("one", 1.0),
    "vllm, our settings": ("one", 1 / 1.35),
    "script": ("at once", 2.0),
    "its-hub": ("at once", 2.0),
    "optillm": ("at once", 2.0),
}
"""How many times as long as nbest each has to take at least, asked for one answer or for several at once."""

console = Console(stderr=True)

Way = Callable[[int], Awaitable[list[int]]]
"""Answers so many requests at once; returns the tokens drawn for each. Without seeds: they end vllm serve's CPU engine
wherever it reads a prompt in pieces, as it does by default."""


def settings_of_ours(settings: Settings) -> tuple[str, ...]:
    """Flags that make vllm serve draw as the embedded engine does."""
    return (
        *("--dtype", pick_dtype("cpu"), "--max-model-len", str(settings.max_model_len)),
        *("--block-size", str(settings.block_size), "--max-num-seqs", str(settings.max_num_seqs)),
        *("--distributed-executor-backend", IN_CORE),
        *("--no-enable-chunked-prefill", "--enforce-eager", "--disable-log-stats"),
    )


class OverHttp:
    """A server that is asked for chat completions; `fields` say how many."""

    def __init__(self, client: httpx.AsyncClient, model: str, eos: int, **fields: Any) -> None:
        self._client = client
        self._body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": MAX_TOKENS,
            "logit_bias": {str(eos): NEVER_ENDING},
            **fields,
        }

    async def ask(self) -> tuple[int, list[str]]:
        """The tokens that were drawn, and the answers."""
        reply = await self._client.post("/v1/chat/completions", json=self._body)
        answer = reply.raise_for_status().json()
        return answer["usage"]["completion_tokens"], [one["message"]["content"] for one in answer["choices"]]

    async def __call__(self, requests: int) -> list[int]:
        return [tokens for tokens, _ in await asyncio.gather(*(self.ask() for _ in range(requests)))]


def then_score(server: OverHttp, script: Transformers, prompt: str) -> Way:
    async def ask() -> int:
        tokens, texts = await server.ask()
        script.score([(prompt, text) for text in texts])
        return tokens

    async def way(requests: int) -> list[int]:
        return list(await asyncio.gather(*(ask() for _ in range(requests))))

    return way


def of_script(script: Transformers, prompt: str) -> Way:
    async def way(requests: int) -> list[int]:
        return [script([prompt] * requests) // requests] * requests  # in batches as large as the engine's

    return way


def of_peer(peer: Peer, **question: Any) -> Way:
    async def way(requests: int) -> list[int]:
        asked = {"prompt": PROMPT, "n": BEST_OF, "max_tokens": MAX_TOKENS, "requests": requests, **question}
        return list((await peer.ask(**asked))["tokens"])

    return way


@contextlib.asynccontextmanager
async def ways(settings: Settings, wanted: list[str]) -> AsyncIterator[tuple[dict[str, Way], dict[str, str]]]:
    """The ways by name, and why others are left out."""
    model, left_out = resolve(settings.model), {}
    found: dict[str, Way] = {}
    async with contextlib.AsyncExitStack() as stack:
        console.print("Starting the servers …")
        served = await stack.enter_async_context(nbest_serve("--max-model-len", str(settings.max_model_len)))
        ours = served.client
        same = await stack.enter_async_context(
            vllm_serve(model, *settings_of_ours(settings), TORCH_COMPILE_DISABLE="1")
        )
        script = Transformers(settings, BEST_OF, Work([], MAX_TOKENS, None))
        rendered = script.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
        eos = script.tokenizer.eos_token_id
        floor = OverHttp(same, model, eos, n=BEST_OF)
        found["nbest"] = OverHttp(ours, settings.model, eos, best_of=BEST_OF)
        found["vllm, our settings"] = floor
        found["vllm, then score"] = then_score(floor, script, rendered)
        found["script"] = of_script(script, rendered)
        if "vllm, defaults" in wanted:
            theirs = await stack.enter_async_context(vllm_serve(model))
            found["vllm, defaults"] = OverHttp(theirs, model, eos, n=BEST_OF)
        for name, (requirement, worker, torch) in PEERS.items():
            if name not in wanted:
                continue
            try:
                console.print(f"Making an environment for {requirement}, the first time for a few minutes …")
                python = await asyncio.to_thread(environment, requirement, torch=torch)
                peer = await stack.enter_async_context(Peer(python, worker))
                urls = {"url": str(same.base_url), "reward_url": str(ours.base_url)}
                found[name] = of_peer(peer, model=model, reward_model="movie-sentiment", **urls)
                await found[name](1)
            except (PeerError, OSError, subprocess.CalledProcessError) as error:
                left_out[name] = str(error)
                found.pop(name, None)
        yield {name: way for name, way in found.items() if name in wanted}, left_out


async def measure(rounds: int, at_once: int, wanted: list[str]) -> dict[str, Any]:
    settings = Settings(max_model_len=2048)
    async with ways(settings, wanted) as (by_name, left_out):
        names = list(by_name)
        seconds: dict[str, dict[str, list[float]]] = {name: {"one": [], "at once": []} for name in names}
        tokens: dict[str, list[int]] = {name: [] for name in names}
        for number in range(-1, rounds):  # the first round warms up
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                for load, requests in (("one", 1), ("at once", at_once)):
                    if name in left_out or (number < 0 and load == "at once"):
                        continue
                    await asyncio.sleep(SETTLES_S)
                    started_s = time.perf_counter()
                    try:
                        drawn = await by_name[name](requests)
                    except (PeerError, httpx.HTTPError) as error:
                        left_out[name] = f"{type(error).__name__}: {error}"
                        continue
                    took_s = time.perf_counter() - started_s
                    console.print(f"{number} {name}, {requests} at once: {took_s:.2f} s, {sum(drawn)} tokens")
                    if number >= 0:
                        seconds[name][load].append(took_s)
                        tokens[name] += drawn
    names = [name for name in names if name not in left_out]
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "best_of": BEST_OF,
        "max_tokens": MAX_TOKENS,
        "at_once": at_once,
        "left_out": left_out,
        "ways": {name: told(seconds[name], tokens[name], at_once) for name in names},
        "times_as_long_as_nbest": {
            name: {load: paired_ratio(seconds[name][load], seconds["nbest"][load]) for load in ("one", "at once")}
            for name in names
            if name != "nbest"
        },
        "bars": {name: {"load": load, "at_least": bar} for name, (load, bar) in BARS.items()},
    }


def told(seconds: Mapping[str, list[float]], tokens: list[int], at_once: int) -> dict[str, Any]:
    return {
        "one_request_s": statistics.median(seconds["one"]),
        "requests_per_s": at_once / statistics.median(seconds["at once"]),
        "tokens_a_request": statistics.fmean(tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=4, help="requests of the second load")
    all_ways = ["nbest", *BARS, "vllm, then score"]
    parser.add_argument("--ways", nargs="+", choices=all_ways, default=all_ways, help="nbest is always among them")
    given = parser.parse_args()
    wanted = list(dict.fromkeys(["nbest", *given.ways]))
    hand_in("side_by_side", asyncio.run(measure(given.rounds, given.at_once, wanted)))


if __name__ == "__main__":
    main()
