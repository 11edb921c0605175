"""`nbest improve`: trains a policy on its own best-of-n winners, round by round.

A round samples N candidates for every training prompt from the current policy, keeps the winners, fine-tunes the policy
on them, and measures it on held-out prompts at best_of=1. This is iterated rejection-sampling fine-tuning (RAFT,
arXiv 2304.06767): each round starts from the policy of the round before.

    OUT/prompts/          train.jsonl, held-out.jsonl, and run.json, which identifies the run
    OUT/round-0/          evaluation/ of the policy before any training
    OUT/round-K/          samples/, winners.jsonl with its card, sft/ with the adapter and the model, evaluation/
    OUT/summary.json      the table that is printed at the end

Each step is an nbest command (see `training.policy.subcommands`) and is skipped if its result exists.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reranker.fsio import atomic_directory, share_of
from training.checkpoints import require_same_run, write_run
from training.data.data_source import Source, read_records
from training.data.preferences import DataError
from training.errors import TrainingError
from training.policy.config import RejectionSamplingTraining
from training.policy.subcommands import Command, locked_commands

ROUND_SEED_STRIDE = 1024
"""Seeds between two rounds: more than the candidates of a prompt, and 64 rounds fit into the seeds of one line."""


def improve(
    prompts: Source,
    out: Path,
    settings: RejectionSamplingTraining,
    rounds: int,
    *,
    held_out: Source | None = None,
    holdout: float = 0.2,
    command: Command | None = None,
) -> list[dict[str, Any]]:
    """Runs the steps of `rounds` rounds that have no result yet; returns one row per round, the base policy's first.

    Without `held_out` prompts, the share `holdout` of all prompts is held out by hash, so equal prompts stay together.

    Raises:
        DataError, DataSourceError: prompts that cannot be used.
        CheckpointError: `out` holds another run.
        TrainingError: another run is using `out`, or a command failed; finished steps are kept.
    """
    with locked_commands(out) as run_command:
        run = command or run_command
        _write_prompts(prompts, held_out, holdout, out / "prompts", settings)
        table = []
        for number in range(rounds + 1):
            table.append(_round(number, out, settings, run))
            (out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return table


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """The table as text, one line per round under a heading."""

    def interval(mean: dict[str, float] | None) -> str:
        return f"{mean['mean']:.2f} ({mean['low']:.2f} … {mean['high']:.2f})" if mean else "-"

    rows = [("round", "demonstrations", "reward of the winners", "held-out reward at best_of=1")]
    rows += [
        (
            str(row["round"]),
            str(row.get("demonstrations", "-")),
            interval(row.get("winner_reward")),
            interval(row["held_out_reward"]),
        )
        for row in table
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _round(number: int, out: Path, settings: RejectionSamplingTraining, run: Command) -> dict[str, Any]:
    directory = out / f"round-{number}"
    row: dict[str, Any] = {"round": number}
    if number:
        samples, winners = directory / "samples", directory / "winners.jsonl"
        before = _policy(out, number - 1, settings)
        _batch(out / "prompts" / "train.jsonl", samples, before, settings.best_of, number, settings, run)
        if not winners.exists():
            top = ["--top-fraction", str(settings.top_fraction)] if settings.top_fraction is not None else []
            run(["export", str(samples), "--format", "sft", "--out", str(winners), *top])
        if not (directory / "sft" / "model").is_dir():
            run(_sft(before, winners, directory / "sft", settings))
        row["demonstrations"] = winners.read_bytes().count(b"\n")
        row["winner_reward"] = _summary(samples)["winner_reward"]
    evaluation = directory / "evaluation"
    policy = _policy(out, number, settings)
    _batch(out / "prompts" / "held-out.jsonl", evaluation, policy, settings.evaluation_samples, 0, settings, run)
    return row | {"model": policy, "held_out_reward": _summary(evaluation)["reward_at_n"]["1"]}


def _policy(out: Path, number: int, settings: RejectionSamplingTraining) -> str:
    """The policy at the end of round `number`."""
    return str(out / f"round-{number}" / "sft" / "model") if number else settings.model


def _batch(
    prompts: Path,
    out: Path,
    model: str,
    best_of: int,
    number: int,
    settings: RejectionSamplingTraining,
    run: Command,
) -> None:
    if (out / "summary.json").exists():  # nbest batch writes it last
        return
    sampling = {
        "--best-of": best_of,
        "--max-tokens": settings.max_tokens,
        "--temperature": settings.temperature,
        "--seed": settings.seed + ROUND_SEED_STRIDE * number,
    }
    models = ["--model", model, "--reward-model", settings.reward_model]
    options = [word for name, value in sampling.items() for word in (name, str(value))]
    run(["batch", str(prompts), "--out", str(out), *models, *options])


def _sft(model: str, winners: Path, out: Path, settings: RejectionSamplingTraining) -> list[str]:
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
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    if not summary["winner_reward"]:
        raise TrainingError(f"no prompt in {run} has an answer with a reward; {run / 'failed.jsonl'} gives the reasons")
    return summary


def _write_prompts(
    prompts: Source, held_out: Source | None, holdout: float, directory: Path, settings: RejectionSamplingTraining
) -> None:
    """Writes both sets of prompts and run.json; if they exist, checks that they belong to the same run.

    Raises:
        DataError: prompts that cannot be used, or an empty set.
        CheckpointError: `directory` belongs to another run.
    """
    parts = {"train.jsonl": _read(prompts), "held-out.jsonl": _read(held_out) if held_out else []}
    if not held_out:
        everything = parts["train.jsonl"]
        parts = {
            "train.jsonl": [line for line in everything if _prompt_share(line) >= holdout],
            "held-out.jsonl": [line for line in everything if _prompt_share(line) < holdout],
        }
    for name, lines in parts.items():
        if not lines:
            raise DataError(prompts, [(1, f"no prompt is left for {name}; change --holdout, or give more prompts")])
    texts = {name: "".join(json.dumps(line) + "\n" for line in lines) for name, lines in parts.items()}
    run = asdict(settings) | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if directory.is_dir():
        require_same_run(directory, run)
        return
    with atomic_directory(directory) as unfinished:
        unfinished.mkdir(parents=True)
        for name, text in texts.items():
            (unfinished / name).write_text(text)
        write_run(unfinished, run)


def _read(source: Source) -> list[dict[str, Any]]:
    """Lines for `nbest batch`. Only the prompt is checked here; the batch reports other errors in its failed.jsonl."""
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


def _prompt_share(line: dict[str, Any]) -> float:
    """A number from 0 to 1 that depends on the prompt alone."""
    return share_of(json.dumps([line.get("prompt"), line.get("messages")]))
