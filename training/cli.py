"""`nbest train`, `nbest evaluate reward` and `nbest improve`; the main command mounts them lazily.

torch and transformers take seconds to import, so each command imports its work when it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reranker.models.device import Device
from training.cli_options import (
    Holdout,
    PolicyOut,
    Validation,
    echo_serve_command,
    reported_errors,
    settings_as_options,
)
from training.policy.config import (
    CheckpointEvery,
    DPOTraining,
    RejectionSamplingTraining,
    Resume,
    RunOptions,
    SFTTraining,
)
from training.reward.config import RewardTraining
from training.rl.cli import ppo_command, reinforce_command

if TYPE_CHECKING:
    from training.reward.pair_accuracy import PairAccuracy

train_app = typer.Typer(help="Train a reward model or a policy.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Measure models on held-out data.", no_args_is_help=True)
improve_app = typer.Typer(help="Train a policy on its own best-of-n winners, round by round.", add_completion=False)
"""Holds one command: `typer.main.get_command(improve_app)` is `nbest improve`."""

PREFERENCES_HELP = (
    "Preferences: a JSONL or Parquet file, or a Hugging Face data set as DIRECTORY or ORG/NAME, with :SPLIT if it has "
    "several. Columns: prompt (optional), chosen, rejected, margin (optional); or text, rating."
)

DEMONSTRATIONS_HELP = (
    "Demonstrations: a file or data set, as for preferences. Columns: prompt, completion, finish_reason (optional); or "
    "messages; or text. nbest export --format sft writes such a file."
)


@train_app.callback()
def _train() -> None:
    """Train a reward model or a policy."""


@evaluate_app.callback()
def _evaluate() -> None:
    """Measure models on held-out data."""


@train_app.command("reward")
@settings_as_options
def train_reward_command(
    *,
    data: Annotated[str, typer.Option(help=PREFERENCES_HELP)],
    out: Annotated[Path, typer.Option(help="Directory for the reward model, its metrics and checkpoints.")],
    validation: Validation = None,
    holdout: Holdout = 0.1,
    settings: RewardTraining,
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
) -> None:
    """Train a reward model on preferences by the Bradley-Terry loss: a scalar head, and adapters in the model."""
    with reported_errors():
        from training.reward.train import train_reward

        accuracy = train_reward(
            data,
            out,
            settings,
            validation_data=validation,
            holdout=holdout,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
    if accuracy:
        typer.echo(f"Held out: {_sentence(accuracy)}")
    typer.echo(f"Serve it with: nbest serve --reward-model NAME={out / settings.weights_name}")


@train_app.command("sft")
@settings_as_options
def train_sft_command(
    *,
    data: Annotated[str, typer.Option(help=DEMONSTRATIONS_HELP)],
    out: PolicyOut,
    validation: Validation = None,
    holdout: Holdout = 0.1,
    settings: SFTTraining,
    options: RunOptions,
) -> None:
    """Fine-tune a policy on demonstrations, such as the winners of best-of-n.

    The default learning rate is 2e-4, with --full 1e-5.
    """
    with reported_errors():
        from training.policy.sft import train_sft

        written = train_sft(data, out, settings, options, validation_data=validation, holdout=holdout)
    echo_serve_command(written, settings.base_model)


@train_app.command("dpo")
@settings_as_options
def train_dpo_command(
    *,
    data: Annotated[str, typer.Option(help=PREFERENCES_HELP)],
    out: PolicyOut,
    validation: Validation = None,
    holdout: Holdout = 0.1,
    settings: DPOTraining,
    options: RunOptions,
) -> None:
    """Fine-tune a policy on preferences by DPO.

    The default learning rate is 5e-5, with --full 5e-7.
    """
    with reported_errors():
        from training.policy.dpo import train_dpo

        written = train_dpo(data, out, settings, options, validation_data=validation, holdout=holdout)
    echo_serve_command(written, settings.base_model)


train_app.command("ppo")(ppo_command)
train_app.command("reinforce")(reinforce_command)


@evaluate_app.command("reward")
def evaluate_reward_command(
    data: Annotated[str, typer.Option(help=PREFERENCES_HELP)],
    reward_model: Annotated[str, typer.Option(help="Prepared name, directory or hub id.")] = "movie-sentiment",
    min_gap: Annotated[float, typer.Option(help="Smallest difference of two ratings that makes a comparison.")] = 1.0,
    device: Annotated[Device, typer.Option(help="Device of the model; auto takes CUDA if present.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for evaluation.json and evaluation.png.")] = None,
) -> None:
    """Measure a reward model on preferences: pair accuracy, and calibration of its reward differences."""
    with reported_errors():
        from reranker.models.reward_model import RewardModel
        from training.reward.evaluate import evaluate_reward

        evaluation = evaluate_reward(RewardModel.load(reward_model, device=device), data, min_gap=min_gap)
        if out is not None:
            from training.reward.evaluation_report import write_report

            write_report(evaluation, out, reward_model=reward_model, data=data, min_gap=min_gap)
    typer.echo(f"{reward_model}: {_sentence(evaluation.overall)}")
    if len(evaluation.by_gap) > 1:
        for name, accuracy in evaluation.by_gap.items():
            typer.echo(f"  ratings {name} apart: {_sentence(accuracy)}")
    typer.echo(f"The longer text: {_sentence(evaluation.length_alone)}")
    typer.echo(
        f"Log loss {evaluation.log_loss:.3f} nats (a coin: 0.693), calibration error {evaluation.calibration_error:.3f}"
    )
    for name, best in evaluation.best_of_n.items():
        typer.echo(
            f"Best of n, {name}: {best.accuracy:.1%} of {best.rows:,} rows "
            f"(95% interval {best.low:.1%} to {best.high:.1%}; chance {best.chance:.1%})"
        )


@improve_app.command("improve")
@settings_as_options
def improve_command(
    *,
    prompts: Annotated[str, typer.Option(help="Training prompts: lines with prompt or messages, as for nbest batch.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of sampling and fine-tuning.")] = 2,
    held_out: Annotated[str | None, typer.Option(help="Prompts to measure on; default: a share of the others.")] = None,
    holdout: Annotated[float, typer.Option(min=0.0, max=0.9, help="That share, chosen by a hash of the prompt.")] = 0.2,
    settings: RejectionSamplingTraining,
) -> None:
    """Train a policy on its own best-of-n winners: sample N, keep the winners, fine-tune, measure, repeat.

    OUT/round-K holds the samples, winners, weights and measurements of round K. After an interruption, the same command
    continues the run; with more --rounds a finished run continues from its last round. Settings of the engine come from
    NBEST_ variables.
    """
    with reported_errors():
        from training.policy.rejection_sampling import improve, table_lines

        table = improve(prompts, out, settings, rounds, held_out=held_out, holdout=holdout)
    typer.echo("\n".join(table_lines(table)))


def _sentence(accuracy: "PairAccuracy") -> str:
    return (
        f"{accuracy.accuracy:.1%} of {accuracy.comparisons:,} comparisons in the right order "
        f"(95% interval {accuracy.low:.1%} to {accuracy.high:.1%}; {accuracy.rows:,} rows)"
    )
