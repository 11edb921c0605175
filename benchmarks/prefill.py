"""The prompt is computed once, not N times: our engine against `vllm serve` with its defaults and n=16.

Generation alone, on the same model and the same token ids, 16 candidates each. Both engines are up at the same time
and answer in turn; an idle engine does not compute. Ours is asked through its Python interface, `vllm serve` through
HTTP on the loopback, which costs it a few milliseconds. By default it would reserve 92 % of the machine's memory; it
gets 2 GiB for keys and values, as ours does and many times what 16 candidates need.

`vllm serve` runs twice: with its defaults, and once more in our precision, so that the part of the difference that is
precision alone shows apart from the part that is the prompt.

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
from benchmarks.stats import hand_in, paired_ratio
from reranker.models.bundled import resolve
from server.config import Settings
from server.generation.base import SamplingParams
from server.generation.vllm_engine import VllmGenerator, pick_dtype

MAX_TOKENS = (1, 32, 64)
CONTEXT = 2048
console = Console(stderr=True)


async def ask_vllm(client: httpx.AsyncClient, model: str, token_ids: list[int], max_tokens: int) -> float:
    started_s = time.perf_counter()
    body = {"model": model, "prompt": token_ids, "n": BEST_OF, "max_tokens": max_tokens, "ignore_eos": True}
    reply = await client.post("/v1/completions", json=body)
    elapsed_s = time.perf_counter() - started_s
    assert reply.json()["usage"]["completion_tokens"] == BEST_OF * max_tokens, reply.text
    return elapsed_s


async def ask_ours(generator: VllmGenerator, max_tokens: int, eos: int) -> float:
    started_s, tokens = time.perf_counter(), 0
    # A biased-away EOS makes every candidate run to max_tokens, as ignore_eos does.
    sampling = SamplingParams(max_tokens=max_tokens, logit_bias=((eos, -100.0),))
    async with generator.generate(PROMPT, sampling, BEST_OF) as generation:
        async for outcomes in generation:
            tokens += sum(getattr(one, "num_tokens", 0) for one in outcomes)
    elapsed_s = time.perf_counter() - started_s
    assert tokens == BEST_OF * max_tokens, tokens
    return elapsed_s


async def measure(rounds: int) -> dict[str, Any]:
    settings = Settings()
    model = resolve(settings.model)
    dtype = pick_dtype("cpu")
    ours = await VllmGenerator.create(
        model, name="ours", device="cpu", max_model_len=CONTEXT, block_size=settings.block_size
    )
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
                    a, b = (
                        await ask_vllm(client, model, token_ids, max_tokens),
                        await ask_ours(ours, max_tokens, eos),
                    )
                    if number:  # the first round warms up
                        theirs_s.append(a)
                        ours_s.append(b)
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
    hand_in("prefill", asyncio.run(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
