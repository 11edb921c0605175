"""Settings of PPO and REINFORCE, and the command-line options made from them (see `training.policy.config`)."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from training.policy.config import CheckpointEvery, LearningRates, PolicyTraining, RunOptions

RewardNormalization = Literal["none", "reference"]
Baseline = Literal["rloo", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RLTraining(PolicyTraining):
    """What PPO and REINFORCE share.

    A step samples `batch_size` completions, `samples_per_prompt` of each prompt, and learns from them;
    `micro_batch_size` of them are computed at once (default: all of an optimiser step). `kl_coef` is beta, the reward
    that one nat costs; with `kl_target` beta adapts until a completion has that many nats (`training.rl.kl`).
    `truncation_penalty` is subtracted from the score of a completion that ended with finish_reason `length`.
    `reward_normalization` None means `reference` for models and `none` for Python functions. With `overlap` the next
    batch is sampled while this one is learnt from (`training.rl.train`). The importance weight of a token sampled by an
    earlier policy is at most `largest_importance` (`training.rl.losses`). `sync_tolerance`, in nats per token, bounds
    the difference between engine and learner after a weight sync (`training.rl.weight_sync`). Every `evaluate_every`
    steps the policy answers held-out prompts; `judge` is a second scorer that only measures those answers
    (`training.rl.evaluation.evaluator`).
    """

    default_rates = LearningRates(adapter=1e-4, full=1e-6)

    reward_model: Annotated[
        str,
        typer.Option(metavar="NAME=SPEC", help="Scorer whose reward is learnt: any of the server, python: included."),
    ] = "movie-sentiment=movie-sentiment"
    steps: Annotated[int, typer.Option(min=1, help="Batches to sample and learn from.")] = 100
    batch_size: Annotated[int, typer.Option(min=1, help="Completions sampled in a step.")] = 64
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Completions of each prompt in a batch.")] = 4
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 64
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; the learner divides its logits by it too.")
    ] = 1.0
    kl_coef: Annotated[
        float,
        typer.Option(min=0.0, help="KL penalty coefficient (beta): reward subtracted per nat of KL."),
    ] = 0.05
    kl_target: Annotated[
        float | None,
        typer.Option(min=0.0, help="Adapt beta towards this KL, in nats per completion; default: beta is fixed."),
    ] = None
    kl_horizon: Annotated[int, typer.Option(min=1, help="Completions over which beta adapts; more is slower.")] = 10_000
    truncation_penalty: Annotated[
        float, typer.Option(min=0.0, help="Subtracted from the score of a completion that was cut by its length.")
    ] = 0.0
    reward_normalization: Annotated[
        RewardNormalization | None,
        typer.Option(
            help="reference: scale rewards to mean 0 and standard deviation 1 over samples of the starting policy. "
            "none: leave them. Default: none for python: functions, else reference."
        ),
    ] = None
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Sample the next batch while learning from this one: one step off-policy.")
    ] = False
    largest_importance: float = 2.0
    sync_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest difference of log-probabilities between engine and learner after a weight sync, in nats "
            "per token; default: 0.001, in bfloat16 0.15.",
        ),
    ] = None
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations on held-out prompts.")] = 10
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME=SPEC", help="Second scorer, for evaluations only; nothing is learnt from it."),
    ] = None

    @property
    def rows_at_once(self) -> int:
        """Completions of one forward pass."""
        return self.micro_batch_size or self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        """Completions of one optimiser step."""
        return self.batch_size

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one batch."""
        return self.batch_size // self.samples_per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTraining(RLTraining):
    """A step passes `epochs` times over its completions, each time in `minibatches` optimiser steps."""

    epochs: Annotated[int, typer.Option(min=1, help="Passes over the completions of a step.")] = 4
    minibatches: Annotated[int, typer.Option(min=1, help="Optimiser steps of a pass.")] = 4
    clip: float = 0.2
    value_clip: float = 0.2
    gae_lambda: float = 0.95
    value_learning_rate: float = 1e-3

    @property
    def rows_per_step(self) -> int:
        return math.ceil(self.batch_size / self.minibatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceTraining(RLTraining):
    """One optimiser step for each batch. `baseline`: the others of the prompt (`rloo`), or of the batch (`batch`)."""

    baseline: Annotated[
        Baseline,
        typer.Option(help="Mean that a return is compared with. rloo: the others of its prompt; batch: all others."),
    ] = "rloo"


RLMethod = PPOTraining | ReinforceTraining


@dataclass(frozen=True, slots=True, kw_only=True)
class RLRunOptions(RunOptions):
    """Steps of RL take longer than those of fine-tuning, so checkpoints are written more often."""

    checkpoint_every: CheckpointEvery = 10
