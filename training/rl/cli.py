"""`nbest train ppo` and `nbest train reinforce`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.cli_parts import (
    DtypeOption,
    Full,
    GradientCheckpointing,
    LoraRank,
    Merge,
    Policy,
    PolicyOut,
    Resume,
    errors_in_a_sentence,
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


Prompts = Annotated[
    str,
    typer.Option(help="JSONL or Parquet file, or a Hugging Face data set, with a column prompt or messages."),
]
RewardModel = Annotated[
    str, typer.Option(metavar="NAME=SPEC", help="The reward: any scorer of the server, a function of yours included.")
]
KlCoef = Annotated[float, typer.Option(min=0.0, help="Price of a nat away from the policy as it was (beta).")]
KlTarget = Annotated[
    float | None, typer.Option(min=0.0, help="Nats a completion that the price is adapted to; default: it is fixed.")
]
KlHorizon = Annotated[int, typer.Option(min=1, help="Completions over which it is adapted.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest completion.")]
Steps = Annotated[int, typer.Option(min=1, help="Batches to draw and to learn from.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Completions a step.")]
SamplesPerPrompt = Annotated[int, typer.Option(min=1, help="Completions of each prompt among them.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Completions computed at once; default: all that a step of the optimiser has.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0.0, help="Highest learning rate, which decays to 0; default: 1e-4, with --full 1e-6."),
]
Temperature = Annotated[float, typer.Option(help="What completions are drawn at, and learnt at.")]
TruncationPenalty = Annotated[
    float, typer.Option(min=0.0, help="Taken from the reward of a completion that was cut by its length.")
]
RewardNormalization = Annotated[
    NormalizationOption | None,
    typer.Option(
        help="reference: rewards to mean 0 and deviation 1 over samples of the policy as it was. Default: that, but "
        "none for python: functions."
    ),
]
SyncTolerance = Annotated[
    float | None,
    typer.Option(min=0.0, help="Nats a token that engine and learner may be apart; default: 0.001, in bfloat16 0.15."),
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and completion; default: the model's.")]
Dtype = Annotated[DtypeOption, typer.Option(help="What policy and engine compute in.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps after which all is saved to go on from.")]
Seed = Annotated[int, typer.Option(help="Decides the adapter's start, the order of the prompts and the samples.")]


def ppo_command(
    prompts: Prompts,
    out: PolicyOut,
    model: Policy = "smollm2-135m-instruct",
    reward_model: RewardModel = "movie-sentiment=movie-sentiment",
    kl_coef: KlCoef = 0.05,
    kl_target: KlTarget = None,
    kl_horizon: KlHorizon = 10_000,
    max_tokens: MaxTokens = 64,
    steps: Steps = 100,
    batch_size: BatchSize = 64,
    samples_per_prompt: SamplesPerPrompt = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the completions of a step.")] = 4,
    minibatches: Annotated[int, typer.Option(min=1, help="Steps of the optimiser in each pass.")] = 4,
    micro_batch_size: MicroBatchSize = None,
    learning_rate: LearningRate = None,
    temperature: Temperature = 1.0,
    truncation_penalty: TruncationPenalty = 0.0,
    reward_normalization: RewardNormalization = None,
    full: Full = False,
    merge: Merge = False,
    lora_rank: LoraRank = 16,
    max_length: MaxLength = None,
    dtype: Dtype = DtypeOption.AUTO,
    gradient_checkpointing: GradientCheckpointing = False,
    sync_tolerance: SyncTolerance = None,
    checkpoint_every: CheckpointEvery = 10,
    resume: Resume = False,
    seed: Seed = 0,
) -> None:
    """Train a policy on a reward by PPO, with the engine and the scorer that serve."""
    with errors_in_a_sentence():
        from training.rl.settings import PPOTraining

        settings = PPOTraining(
            base_model=model,
            full=full,
            lora_rank=lora_rank,
            reward_model=reward_model,
            steps=steps,
            batch_size=batch_size,
            samples_per_prompt=samples_per_prompt,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens,
            temperature=temperature,
            learning_rate=_rate(learning_rate, full),
            kl_coef=kl_coef,
            kl_target=kl_target,
            kl_horizon=kl_horizon,
            truncation_penalty=truncation_penalty,
            reward_normalization=reward_normalization.value if reward_normalization else None,
            sync_tolerance=sync_tolerance,
            max_length=max_length,
            dtype=dtype.value,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            epochs=epochs,
            minibatches=minibatches,
        )
    _train(prompts, out, settings, checkpoint_every, resume=resume, merge=merge)


def reinforce_command(
    prompts: Prompts,
    out: PolicyOut,
    model: Policy = "smollm2-135m-instruct",
    reward_model: RewardModel = "movie-sentiment=movie-sentiment",
    baseline: Annotated[
        BaselineOption,
        typer.Option(help="What a completion is compared with: rloo, the others of its prompt; batch, all others."),
    ] = BaselineOption.RLOO,
    kl_coef: KlCoef = 0.05,
    kl_target: KlTarget = None,
    kl_horizon: KlHorizon = 10_000,
    max_tokens: MaxTokens = 64,
    steps: Steps = 100,
    batch_size: BatchSize = 64,
    samples_per_prompt: SamplesPerPrompt = 4,
    micro_batch_size: MicroBatchSize = None,
    learning_rate: LearningRate = None,
    temperature: Temperature = 1.0,
    truncation_penalty: TruncationPenalty = 0.0,
    reward_normalization: RewardNormalization = None,
    full: Full = False,
    merge: Merge = False,
    lora_rank: LoraRank = 16,
    max_length: MaxLength = None,
    dtype: Dtype = DtypeOption.AUTO,
    gradient_checkpointing: GradientCheckpointing = False,
    sync_tolerance: SyncTolerance = None,
    checkpoint_every: CheckpointEvery = 10,
    resume: Resume = False,
    seed: Seed = 0,
) -> None:
    """Train a policy on a reward by REINFORCE, with the engine and the scorer that serve."""
    with errors_in_a_sentence():
        from training.rl.settings import ReinforceTraining

        settings = ReinforceTraining(
            base_model=model,
            full=full,
            lora_rank=lora_rank,
            reward_model=reward_model,
            steps=steps,
            batch_size=batch_size,
            samples_per_prompt=samples_per_prompt,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens,
            temperature=temperature,
            learning_rate=_rate(learning_rate, full),
            kl_coef=kl_coef,
            kl_target=kl_target,
            kl_horizon=kl_horizon,
            truncation_penalty=truncation_penalty,
            reward_normalization=reward_normalization.value if reward_normalization else None,
            sync_tolerance=sync_tolerance,
            max_length=max_length,
            dtype=dtype.value,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            baseline=baseline.value,
        )
    _train(prompts, out, settings, checkpoint_every, resume=resume, merge=merge)


def _rate(given: float | None, full: bool) -> float:
    return given if given is not None else 1e-6 if full else 1e-4


def _train(prompts: str, out: Path, settings: "Method", checkpoint_every: int, *, resume: bool, merge: bool) -> None:
    with errors_in_a_sentence():
        from training.policy import RunOptions
        from training.rl.run import train_rl

        written = train_rl(prompts, out, settings, RunOptions(checkpoint_every, resume=resume, merge=merge))
    tell_policy(written, settings.base_model)
