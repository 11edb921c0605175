"""`nbest train ppo` and `nbest train reinforce`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from training.cli_options import (
    CheckpointEvery,
    DtypeOption,
    GradientCheckpointing,
    Holdout,
    PolicyModel,
    PolicyOut,
    Resume,
    Weights,
    errors_in_a_sentence,
    settings_of,
    takes,
    tell_policy,
)

if TYPE_CHECKING:
    from training.rl.update import Method


class NormalizationOption(StrEnum):
    """What is done to a reward before it is learnt from."""

    NONE = "none"
    REFERENCE = "reference"


class BaselineOption(StrEnum):
    """What a completion is compared with."""

    RLOO = "rloo"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class _Task:
    prompts: Annotated[
        str,
        typer.Option(help="JSONL or Parquet file, or a Hugging Face data set, with a column prompt or messages."),
    ]
    out: PolicyOut
    model: PolicyModel = "smollm2-135m-instruct"
    reward_model: Annotated[
        str,
        typer.Option(metavar="NAME=SPEC", help="The reward: any scorer of the server, a function of yours included."),
    ] = "movie-sentiment=movie-sentiment"


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    baseline: Annotated[
        BaselineOption,
        typer.Option(help="What a completion is compared with: rloo, the others of its prompt; batch, all others."),
    ] = BaselineOption.RLOO


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    kl_coef: Annotated[float, typer.Option(min=0.0, help="Price of a nat away from the policy as it was (beta).")] = (
        0.05
    )
    kl_target: Annotated[
        float | None,
        typer.Option(min=0.0, help="Nats a completion that the price is adapted to; default: it is fixed."),
    ] = None
    kl_horizon: Annotated[int, typer.Option(min=1, help="Completions over which it is adapted.")] = 10_000
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 64
    steps: Annotated[int, typer.Option(min=1, help="Batches to draw and to learn from.")] = 100
    batch_size: Annotated[int, typer.Option(min=1, help="Completions a step.")] = 64
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Completions of each prompt among them.")] = 4
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Draw the next batch while this one is learnt from: one step off-policy.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class _Passes:
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the completions of a step.")] = 4
    minibatches: Annotated[int, typer.Option(min=1, help="Steps of the optimiser in each pass.")] = 4


@dataclass(frozen=True, kw_only=True)
class _Learning:
    micro_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Completions computed at once; default: all that a step of the optimiser has."),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Highest learning rate, which decays to 0; default: 1e-4, with --full 1e-6."),
    ] = None
    temperature: Annotated[float, typer.Option(help="What completions are drawn at, and learnt at.")] = 1.0
    truncation_penalty: Annotated[
        float, typer.Option(min=0.0, help="Taken from the reward of a completion that was cut by its length.")
    ] = 0.0
    reward_normalization: Annotated[
        NormalizationOption | None,
        typer.Option(
            help="reference: rewards to mean 0 and deviation 1 over samples of the policy as it was. Default: that, "
            "but none for python: functions."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Evaluating:
    validation: Annotated[str | None, typer.Option(help="Held-out prompts; default: a share of the prompts.")] = None
    holdout: Holdout = 0.1
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Steps after which the policy is measured on held-out prompts.")
    ] = 10
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME=SPEC", help="Another scorer to measure it by, which nothing is learnt from."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Running:
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and completion; default: the model's.")
    ] = None
    dtype: Annotated[DtypeOption, typer.Option(help="What policy and engine compute in.")] = DtypeOption.AUTO
    gradient_checkpointing: GradientCheckpointing = False
    sync_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Nats a token that engine and learner may be apart; default: 0.001, in bfloat16 0.15."
        ),
    ] = None
    checkpoint_every: CheckpointEvery = 10
    resume: Resume = False
    ray: Annotated[
        bool, typer.Option("--ray", help="Draw and score by replicas on Ray Serve, as nbest serve --ray starts them.")
    ] = False
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, HOST:PORT or auto for the one of this machine; default: a new one."),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Decides the adapter's start, the order of the prompts and the samples.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class PPOOptions(_Running, Weights, _Evaluating, _Learning, _Passes, _Drawing, _Task):
    """Of `nbest train ppo`."""


@dataclass(frozen=True, kw_only=True)
class ReinforceOptions(_Running, Weights, _Evaluating, _Learning, _Drawing, _Baseline, _Task):
    """Of `nbest train reinforce`."""


@takes(PPOOptions)
def ppo_command(given: PPOOptions) -> None:
    """Train a policy on a reward by PPO, with the engine and the scorer that serve."""
    with errors_in_a_sentence():
        from training.rl.config import PPOTraining

        _train(given, PPOTraining)


@takes(ReinforceOptions)
def reinforce_command(given: ReinforceOptions) -> None:
    """Train a policy on a reward by REINFORCE, with the engine and the scorer that serve."""
    with errors_in_a_sentence():
        from training.rl.config import ReinforceTraining

        _train(given, ReinforceTraining)


def _train(given: PPOOptions | ReinforceOptions, method: "type[Method]") -> None:
    from training.errors import TrainingError
    from training.policy.finetune import RunOptions
    from training.rl.backend import on_ray, started_actors
    from training.rl.train import train_rl

    if given.ray_address is not None and not given.ray:
        raise TrainingError("a Ray cluster is only used with --ray; add that, or leave --ray-address out")
    rate = given.learning_rate if given.learning_rate is not None else 1e-6 if given.full else 1e-4
    settings = settings_of(method, given, base_model=given.model, learning_rate=rate)
    options = settings_of(RunOptions, given)
    written = train_rl(
        given.prompts,
        given.out,
        settings,
        options,
        validation_data=given.validation,
        holdout=given.holdout,
        start=on_ray(given.ray_address) if given.ray else started_actors,
    )
    tell_policy(written, given.model)
