"""`nbest train` and `nbest evaluate`, mounted by the main command.

torch and transformers take seconds to import, so each command imports its work when it runs.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reranker.models.device import Device
from training.cli_options import (
    CheckpointEvery,
    DtypeOption,
    GradientCheckpointing,
    Holdout,
    PolicyModel,
    PolicyOut,
    Resume,
    Validation,
    Weights,
    errors_in_a_sentence,
    settings_of,
    takes,
    tell_policy,
)
from training.rl.cli import ppo_command, reinforce_command

if TYPE_CHECKING:
    from training.reward.pair_accuracy import PairAccuracy

train_app = typer.Typer(help="Train a reward model or a policy.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Measure models on held-out data.", no_args_is_help=True)

DATA_HELP = (
    "Preferences: a JSONL or Parquet file, or a Hugging Face data set as DIRECTORY or ORG/NAME, with :SPLIT if it has "
    "several. Columns: prompt (optional), chosen, rejected, margin (optional); or text, rating."
)

DEMONSTRATIONS_HELP = (
    "Demonstrations, from the same places as preferences. Columns: prompt, completion, finish_reason (optional); or "
    "messages; or text. nbest export --format sft writes such a file."
)


class MethodOption(StrEnum):
    """What learns: low-rank adapters and the head, the head alone, or everything."""

    LORA = "lora"
    HEAD = "head"
    FULL = "full"


class StyleOption(StrEnum):
    """How a prompt and an answer become one text; see docs/reward-models.md."""

    CHAT = "chat"
    DOCUMENT = "document"


@train_app.callback()
def _train() -> None:
    """Train a reward model or a policy."""


@evaluate_app.callback()
def _evaluate() -> None:
    """Measure models on held-out data."""


@train_app.command("reward")
def train_reward_command(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Directory for the reward model, its metrics and checkpoints.")],
    model: Annotated[str, typer.Option(help="Trunk: prepared name, directory or hub id.")] = "smollm2-135m-instruct",
    method: Annotated[
        MethodOption, typer.Option(help="lora: adapters and head; head: the head alone; full: all weights.")
    ] = MethodOption.LORA,
    style: Annotated[StyleOption, typer.Option(help="How an answer is written for the model.")] = StyleOption.CHAT,
    layers: Annotated[int | None, typer.Option(min=1, help="Lowest layers of the trunk to read; default: all.")] = None,
    lora_layers: Annotated[int | None, typer.Option(min=1, help="Top layers read that adapt; default: all.")] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step: pairs, or rated texts.")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Highest learning rate, which decays to 0; default: 3e-4, with full 1e-5."),
    ] = None,
    min_gap: Annotated[float, typer.Option(help="Least difference of two ratings that makes a comparison.")] = 1.0,
    center: Annotated[
        float, typer.Option(min=0.0, help="Weight of a penalty that keeps rewards around zero, such as 0.01.")
    ] = 0.0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer; default: the model's.")
    ] = None,
    validation: Validation = None,
    holdout: Holdout = 0.1,
    dtype: Annotated[DtypeOption, typer.Option(help="What the trunk computes in.")] = DtypeOption.AUTO,
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    seed: Annotated[int, typer.Option(help="Decides the head's start and the order of the data.")] = 0,
) -> None:
    """Train a reward model: a scalar head, and adapters in the trunk, by the Bradley-Terry loss on preferences."""
    with errors_in_a_sentence():
        from training.reward.train import RewardTraining, train_reward

        settings = RewardTraining(
            base_model=model,
            method=method.value,
            style=style.value,
            num_layers=layers,
            lora_layers=lora_layers,
            lora_rank=lora_rank,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate if learning_rate is not None else 1e-5 if method is MethodOption.FULL else 3e-4,
            min_gap=min_gap,
            center=center,
            max_length=max_length,
            dtype=dtype.value,
            seed=seed,
        )
        held_out = train_reward(
            data,
            out,
            settings,
            validation_data=validation,
            holdout=holdout,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
    if held_out:
        typer.echo(f"Held out: {_sentence(held_out)}")
    typer.echo(f"Serve it with: nbest serve --reward-model NAME={out / settings.weights_name}")


@dataclass(frozen=True, kw_only=True)
class _Demonstrations:
    data: Annotated[str, typer.Option(help=DEMONSTRATIONS_HELP)]
    out: PolicyOut
    model: PolicyModel = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class _Preferences:
    data: Annotated[str, typer.Option(help=DATA_HELP)]
    out: PolicyOut
    model: PolicyModel = "smollm2-135m-instruct"
    beta: Annotated[float, typer.Option(min=0.0, help="Price of a nat away from the policy as it was.")] = 0.1


@dataclass(frozen=True, kw_only=True)
class _FineTuning:
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows computed at once, if a batch does not fit in memory.")
    ] = None
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Highest learning rate, which decays to 0.")] = (
        None
    )
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and completion; default: the model's.")
    ] = None
    validation: Validation = None
    holdout: Holdout = 0.1
    dtype: Annotated[DtypeOption, typer.Option(help="What the policy computes in.")] = DtypeOption.AUTO
    gradient_checkpointing: GradientCheckpointing = False
    checkpoint_every: CheckpointEvery = 500
    resume: Resume = False
    seed: Annotated[int, typer.Option(help="Decides the adapters' start and the order of the data.")] = 0


@dataclass(frozen=True, kw_only=True)
class SFTOptions(_FineTuning, Weights, _Demonstrations):
    """Of `nbest train sft`."""


@dataclass(frozen=True, kw_only=True)
class DPOOptions(_FineTuning, Weights, _Preferences):
    """Of `nbest train dpo`."""


@train_app.command("sft")
@takes(SFTOptions)
def train_sft_command(given: SFTOptions) -> None:
    """Fine-tune a policy on demonstrations, such as the winners of best-of-n.

    The learning rate is 2e-4 unless it is given, with --full 1e-5.
    """
    with errors_in_a_sentence():
        from training.policy.finetune import PolicyTraining, RunOptions
        from training.policy.sft import train_sft

        rate = given.learning_rate if given.learning_rate is not None else 1e-5 if given.full else 2e-4
        settings = settings_of(PolicyTraining, given, base_model=given.model, learning_rate=rate)
        options = settings_of(RunOptions, given)
        written = train_sft(
            given.data, given.out, settings, options, validation_data=given.validation, holdout=given.holdout
        )
    tell_policy(written, given.model)


@train_app.command("dpo")
@takes(DPOOptions)
def train_dpo_command(given: DPOOptions) -> None:
    """Fine-tune a policy on preferences by DPO.

    The learning rate is 5e-5 unless it is given, with --full 5e-7.
    """
    with errors_in_a_sentence():
        from training.policy.dpo import DPOTraining, train_dpo
        from training.policy.finetune import RunOptions

        rate = given.learning_rate if given.learning_rate is not None else 5e-7 if given.full else 5e-5
        settings = settings_of(DPOTraining, given, base_model=given.model, learning_rate=rate)
        options = settings_of(RunOptions, given)
        written = train_dpo(
            given.data, given.out, settings, options, validation_data=given.validation, holdout=given.holdout
        )
    tell_policy(written, given.model)


train_app.command("ppo")(ppo_command)
train_app.command("reinforce")(reinforce_command)


@evaluate_app.command("reward")
def evaluate_reward_command(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    reward_model: Annotated[str, typer.Option(help="Prepared name, directory or hub id.")] = "movie-sentiment",
    min_gap: Annotated[float, typer.Option(help="Least difference of two ratings that makes a comparison.")] = 1.0,
    device: Annotated[Device, typer.Option(help="Where the model runs; auto takes CUDA if present.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for evaluation.json and evaluation.png.")] = None,
) -> None:
    """How often a reward model prefers what people preferred, and whether its differences are the odds they claim."""
    with errors_in_a_sentence():
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


def _sentence(accuracy: "PairAccuracy") -> str:
    return (
        f"{accuracy.accuracy:.1%} of {accuracy.comparisons:,} comparisons in the right order "
        f"(95% interval {accuracy.low:.1%} to {accuracy.high:.1%}; {accuracy.rows:,} rows)"
    )
