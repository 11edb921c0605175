"""Best-of-n taught to the policy itself, round by round: `nbest improve`.

A round draws N candidates for every training prompt from the policy as it is, keeps the winners, fine-tunes the policy
on them, and measures it on held-out prompts at best_of=1. This is rejection-sampling fine-tuning, iterated (RAFT,
arXiv 2304.06767): each round goes on from the policy of the one before.

    OUT/prompts/          train.jsonl, held-out.jsonl, and run.json: what the run is
    OUT/round-0/          evaluation/: the policy before any training
    OUT/round-K/          samples/, winners.jsonl with its card, sft/ with the adapter and the model, evaluation/
    OUT/summary.json      the table that is shown at the end

Each step is an nbest command (see `training.policy.subcommands`), and done where its result is there.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reranker.fsio import share_of
from training.atomic_directory import appearing_whole
from training.checkpoints import require_same_run, write_run
from training.data.data_source import Source, read_records
from training.data.preferences import DataError
from training.errors import TrainingError
from training.policy.subcommands import Command, commands_in

ROUNDS_APART = 1024
"""Between the seeds of two rounds: more than there are candidates of a prompt, and 64 rounds fit between two lines."""


@dataclass(frozen=True, slots=True)
class Improvement:
    """What decides the result of a run, but for the prompts and for how many rounds there are.

    `top_fraction` of the winners are kept, those of the highest reward. `evaluation_samples` candidates of each
    held-out prompt are drawn, whose mean reward is that of best_of=1.
    """

    model: str = "smollm2-135m-instruct"
    reward_model: str = "movie-sentiment=movie-sentiment"
    best_of: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    top_fraction: float | None = None
    evaluation_samples: int = 4
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 2e-4
    lora_rank: int = 16
    seed: int = 0


def improve(
    prompts: Source,
    out: Path,
    settings: Improvement,
    rounds: int,
    *,
    held_out: Source | None = None,
    holdout: float = 0.2,
    command: Command | None = None,
) -> list[dict[str, Any]]:
    """Runs what is not there yet of that many rounds; a row of the table for each round, the base's first.

    Without `held_out` prompts a share `holdout` of all is held out, by hash, so that equal prompts stay on one side.

    Raises:
        DataError, DataSourceError: prompts that cannot be used.
        CheckpointError: `out` holds another run.
        TrainingError: another run works there, or a command failed; what is done is kept.
    """
    with commands_in(out) as own:
        run = command or own
        _write_prompts(prompts, held_out, holdout, out / "prompts", settings)
        table = []
        for number in range(rounds + 1):
            table.append(_round(number, out, settings, run))
            (out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """The table as text, a line for each round."""

    def told(figure: dict[str, float] | None) -> str:
        return f"{figure['mean']:.2f} ({figure['low']:.2f} … {figure['high']:.2f})" if figure else "-"

    rows = [("round", "demonstrations", "reward of the winners", "held-out reward at best_of=1")]
    rows += [
        (
            str(row["round"]),
            str(row.get("demonstrations", "-")),
            told(row.get("winner_reward")),
            told(row["held_out_reward"]),
        )
        for row in table
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _round(number: int, out: Path, settings: Improvement, run: Command) -> dict[str, Any]:
    place = out / f"round-{number}"
    row: dict[str, Any] = {"round": number}
    if number:
        samples, winners = place / "samples", place / "winners.jsonl"
        before = _policy(out, number - 1, settings)
        _batch(out / "prompts" / "train.jsonl", samples, before, settings.best_of, number, settings, run)
        if not winners.exists():
            top = ["--top-fraction", str(settings.top_fraction)] if settings.top_fraction is not None else []
            run(["export", str(samples), "--format", "sft", "--out", str(winners), *top])
        if not (place / "sft" / "model").is_dir():
            run(_sft(before, winners, place / "sft", settings))
        row["demonstrations"] = winners.read_bytes().count(b"\n")
        row["winner_reward"] = _summary(samples)["winner_reward"]
    evaluation = place / "evaluation"
    policy = _policy(out, number, settings)
    _batch(out / "prompts" / "held-out.jsonl", evaluation, policy, settings.evaluation_samples, 0, settings, run)
    return row | {"model": policy, "held_out_reward": _summary(evaluation)["reward_at_n"]["1"]}


def _policy(out: Path, number: int, settings: Improvement) -> str:
    """The policy as it is after that round."""
    return str(out / f"round-{number}" / "sft" / "model") if number else settings.model


def _batch(
    prompts: Path, out: Path, model: str, best_of: int, number: int, settings: Improvement, run: Command
) -> None:
    if (out / "summary.json").exists():  # the last that a run writes
        return
    sampling = {
        "--best-of": best_of,
        "--max-tokens": settings.max_tokens,
        "--temperature": settings.temperature,
        "--seed": settings.seed + ROUNDS_APART * number,
    }
    models = ["--model", model, "--reward-model", settings.reward_model]
    options = [word for name, value in sampling.items() for word in (name, str(value))]
    run(["batch", str(prompts), "--out", str(out), *models, *options])


def _sft(model: str, winners: Path, out: Path, settings: Improvement) -> list[str]:
    recipe = {
        "--epochs": settings.epochs,
        "--batch-size": settings.batch_size,
        "--learning-rate": settings.learning_rate,
        "--lora-rank": settings.lora_rank,
        "--seed": settings.seed,
        "--holdout": 0,
    }
    options = [word for name, value in recipe.items() for word in (name, str(value))]
    return [
        "train",
        "sft",
        "--data",
        str(winners),
        "--out",
        str(out),
        "--model",
        model,
        "--merge",
        "--resume",
        *options,
    ]


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    if not found["winner_reward"]:
        raise TrainingError(
            f"none of the prompts in {run} has an answer with a reward; {run / 'failed.jsonl'} tells why"
        )
    return found


def _write_prompts(
    prompts: Source, held_out: Source | None, holdout: float, directory: Path, settings: Improvement
) -> None:
    """Both parts and the identity of the run, once; or a comparison with those that are there."""
    parts = {"train.jsonl": _read(prompts), "held-out.jsonl": _read(held_out) if held_out else []}
    if not held_out:
        everything = parts["train.jsonl"]
        parts = {
            "train.jsonl": [line for line in everything if _share(line) >= holdout],
            "held-out.jsonl": [line for line in everything if _share(line) < holdout],
        }
    for name, lines in parts.items():
        if not lines:
            raise DataError(prompts, [(1, f"no prompt is left for {name}; change --holdout, or give more prompts")])
    texts = {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in parts.items()}
    run = asdict(settings) | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if directory.is_dir():
        require_same_run(directory, run)
        return
    with appearing_whole(directory) as unfinished:
        unfinished.mkdir(parents=True)
        for name, text in texts.items():
            (unfinished / name).write_text(text)
        write_run(unfinished, run)


def _read(source: Source) -> list[dict[str, Any]]:
    """Lines as `nbest batch` takes them; what else may be wrong with them it will tell in its failed.jsonl."""
    lines: list[dict[str, Any]] = []
    errors: list[tuple[int, str]] = []
    for number, content in read_records(source):
        try:
            fields = json.loads(content) if isinstance(content, str) else content
        except ValueError as error:
            errors.append((number, str(error)))
            continue
        if isinstance(fields, dict) and (fields.get("prompt") or fields.get("messages")):
            lines.append({name: value for name, value in fields.items() if value is not None})
        else:
            errors.append((number, "a line has a prompt or messages"))
    if errors:
        raise DataError(source, errors)
    return lines


def _share(line: dict[str, Any]) -> float:
    """A number in [0, 1) that depends on the prompt or messages of a line alone."""
    return share_of(json.dumps([line.get("prompt"), line.get("messages")]))
