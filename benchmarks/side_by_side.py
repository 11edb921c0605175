"""Best-of-16 by nbest, by vLLM, by a transformers script and by other projects, alternately in one run.

    nbest                 nbest serve, with scoring
    vllm, defaults        vllm serve with its defaults and n=16, without scoring
    vllm, our settings    the same with the settings of nbest's engine: the lower bound for anything that uses it
    vllm, then score      the same, then transformers scores all candidates in a padded batch, in this process
    script                transformers alone: generate(num_return_sequences=16), then a padded batch
    its-hub               its-hub 1.2.0 over vllm serve with our settings: 16 requests, then nbest's reward model
    optillm               optillm 0.4.0 `bon` over the same: one request with n=16, then the policy grades each answer

All ways have the same model, precision, prompt of about 120 tokens and 64 new tokens. EOS is biased away where a way
allows it, and the tokens that each way sampled are recorded. Servers are reached over HTTP; those that are not measured
are idle, and get two seconds before each measurement to become idle. A round measures each way with one request, then
with several at once; the order rotates. A way that cannot be installed or that fails is left out, with the reason.

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

from benchmarks.baselines.process import BaselineError, BaselineProcess, environment
from benchmarks.film_reviews import OPENINGS
from benchmarks.offline import NEVER_ENDING, Transformers, Work
from benchmarks.provenance import provenance
from benchmarks.server_processes import nbest_serve, vllm_serve
from benchmarks.stats import paired_ratio, write_result
from reranker.models.bundled import resolve
from server.config import Settings
from server.generation.engine_arguments import IN_CORE_EXECUTOR, pick_dtype

BEST_OF, MAX_TOKENS = 16, 64
SETTLE_S = 2.0
"""Pause between two measurements: by default vLLM's worker spins on a core for a second after the last token."""
PROMPT = "Continue this review of a film that I saw at the festival this year. " * 5 + OPENINGS[0]
BASELINES = {
    "its-hub": ("its-hub[lm]==1.2.0", "its_hub_worker.py", False),
    "optillm": ("optillm==0.4.0", "optillm_worker.py", True),
}
"""Name -> (requirement, worker script, whether it needs torch)."""
BARS = {
    "vllm, defaults": ("one", 1.0),
    "vllm, our settings": ("one", 1 / 1.35),
    "script": ("at once", 2.0),
    "its-hub": ("at once", 2.0),
    "optillm": ("at once", 2.0),
}
"""Name -> (load, the time relative to nbest's that this way has to take at least), with one or several requests."""

console = Console(stderr=True)

Way = Callable[[int], Awaitable[list[int]]]
"""Answers that many requests at once and returns the tokens sampled for each. No request has a seed: seeds crash the
CPU engine of vllm serve where it reads a prompt in chunks, as it does by default."""


def settings_of_ours(settings: Settings) -> tuple[str, ...]:
    """Flags that give vllm serve the settings of nbest's embedded engine."""
    return (
        *("--dtype", pick_dtype("cpu"), "--max-model-len", str(settings.max_model_len)),
        *("--block-size", str(settings.block_size), "--max-num-seqs", str(settings.max_num_seqs)),
        *("--distributed-executor-backend", IN_CORE_EXECUTOR),
        *("--no-enable-chunked-prefill", "--enforce-eager", "--disable-log-stats"),
    )


class HttpServer:
    """A server that answers chat completions; `fields` set the number of candidates."""

    def __init__(self, client: httpx.AsyncClient, model: str, eos: int, **fields: Any) -> None:
        self._client = client
        self._body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": MAX_TOKENS,
            "logit_bias": {str(eos): NEVER_ENDING},
            **fields,
        }

    async def answer(self) -> tuple[int, list[str]]:
        """(tokens sampled, the answers) of one request."""
        reply = await self._client.post("/v1/chat/completions", json=self._body)
        answer = reply.raise_for_status().json()
        return answer["usage"]["completion_tokens"], [choice["message"]["content"] for choice in answer["choices"]]

    async def __call__(self, requests: int) -> list[int]:
        return [tokens for tokens, _ in await asyncio.gather(*(self.answer() for _ in range(requests)))]


def then_score(server: HttpServer, script: Transformers, prompt: str) -> Way:
    async def answer() -> int:
        tokens, texts = await server.answer()
        script.score([(prompt, text) for text in texts])
        return tokens

    async def way(requests: int) -> list[int]:
        return list(await asyncio.gather(*(answer() for _ in range(requests))))

    return way


def of_script(script: Transformers, prompt: str) -> Way:
    async def way(requests: int) -> list[int]:
        return [script([prompt] * requests) // requests] * requests  # in batches as large as the engine's

    return way


def of_baseline(baseline: BaselineProcess, **fields: Any) -> Way:
    async def way(requests: int) -> list[int]:
        request = {"prompt": PROMPT, "n": BEST_OF, "max_tokens": MAX_TOKENS, "requests": requests, **fields}
        return list((await baseline.answer(**request))["tokens"])

    return way


@contextlib.asynccontextmanager
async def ways(settings: Settings, wanted: list[str]) -> AsyncIterator[tuple[dict[str, Way], dict[str, str]]]:
    """(name -> way, name -> why that way is left out), with all servers running."""
    model, left_out = resolve(settings.model), {}
    by_name: dict[str, Way] = {}
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
        floor = HttpServer(same, model, eos, n=BEST_OF)
        by_name["nbest"] = HttpServer(ours, settings.model, eos, best_of=BEST_OF)
        by_name["vllm, our settings"] = floor
        by_name["vllm, then score"] = then_score(floor, script, rendered)
        by_name["script"] = of_script(script, rendered)
        if "vllm, defaults" in wanted:
            theirs = await stack.enter_async_context(vllm_serve(model))
            by_name["vllm, defaults"] = HttpServer(theirs, model, eos, n=BEST_OF)
        for name, (requirement, worker, torch) in BASELINES.items():
            if name not in wanted:
                continue
            try:
                console.print(f"Preparing an environment for {requirement}; the first time takes a few minutes …")
                python = await asyncio.to_thread(environment, requirement, torch=torch)
                baseline = await stack.enter_async_context(BaselineProcess(python, worker))
                urls = {"url": str(same.base_url), "reward_url": str(ours.base_url)}
                by_name[name] = of_baseline(baseline, model=model, reward_model="movie-sentiment", **urls)
                await by_name[name](1)
            except (BaselineError, OSError, subprocess.CalledProcessError) as error:
                left_out[name] = str(error)
                by_name.pop(name, None)
        yield {name: way for name, way in by_name.items() if name in wanted}, left_out


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
                    await asyncio.sleep(SETTLE_S)
                    start_s = time.perf_counter()
                    try:
                        counts = await by_name[name](requests)
                    except (BaselineError, httpx.HTTPError) as error:
                        left_out[name] = f"{type(error).__name__}: {error}"
                        continue
                    elapsed_s = time.perf_counter() - start_s
                    console.print(f"{number} {name}, {requests} at once: {elapsed_s:.2f} s, {sum(counts)} tokens")
                    if number >= 0:
                        seconds[name][load].append(elapsed_s)
                        tokens[name] += counts
    names = [name for name in names if name not in left_out]
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "best_of": BEST_OF,
        "max_tokens": MAX_TOKENS,
        "at_once": at_once,
        "left_out": left_out,
        "ways": {name: summary(seconds[name], tokens[name], at_once) for name in names},
        "times_as_long_as_nbest": {
            name: {load: paired_ratio(seconds[name][load], seconds["nbest"][load]) for load in ("one", "at once")}
            for name in names
            if name != "nbest"
        },
        "bars": {name: {"load": load, "at_least": bar} for name, (load, bar) in BARS.items()},
    }


def summary(seconds: Mapping[str, list[float]], tokens: list[int], at_once: int) -> dict[str, Any]:
    return {
        "one_request_s": statistics.median(seconds["one"]),
        "requests_per_s": at_once / statistics.median(seconds["at once"]),
        "tokens_a_request": statistics.fmean(tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=4, help="number of concurrent requests in the second load")
    all_ways = ["nbest", *BARS, "vllm, then score"]
    parser.add_argument(
        "--ways", nargs="+", choices=all_ways, default=all_ways, help="ways to measure; nbest always is"
    )
    flags = parser.parse_args()
    wanted = list(dict.fromkeys(["nbest", *flags.ways]))
    write_result("side_by_side", asyncio.run(measure(flags.rounds, flags.at_once, wanted)))


if __name__ == "__main__":
    main()
