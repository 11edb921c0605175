"""Throughput of the offline mode, against the bare engine and against a transformers script, alternately in one run.

    bare engine     all candidates of all prompts submitted to the engine at once, without scoring or files; compared
                    with the offline mode with the scorer `logprob`: tokens/s
    transformers    one process that first generates everything with `generate`, in batches as large as the engine's,
                    and then scores everything in padded batches; compared with the offline mode with the reward
                    model: pairs of a prompt and a scored completion a second

Two workloads, the extremes of what offline runs have:

    openings    openings of film reviews, five tokens each; EOS is biased away, so every candidate has the maximum
                number of tokens, no slot of a batch is free early, and there is little prompt to share
    problems    arithmetic word problems after worked examples; a candidate ends with its line

All ways load the same weights in the same precision. Their order rotates from round to round.

    python -m benchmarks.offline [--rounds 3] [--best-of 8] [--prompts 30]
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.film_reviews import OPENINGS
from benchmarks.provenance import provenance
from benchmarks.stats import paired_ratio, write_result
from benchmarks.word_problems import word_problems
from reranker.candidate import Prompt
from reranker.models.bundled import resolve
from reranker.models.rendering import pad
from reranker.models.reward_model import RewardModel, forward_rewards
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.generation.engine_arguments import pick_dtype
from server.offline.batch import pipeline_backend
from server.offline.custom_ids import CustomIds
from server.offline.records import Failure, Result
from server.offline.run_directory import RunDirectory
from server.offline.scheduler import BatchScheduler
from server.offline.tasks import BatchTaskParser, read_task
from server.pipeline.best_of_n import BestOfN

PROBLEMS_SEED = 1
NEVER_ENDING = -100.0
"""Logit bias of EOS, so that no candidate ends before max_tokens."""
SCORING_ROWS = 32
"""Rows of a padded batch in the transformers script."""
BARS = {"bare engine": 0.9, "transformers": 2.0}
"""The speed of the offline mode relative to the other way that is to be reached."""

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Work:
    """A workload. `stop` is the string that ends a candidate, None where only max_tokens does."""

    prompts: Sequence[str]
    max_tokens: int
    stop: str | None


def works(num_prompts: int) -> dict[str, Work]:
    openings = [OPENINGS[number % len(OPENINGS)] for number in range(num_prompts)]
    problems = [problem.prompt for problem in word_problems(num_prompts, seed=PROBLEMS_SEED)]
    return {"openings": Work(openings, 48, None), "problems": Work(problems, 24, "\n")}


class TokenCounter:
    """Counts the tokens that an offline run samples; a failed line ends the benchmark."""

    def __init__(self) -> None:
        self.generated = 0

    def count(self, record: Result | Failure) -> None:
        assert isinstance(record, Result), record
        self.generated += record.generated_tokens


class Ways:
    """The ways to do the same work; each takes a seed and returns the number of tokens sampled."""

    def __init__(self, pipeline: BestOfN, settings: Settings, best_of: int, work: Work) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self.best_of = best_of
        self._work = work
        self._transformers = Transformers(settings, best_of, work)

    async def bare_engine(self, seed: int) -> int:
        eos = self._transformers.tokenizer.eos_token_id
        ends: Mapping[str, Any] = (
            {"stop": (self._work.stop,)} if self._work.stop else {"logit_bias": ((eos, NEVER_ENDING),)}
        )

        async def draw(number: int, prompt: str) -> int:
            sampling = SamplingParams(max_tokens=self._work.max_tokens, seed=seed + 1000 * number, **ends)
            async with self._pipeline.generator.generate(Prompt(text=prompt), sampling, self.best_of) as generation:
                return sum([getattr(outcome, "num_tokens", 0) async for outcomes in generation for outcome in outcomes])

        return sum(await asyncio.gather(*(draw(number, prompt) for number, prompt in enumerate(self._work.prompts))))

    def offline(self, reward_model: str) -> Callable[[int], Awaitable[int]]:
        eos = self._transformers.tokenizer.eos_token_id
        ends = {"stop": [self._work.stop]} if self._work.stop else {"logit_bias": {str(eos): NEVER_ENDING}}
        body = {
            "best_of": self.best_of,
            "max_tokens": self._work.max_tokens,
            "nbest": {"reward_model": reward_model},
            **ends,
        }

        async def run(seed: int) -> int:
            parser = BatchTaskParser(self._settings, self._settings.model, seed, body)
            custom_ids, tokens = CustomIds(), TokenCounter()
            rows = (
                read_task(line, {"prompt": prompt}, parser, custom_ids, self._settings.max_body_bytes)
                for line, prompt in enumerate(self._work.prompts, start=1)
            )
            backend = pipeline_backend(self._pipeline)
            with tempfile.TemporaryDirectory() as out:
                records = RunDirectory(Path(out))
                in_flight = self._settings.max_num_seqs * 3 // 2
                await BatchScheduler(backend, records, tokens.count, in_flight=in_flight).run(rows)
                records.close()
            return tokens.generated

        return run

    async def transformers(self, seed: int) -> int:
        """Blocks the event loop, since nothing else is to run during it."""
        torch.manual_seed(seed)
        return self._transformers()


class Transformers:
    """Generates everything in batches as large as the engine's, then scores everything in padded batches."""

    def __init__(self, settings: Settings, best_of: int, work: Work) -> None:
        self._best_of = best_of
        self._work = work
        self._prompts_a_batch = max(1, settings.max_num_seqs // best_of)
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(settings.model), padding_side="left")
        dtype = getattr(torch, pick_dtype("cpu"))
        self._policy = AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=dtype).eval()
        self._reward_model = RewardModel.load(settings.reward_models["movie-sentiment"], device="cpu")
        # As transformers runs the model: nbest's own attention, which computes a shared prompt once, is switched off.
        self._classifier = self._reward_model._model
        self._classifier.set_attn_implementation("sdpa")
        self._ends = [self.tokenizer.eos_token_id]
        if work.stop is not None:  # every token that contains the string ends a candidate, as in the engine
            tokens = self.tokenizer.batch_decode([[token_id] for token_id in range(len(self.tokenizer))])
            self._ends += [token_id for token_id, text in enumerate(tokens) if work.stop in text]

    def __call__(self, prompts: Sequence[str] | None = None) -> int:
        """Answers these prompts, by default those of the workload; returns the number of tokens sampled."""
        prompts, num_tokens = self._work.prompts if prompts is None else prompts, 0
        texts: list[tuple[str, str]] = []
        for start in range(0, len(prompts), self._prompts_a_batch):
            pairs, tokens = self._generate(prompts[start : start + self._prompts_a_batch])
            texts += pairs
            num_tokens += tokens
        self.score(texts)
        return num_tokens

    @torch.inference_mode()
    def score(self, texts: Sequence[tuple[str, str]]) -> None:
        """Scores pairs of a prompt and an answer in padded batches."""
        for start in range(0, len(texts), SCORING_ROWS):
            batch = texts[start : start + SCORING_ROWS]
            rendered = [self._reward_model.render(Prompt(text=prompt), answer) for prompt, answer in batch]
            forward_rewards(self._classifier, *pad(rendered, pad_id=self.tokenizer.pad_token_id))

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str]) -> tuple[list[tuple[str, str]], int]:
        """Pairs of a prompt and an answer, and the number of tokens of all answers."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        tokens_N_T = self._policy.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=self._best_of,
            min_new_tokens=None if self._work.stop else self._work.max_tokens,
            max_new_tokens=self._work.max_tokens,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.eos_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        ends_N_T = torch.isin(tokens_N_T, torch.tensor(self._ends)).int()
        sampled_N_T = ends_N_T.cumsum(-1) - ends_N_T == 0  # up to and with the first end
        answers = self.tokenizer.batch_decode(tokens_N_T, skip_special_tokens=True)
        pairs = [(prompts[number // self._best_of], answer) for number, answer in enumerate(answers)]
        return pairs, int(sampled_N_T.sum())


async def measure(rounds: int, best_of: int, prompts: int) -> dict[str, Any]:
    settings = Settings(
        reward_models={"movie-sentiment": "movie-sentiment", "likely": "logprob"}, max_model_len=2048, max_best_of=64
    )
    async with factory.start(settings) as pipeline:
        by_work = {
            name: await measure_work(Ways(pipeline, settings, best_of, work), work, rounds)
            for name, work in works(prompts).items()
        }
    return {
        "provenance": provenance(flags=settings.model_dump(exclude={"api_key", "judge_api_key"}, mode="json")),
        "prompts": prompts,
        "best_of": best_of,
        "works": by_work,
    }


async def measure_work(ways: Ways, work: Work, rounds: int) -> dict[str, Any]:
    """Speeds of all ways on one workload, and the ratios."""
    by_name = {
        "bare engine": ways.bare_engine,
        "offline, logprob": ways.offline("likely"),
        "offline, reward model": ways.offline("movie-sentiment"),
        "transformers": ways.transformers,
    }
    names = list(by_name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first round warms up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start_s = time.perf_counter()
            num_tokens = await by_name[name]((number + 2) * 10_000_000)
            elapsed_s = time.perf_counter() - start_s
            console.print(number, name, f"{elapsed_s:.2f} s, {num_tokens} tokens")
            if number >= 0:
                seconds[name].append(elapsed_s)
                tokens[name].append(num_tokens)
    ratios = {
        "bare engine": paired_ratio(seconds["bare engine"], seconds["offline, logprob"]),
        "transformers": paired_ratio(seconds["transformers"], seconds["offline, reward model"]),
    }
    candidates = len(work.prompts) * ways.best_of
    return {
        "max_tokens": work.max_tokens,
        "tokens_a_candidate": {name: fmean(counts) / candidates for name, counts in tokens.items()},
        "tokens_per_s": {name: sum(tokens[name]) / sum(times) for name, times in seconds.items()},
        "pairs_per_s": {name: candidates / median(times) for name, times in seconds.items()},
        "times_as_fast_as": {name: {**ratio, "bar": BARS[name]} for name, ratio in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=len(OPENINGS))
    arguments = parser.parse_args()
    write_result("offline", asyncio.run(measure(**vars(arguments))))


if __name__ == "__main__":
    main()
