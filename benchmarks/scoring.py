"""Seconds to score a prompt's candidates: nbest's reward model against three other ways with the same weights.

SmolLM2's trunk in full depth and float32 under a random scalar head; 16 candidates of equal length, of random tokens
that are new in every round, so that no cache holds them. Equal lengths are the best case for a padded batch, which
then has no padding.

    padded       transformers' sequence classifier, all candidates in one batch
    one by one   the same classifier, one candidate at a time
    vllm         `vllm serve --runner pooling` with prefix caching, both cores, raw scores, one request over HTTP;
                 blocks of 32 tokens, so that more of the prompt is shared than with its default of 128

All four must return the same rewards, which is asserted. Their order rotates from round to round. On a machine that
also runs other programs, set OMP_WAIT_POLICY=passive for all of them: threads that spin while they wait for a
descheduled thread take the cores from threads that work.

    python -m benchmarks.scoring [--rounds 5]
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.provenance import provenance
from benchmarks.server_processes import vllm_serve
from benchmarks.stats import paired_ratio, write_result
from reranker.models.bundled import resolve
from reranker.models.rendering import Rendered
from reranker.models.reward_model import RewardModel, load_classifier

MODEL = "smollm2-135m-instruct"
BEST_OF = 16
VLLM_FLAGS = (
    *("--runner", "pooling", "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"),
    *("--enforce-eager", "--enable-prefix-caching"),
)
BARS = {
    (200, 200): {"padded": 1.5, "one by one": 1.0, "vllm": 1.0},
    (1000, 64): {"padded": 8.0, "one by one": 1.0, "vllm": 1.0},
}
"""(prompt tokens, candidate tokens) -> how many times as long as nbest each other way has to take."""
MAX_DIFFERENCE = 1e-4
"""Tolerance between the rewards of two ways. Rewards are about 1; thirty layers sum in different orders."""

Way = Callable[[Sequence[Rendered]], Awaitable[list[float]]]
console = Console(stderr=True)


def save_reward_model(directory: Path) -> None:
    """Saves the trunk with a random head, for all four ways to load."""
    torch.manual_seed(0)
    model = load_classifier(resolve(MODEL), new_head=True)
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def draw(prompt_tokens: int, candidate_tokens: int, seed: int) -> list[Rendered]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(100, 40_000, (length,), generator=generator).tolist()

    prompt = ids(prompt_tokens)
    return [Rendered((*prompt, *ids(candidate_tokens)), prompt_tokens) for _ in range(BEST_OF)]


def ways(directory: Path, client: httpx.AsyncClient) -> dict[str, Way]:
    ours = RewardModel.load(str(directory), device="cpu", dtype="float32")
    assert ours.shares_prompts
    theirs = load_classifier(str(directory)).eval()

    async def our_engine(batch: Sequence[Rendered]) -> list[float]:
        return ours.score(batch)

    async def padded(batch: Sequence[Rendered]) -> list[float]:
        ids = torch.tensor([row.token_ids for row in batch])
        with torch.inference_mode():
            logits: list[float] = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].tolist()
        return logits

    async def one_by_one(batch: Sequence[Rendered]) -> list[float]:
        return [(await padded([row]))[0] for row in batch]

    async def vllm(batch: Sequence[Rendered]) -> list[float]:
        body = {"model": str(directory), "use_activation": False, "input": [list(row.token_ids) for row in batch]}
        reply = await client.post("/classify", json=body)
        return [line["probs"][0] for line in sorted(reply.json()["data"], key=lambda line: int(line["index"]))]

    return {"ours": our_engine, "padded": padded, "one by one": one_by_one, "vllm": vllm}


async def measure(rounds: int) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_reward_model(directory)
        async with vllm_serve(name, *VLLM_FLAGS, VLLM_CPU_OMP_THREADS_BIND="0-1") as client:
            by_name = ways(directory, client)
            for way in by_name.values():
                await way(draw(48, 16, seed=0))  # warms up
            for prompt_tokens, candidate_tokens in BARS:
                cases[f"{prompt_tokens}+{candidate_tokens}"] = await _measure_case(
                    by_name, prompt_tokens, candidate_tokens, rounds
                )
    flags = {
        "model": MODEL,
        "dtype": "float32",
        "torch_threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        "vllm": " ".join(VLLM_FLAGS),
    }
    return {"provenance": provenance(flags=flags), "best_of": BEST_OF, "rounds": rounds, "cases": cases}


async def _measure_case(by_name: dict[str, Way], prompt_tokens: int, candidate_tokens: int, rounds: int) -> Any:
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    largest_difference = 0.0
    names = list(by_name)
    for number in range(rounds):
        batch = draw(prompt_tokens, candidate_tokens, seed=number + 1)
        rewards: dict[str, list[float]] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start_s = time.perf_counter()
            rewards[name] = await by_name[name](batch)
            seconds[name].append(time.perf_counter() - start_s)
        for name in names:
            difference = max(abs(a - b) for a, b in zip(rewards[name], rewards["ours"], strict=True))
            assert difference < MAX_DIFFERENCE, f"{name} differs by {difference}"
            largest_difference = max(largest_difference, difference)
        console.print(prompt_tokens, candidate_tokens, {name: round(times[-1], 2) for name, times in seconds.items()})
    bars = BARS[prompt_tokens, candidate_tokens]
    return {
        "prompt_tokens": prompt_tokens,
        "candidate_tokens": candidate_tokens,
        "seconds": {
            name: {"median": statistics.median(times), "low": min(times), "high": max(times)}
            for name, times in seconds.items()
        },
        "times_longer_than_ours": {
            name: {**paired_ratio(seconds[name], seconds["ours"]), "bar": bar} for name, bar in bars.items()
        },
        "largest_difference_of_rewards": largest_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    write_result("scoring", asyncio.run(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
