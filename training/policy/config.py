"""Settings of policy training, and the command-line options made from them.

Each setting is written once. A field of type `Annotated[T, typer.Option(...)]` is also an option of the command
(`training.cli_options.settings_as_options`); any other field can only be set from Python.

`dataclasses.asdict` of the settings is written to run.json and identifies a run: a checkpoint resumes only under the
same fields and values, so a renamed field makes earlier runs impossible to resume. This module imports neither torch
nor transformers, so that `nbest train --help` answers at once.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, cast

import typer

from reranker.models.device import Precision

CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT; without one, start a new run.")
]


class LearningRates(NamedTuple):
    """Default peak learning rates: of a LoRA adapter, and of all weights (`full`)."""

    adapter: float
    full: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTraining:
    """The settings that every method of policy training shares.

    `learning_rate` is the peak: the rate rises linearly over the first `warmup_fraction` of all optimiser steps and
    then decays linearly to 0. Without a value it is the default of the method, `default_rates`. `max_length` bounds
    prompt and completion together, in tokens. `dtype` is the precision of matrix products; trained weights are
    float32.
    """

    default_rates: ClassVar[LearningRates]

    base_model: Annotated[str, typer.Option("--model", help="Policy to train: prepared name, directory or hub id.")] = (
        "smollm2-135m-instruct"
    )
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights and write OUT/model instead of an adapter.")
    ] = False
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 16
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate; it decays linearly to 0. The default is given above.")
    ] = None  # type: ignore[assignment]  # __post_init__ replaces it
    warmup_fraction: float = 0.05
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows computed at once; default: all rows of an optimiser step.")
    ] = None
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and completion; default: the model's context.")
    ] = None
    dtype: Annotated[
        Precision, typer.Option(help="Precision of matrix products; auto: bfloat16 where the device is faster in it.")
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass: less memory.")
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of the initial adapter, the order of the data, and the samples.")] = 0

    def __post_init__(self) -> None:
        if cast(float | None, self.learning_rate) is None:
            rate = self.default_rates.full if self.full else self.default_rates.adapter
            object.__setattr__(self, "learning_rate", rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning(PolicyTraining):
    """What supervised fine-tuning and DPO share: a data set that is read `epochs` times, `batch_size` rows a step."""

    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimiser step.")] = 16

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTTraining(FineTuning):
    """The settings of `nbest train sft`."""

    default_rates = LearningRates(adapter=2e-4, full=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOTraining(FineTuning):
    """The settings of `nbest train dpo`; `beta` as in the loss of `training.policy.dpo`."""

    default_rates = LearningRates(adapter=5e-5, full=5e-7)

    beta: Annotated[
        float, typer.Option(min=0.0, help="KL penalty coefficient: how strongly the policy is kept near its start.")
    ] = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What does not change the result of a run. With `merge`, an adapter is also written as a whole model."""

    merge: Annotated[
        bool, typer.Option("--merge", help="Also write OUT/model: the base model with the adapter merged into it.")
    ] = False
    checkpoint_every: CheckpointEvery = 500
    resume: Resume = False
    progress: bool = True


@dataclass(frozen=True, slots=True)
class RejectionSamplingTraining:
    """The settings of `nbest improve`; with the prompts they decide the result of every round.

    Of the winners, the share `top_fraction` with the highest rewards is kept (None: all). Each held-out prompt is
    sampled `evaluation_samples` times; the mean reward of the samples is the reward at best_of=1.
    """

    model: Annotated[str, typer.Option(help="Policy: prepared name, directory or hub id.")] = "smollm2-135m-instruct"
    reward_model: Annotated[
        str, typer.Option(metavar="NAME=SPEC", help="Scorer that selects the winners and measures the policy.")
    ] = "movie-sentiment=movie-sentiment"
    best_of: Annotated[int, typer.Option(min=1, help="Candidates sampled for each training prompt.")] = 8
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a candidate.")] = 64
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature.")] = 1.0
    top_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the winners to keep, those of highest reward.")
    ] = None
    evaluation_samples: Annotated[int, typer.Option(min=1, help="Samples of each held-out prompt.")] = 4
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the winners of a round.")] = 2.0
    batch_size: Annotated[int, typer.Option(min=1, help="Winners of an optimiser step.")] = 16
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of a round.")] = 2e-4
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 16
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples and of the order of training.")] = 0
