"""Pools to try stopping policies on: candidates with their tokens and rewards, and what their beginnings are worth.

Draws 32 continuations of every opening with `nbest batch`, then cuts each after 8, 16 and 32 tokens and has the reward
model score those as well. Both go on in --out where they were interrupted; the result is for `benchmarks.stopping`.

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
from benchmarks.stats import hand_in
from reranker.candidate import Candidate
from reranker.models.bundled import resolve
from reranker.scorers.base import Scorer
from server import factory
from server.config import Settings
from server.generation.base import Generator
from server.offline.records import Result

BEST_OF, MAX_TOKENS, SEED = 32, 64, 7
LENGTHS = (8, 16, 32)
"""Tokens after which a beginning is scored."""


def draw(out: Path, prompts: int) -> list[Result]:
    """The first results of the run, which goes on if there are too few."""
    run = out / "pool"
    if len(drawn(run)) < prompts:
        openings = write_openings(out / "prompts.jsonl", training_openings.OPENINGS[:prompts])
        sampling = ("--best-of", f"{BEST_OF}", "--max-tokens", f"{MAX_TOKENS}", "--temperature", "1.0")
        nbest("batch", str(openings), "--out", str(run), "--model", MODEL, *sampling, "--seed", f"{SEED}")
    return drawn(run)[:prompts]


def drawn(run: Path) -> list[Result]:
    path = run / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Result.model_validate_json(line) for line in lines), key=lambda one: one.line)


async def beginnings(result: Result, tokenizer: Any, scorer: Scorer) -> dict[str, list[float | None]]:
    """By length, the rewards of the candidates cut there; None for those that are no longer."""
    ids_N = [tokenizer(one.text, add_special_tokens=False)["input_ids"] for one in result.candidates]
    found: dict[str, list[float | None]] = {}
    for length in LENGTHS:
        longer = [index for index, one in enumerate(result.candidates) if one.num_tokens > length]
        cut = [
            Candidate(index, tokenizer.decode(ids_N[index][:length]), length, finish_reason="length")
            for index in longer
        ]
        rewards = dict(zip(longer, (await scorer.score(result.asked, cut)).rewards_N, strict=True))
        found[str(length)] = [
            round(rewards[index], 4) if index in rewards else None for index in range(len(result.candidates))
        ]
    return found


async def score_beginnings(out: Path, results: list[Result]) -> dict[int, dict[str, list[float | None]]]:
    """By the line of the result."""
    journal = out / "beginnings.jsonl"
    done = dict(json.loads(line) for line in journal.read_text().splitlines()) if journal.exists() else {}
    missing = [one for one in results if one.line not in done]
    if not missing:
        return done
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    nobody: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()
    async with factory.started_scorers(Settings(), nobody) as scorers:
        (scorer,) = scorers.values()
        with journal.open("a") as lines:
            for result in track(missing, "Scoring beginnings", console=Console(stderr=True)):
                done[result.line] = await beginnings(result, tokenizer, scorer)
                lines.write(json.dumps([result.line, done[result.line]]) + "\n")
                lines.flush()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reward_pools"), help="keeps what is drawn and scored")
    most = len(training_openings.OPENINGS)
    parser.add_argument("--prompts", type=int, default=most, help="how many openings, the first ones")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = draw(out, arguments.prompts)
    found = asyncio.run(score_beginnings(out, results))
    hand_in(
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
                    "rewards": [None if one.reward is None else round(one.reward, 4) for one in result.candidates],
                    "tokens": [one.num_tokens for one in result.candidates],
                    "beginnings": found[result.line],
                }
                for result in results
            ],
        },
    )


if __name__ == "__main__":
    main()
