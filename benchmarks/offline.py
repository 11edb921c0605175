"""What the offline mode makes of the engine, and against the simplest way to do the same; all in turn, in one run.

    bare engine     every candidate of every prompt handed to the engine at once, nothing scored, nothing written;
                    against it the offline mode with the scorer `logprob`, files and all: tokens/s
    transformers    one process that first generates everything with `generate`, in batches as large as the engine's,
                    and then scores everything in padded batches; against it the offline mode with the reward model:
                    pairs of a prompt and a scored completion a second

All draw the same number of tokens: the end of a text is biased away. Both ways load the same weights in the same
precision. The order turns from round to round.

    python -m benchmarks.offline [--rounds 3] [--best-of 8] [--max-tokens 48] [--prompts 30]
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.birth import birth_certificate
from benchmarks.film_reviews import OPENINGS
from benchmarks.stats import hand_in, paired_ratio
from reranker.candidate import Prompt
from reranker.prepared import resolve
from reranker.rendering import pad
from reranker.reward_model import RewardModel, forward_rewards
from server import assembly
from server.batch import drawing_models
from server.config import Settings
from server.generation.base import Sampling
from server.generation.vllm_engine import pick_dtype
from server.offline.directory import RunDirectory
from server.offline.line_set import Names
from server.offline.records import Failure, Result
from server.offline.run import Run
from server.offline.tasks import Drawing, read_task
from server.pipeline import BestOfN

SCORING_ROWS = 32
"""Rows of a padded batch of transformers' arm."""
BARS = {"bare engine": 0.9, "transformers": 2.0}
"""How many times as fast as the other way the offline mode has to be."""

console = Console(stderr=True)


class Tokens:
    """Counts what an offline run has drawn; a line that failed ends the benchmark."""

    def __init__(self) -> None:
        self.generated = 0

    def wrote(self, record: Result | Failure) -> None:
        assert isinstance(record, Result), record
        self.generated += record.generated_tokens


class Ways:
    """The ways to answer the same prompts; each returns the number of tokens it has drawn."""

    def __init__(self, pipeline: BestOfN, settings: Settings, best_of: int, max_tokens: int, prompts: int) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._best_of = best_of
        self._max_tokens = max_tokens
        self._prompts = [OPENINGS[number % len(OPENINGS)] for number in range(prompts)]
        self._tokenizer = AutoTokenizer.from_pretrained(resolve(settings.model), padding_side="left")
        dtype = getattr(torch, pick_dtype("cpu"))
        self._policy = AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=dtype).eval()
        self._reward_model = RewardModel.load(settings.reward_models["movie-sentiment"], device="cpu")
        # The model as transformers itself runs it; ours computes a prompt once by an attention of its own.
        self._classifier = self._reward_model._model
        self._classifier.set_attn_implementation("sdpa")

    async def bare_engine(self, seed: int) -> int:
        never_ending = ((self._tokenizer.eos_token_id, -100.0),)

        async def draw(number: int, prompt: str) -> int:
            sampling = Sampling(max_tokens=self._max_tokens, seed=seed + 1000 * number, logit_bias=never_ending)
            async with self._pipeline.generator.generate(Prompt(text=prompt), sampling, self._best_of) as generation:
                return sum([getattr(one, "num_tokens", 0) async for outcomes in generation for one in outcomes])

        return sum(await asyncio.gather(*(draw(*one) for one in enumerate(self._prompts))))

    def offline(self, reward_model: str) -> Callable[[int], Awaitable[int]]:
        async def run(seed: int) -> int:
            body = {
                "best_of": self._best_of,
                "max_tokens": self._max_tokens,
                "logit_bias": {str(self._tokenizer.eos_token_id): -100},
                "nbest": {"reward_model": reward_model},
            }
            kind, names, tokens = Drawing(self._settings, self._settings.model, seed, body), Names(), Tokens()
            rows = (
                read_task(line, {"prompt": prompt}, kind, names, self._settings.max_body_bytes)
                for line, prompt in enumerate(self._prompts, start=1)
            )
            models = drawing_models(self._pipeline)
            with tempfile.TemporaryDirectory() as out:
                records = RunDirectory(Path(out))
                in_flight = self._settings.max_num_seqs * 3 // 2
                await Run(models.answer, models.check_ready, records, tokens, in_flight=in_flight).through(rows)
                records.close()
            return tokens.generated

        return run

    async def transformers(self, seed: int) -> int:
        """Blocks the event loop: nothing else runs meanwhile."""
        torch.manual_seed(seed)
        prompts_a_batch = max(1, self._settings.max_num_seqs // self._best_of)
        texts = [
            one
            for start in range(0, len(self._prompts), prompts_a_batch)
            for one in self._generate(self._prompts[start : start + prompts_a_batch])
        ]
        for start in range(0, len(texts), SCORING_ROWS):
            rendered = [self._reward_model.render(Prompt(text=p), t) for p, t in texts[start : start + SCORING_ROWS]]
            with torch.inference_mode():
                forward_rewards(self._classifier, *pad(rendered, pad_id=self._tokenizer.pad_token_id))
        return len(texts) * self._max_tokens

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        asked = self._tokenizer(prompts, return_tensors="pt", padding=True)
        drawn = self._policy.generate(
            **asked,
            do_sample=True,
            top_k=0,
            num_return_sequences=self._best_of,
            min_new_tokens=self._max_tokens,
            max_new_tokens=self._max_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        answers = self._tokenizer.batch_decode(drawn[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return [(prompts[number // self._best_of], answer) for number, answer in enumerate(answers)]


async def measure(rounds: int, best_of: int, max_tokens: int, prompts: int) -> dict[str, Any]:
    settings = Settings(
        reward_models={"movie-sentiment": "movie-sentiment", "likely": "logprob"}, max_model_len=2048, max_best_of=64
    )
    seconds: dict[str, list[float]] = {}
    candidates = prompts * best_of
    async with assembly.start(settings) as pipeline:
        ways = Ways(pipeline, settings, best_of, max_tokens, prompts)
        by_name = {
            "bare engine": ways.bare_engine,
            "offline, logprob": ways.offline("likely"),
            "offline, reward model": ways.offline("movie-sentiment"),
            "transformers": ways.transformers,
        }
        names = list(by_name)
        for number in range(-1, rounds):  # the first round warms up
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                started_s = time.perf_counter()
                drawn = await by_name[name]((number + 2) * 10_000_000)
                elapsed_s = time.perf_counter() - started_s
                assert drawn == candidates * max_tokens, f"{name} drew {drawn} tokens"
                if number >= 0:
                    seconds.setdefault(name, []).append(elapsed_s)
                console.print(number, name, f"{elapsed_s:.2f} s")
    speeds = {
        "bare engine": paired_ratio(seconds["bare engine"], seconds["offline, logprob"]),
        "transformers": paired_ratio(seconds["transformers"], seconds["offline, reward model"]),
    }
    return {
        "birth": birth_certificate(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "prompts": prompts,
        "best_of": best_of,
        "max_tokens": max_tokens,
        "tokens_per_s": {name: candidates * max_tokens / statistics.median(times) for name, times in seconds.items()},
        "pairs_per_s": {name: candidates / statistics.median(times) for name, times in seconds.items()},
        "times_as_fast_as": {name: {**ratio, "bar": BARS[name]} for name, ratio in speeds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=len(OPENINGS))
    arguments = parser.parse_args()
    hand_in("offline", asyncio.run(measure(**vars(arguments))))


if __name__ == "__main__":
    main()
