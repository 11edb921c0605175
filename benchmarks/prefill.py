"""Seconds of 16 candidates for one prompt: nbest's engine, which computes the prompt once, against `vllm serve`, n=16.

Generation alone, with the same model and the same token ids. Both engines run at the same time and answer alternately;
an idle engine does not compute. nbest's engine is called in this process, `vllm serve` over HTTP on the loopback, which
adds a few milliseconds. By default `vllm serve` would reserve 92 % of the machine's memory; here it gets 2 GiB for keys
and values, as nbest's engine does and many times what 16 candidates need.

`vllm serve` is measured twice: with its defaults, and with nbest's precision, which separates the effect of precision
from that of the prompt.

    python -m benchmarks.prefill [--rounds 5]
"""

import argparse
import asyncio
import statistics
import time
from typing import Any

import httpx
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.provenance import provenance
from benchmarks.scoring_overhead import BEST_OF, PROMPT
from benchmarks.server_processes import vllm_serve
from benchmarks.stats import paired_ratio, write_result
from reranker.models.bundled import resolve
from server.config import Settings
from server.generation.base import SamplingParams
from server.generation.engine_arguments import EngineOptions, pick_dtype
from server.generation.vllm_engine import VllmGenerator

MAX_TOKENS = (1, 32, 64)
CONTEXT = 2048
console = Console(stderr=True)


async def vllm_s(client: httpx.AsyncClient, model: str, token_ids: list[int], max_tokens: int) -> float:
    """Seconds that `vllm serve` takes for BEST_OF candidates of `max_tokens` tokens."""
    start_s = time.perf_counter()
    body = {"model": model, "prompt": token_ids, "n": BEST_OF, "max_tokens": max_tokens, "ignore_eos": True}
    reply = await client.post("/v1/completions", json=body)
    elapsed_s = time.perf_counter() - start_s
    assert reply.json()["usage"]["completion_tokens"] == BEST_OF * max_tokens, reply.text
    return elapsed_s


async def nbest_s(generator: VllmGenerator, max_tokens: int, eos: int) -> float:
    """Seconds that nbest's engine takes for BEST_OF candidates of `max_tokens` tokens."""
    start_s, tokens = time.perf_counter(), 0
    # Biasing EOS away makes every candidate run to max_tokens, as ignore_eos does.
    sampling = SamplingParams(max_tokens=max_tokens, logit_bias=((eos, -100.0),))
    async with generator.generate(PROMPT, sampling, BEST_OF) as generation:
        async for outcomes in generation:
            tokens += sum(getattr(outcome, "num_tokens", 0) for outcome in outcomes)
    elapsed_s = time.perf_counter() - start_s
    assert tokens == BEST_OF * max_tokens, tokens
    return elapsed_s


async def measure(rounds: int) -> dict[str, Any]:
    settings = Settings()
    model = resolve(settings.model)
    dtype = pick_dtype("cpu")
    options = EngineOptions(model=model, device="cpu", max_model_len=CONTEXT, block_size=settings.block_size)
    ours = await VllmGenerator.create(options, name="ours")
    token_ids = await ours.encode(PROMPT)
    eos = AutoTokenizer.from_pretrained(model).eos_token_id
    arms = {"defaults": [], f"defaults with dtype {dtype}": ["--dtype", dtype]}
    figures: dict[str, Any] = {}
    for arm, flags in arms.items():
        console.print(f"vllm serve, {arm}")
        async with vllm_serve(model, *flags) as client:
            for max_tokens in MAX_TOKENS:
                theirs_s: list[float] = []
                ours_s: list[float] = []
                for number in range(rounds + 1):
                    elapsed_s = (
                        await vllm_s(client, model, token_ids, max_tokens),
                        await nbest_s(ours, max_tokens, eos),
                    )
                    if number:  # the first round warms up
                        theirs_s.append(elapsed_s[0])
                        ours_s.append(elapsed_s[1])
                figures.setdefault(arm, {})[str(max_tokens)] = {
                    "vllm_serve_s": statistics.median(theirs_s),
                    "ours_s": statistics.median(ours_s),
                    "ratio": paired_ratio(theirs_s, ours_s),
                }
                console.print(max_tokens, figures[arm][str(max_tokens)])
    await ours.close()
    return {
        "provenance": provenance(flags={"block_size": settings.block_size, "dtype": dtype}),
        "prompt_tokens": len(token_ids),
        "best_of": BEST_OF,
        "by_max_tokens": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    write_result("prefill", asyncio.run(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
