"""Pools of scored candidates and of their scored prefixes, as input to `benchmarks.stopping`.

It samples 32 continuations of every opening with `nbest batch`, then cuts each after 8, 16 and 32 tokens and scores
these prefixes with the reward model. An interrupted run continues from --out.

    python -m benchmarks.reward_pools [--out runs/reward_pools] [--prompts 48]
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from benchmarks import training_openings
from benchmarks.policy_evaluation import MODEL, nbest, write_openings
from benchmarks.provenance import provenance
from benchmarks.stats import write_result
from reranker.candidate import Candidate
from reranker.models.bundled import resolve
from reranker.scorers.base import Scorer
from server import factory
from server.config import Settings
from server.generation.base import Generator
from server.offline.records import Result

BEST_OF, MAX_TOKENS, SEED = 32, 64, 7
LENGTHS = (8, 16, 32)
"""Token counts after which a candidate is cut and scored."""


def draw(out: Path, prompts: int) -> list[Result]:
    """The results of the first `prompts` openings; samples those that are missing."""
    run = out / "pool"
    if len(read_results(run)) < prompts:
        openings = write_openings(out / "prompts.jsonl", training_openings.OPENINGS[:prompts])
        sampling = ("--best-of", f"{BEST_OF}", "--max-tokens", f"{MAX_TOKENS}", "--temperature", "1.0")
        nbest("batch", str(openings), "--out", str(run), "--model", MODEL, *sampling, "--seed", f"{SEED}")
    return read_results(run)[:prompts]


def read_results(run: Path) -> list[Result]:
    path = run / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Result.model_validate_json(line) for line in lines), key=lambda result: result.line)


async def score_prefixes(result: Result, tokenizer: Any, scorer: Scorer) -> dict[str, list[float | None]]:
    """Length -> the rewards of the candidates cut there; None for candidates that are not longer."""
    ids_N = [tokenizer(candidate.text, add_special_tokens=False)["input_ids"] for candidate in result.candidates]
    prefixes: dict[str, list[float | None]] = {}
    for length in LENGTHS:
        longer = [index for index, candidate in enumerate(result.candidates) if candidate.num_tokens > length]
        cut = [
            Candidate(index, tokenizer.decode(ids_N[index][:length]), length, finish_reason="length")
            for index in longer
        ]
        rewards = dict(zip(longer, (await scorer.score(result.to_prompt(), cut)).rewards_N, strict=True))
        prefixes[str(length)] = [
            round(rewards[index], 4) if index in rewards else None for index in range(len(result.candidates))
        ]
    return prefixes


async def score_all_prefixes(out: Path, results: list[Result]) -> dict[int, dict[str, list[float | None]]]:
    """Line of the result -> the rewards of its candidates' prefixes, kept in OUT/beginnings.jsonl."""
    journal = out / "beginnings.jsonl"
    done = dict(json.loads(line) for line in journal.read_text().splitlines()) if journal.exists() else {}
    missing = [result for result in results if result.line not in done]
    if not missing:
        return done
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    no_generator: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()
    async with factory.started_scorers(Settings(), no_generator) as scorers:
        (scorer,) = scorers.values()
        with journal.open("a") as lines:
            for result in track(missing, "Scoring prefixes", console=Console(stderr=True)):
                done[result.line] = await score_prefixes(result, tokenizer, scorer)
                lines.write(json.dumps([result.line, done[result.line]]) + "\n")
                lines.flush()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward_pools"), help="directory of samples and rewards")
    num_openings = len(training_openings.OPENINGS)
    parser.add_argument("--prompts", type=int, default=num_openings, help="use the first PROMPTS openings")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = draw(out, arguments.prompts)
    prefixes = asyncio.run(score_all_prefixes(out, results))
    write_result(
        "reward_pools",
        {
            "provenance": provenance(),
            "policy": MODEL,
            "reward_model": results[0].reward_model,
            "max_tokens": MAX_TOKENS,
            "best_of": BEST_OF,
            "seed": SEED,
            "lengths": list(LENGTHS),
            "samples": [
                {
                    "prompt": result.prompt,
                    "prompt_tokens": result.prompt_tokens,
                    "rewards": [
                        None if candidate.reward is None else round(candidate.reward, 4)
                        for candidate in result.candidates
                    ],
                    "tokens": [candidate.num_tokens for candidate in result.candidates],
                    "beginnings": prefixes[result.line],
                }
                for result in results
            ],
        },
    )


if __name__ == "__main__":
    main()
