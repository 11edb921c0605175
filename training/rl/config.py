"""Everything that decides the result of a run of PPO or REINFORCE."""

import math
from dataclasses import dataclass
from typing import Literal

from reranker.models.device import Precision
from training.policy.finetune import PolicyTraining

RewardNormalization = Literal["none", "reference"]
Baseline = Literal["rloo", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RLTraining:
    """What both have in common.

    A step draws `batch_size` completions, `samples_per_prompt` of each prompt, and learns from them;
    `micro_batch_size` are computed at once (unless given, all that a step of the optimiser has). `kl_coef` is beta, the
    price of a nat; with `kl_target` it follows that many nats a completion (`training.rl.kl`). `truncation_penalty` is
    taken from the score of a completion that was cut by its length. `reward_normalization` None: `reference` for
    models, `none` for functions of the user's own. With `overlap` the next batch is drawn while this one is learnt
    from (`training.rl.train`); a token that was drawn by another policy weighs at most `largest_importance`
    (`training.rl.losses`). `sync_tolerance`, in nats a token, is how far engine and learner may be apart
    (`training.rl.weight_sync`). Every `evaluate_every` steps held-out prompts are answered, and `judge`, a scorer like
    the reward, says what it thinks of that (`training.rl.evaluation.evaluator`).
    """

    base_model: str = "smollm2-135m-instruct"
    full: bool = False
    lora_rank: int = 16
    reward_model: str = "movie-sentiment=movie-sentiment"
    steps: int = 100
    batch_size: int = 64
    samples_per_prompt: int = 4
    micro_batch_size: int | None = None
    max_tokens: int = 64
    temperature: float = 1.0
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    truncation_penalty: float = 0.0
    reward_normalization: RewardNormalization | None = None
    overlap: bool = False
    largest_importance: float = 2.0
    sync_tolerance: float | None = None
    evaluate_every: int = 10
    judge: str | None = None
    max_length: int | None = None
    dtype: Precision = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0

    @property
    def rows_at_once(self) -> int:
        return self.micro_batch_size or self.rows_a_step

    @property
    def rows_a_step(self) -> int:
        """Completions that a step of the optimiser learns from."""
        return self.batch_size

    @property
    def prompts_a_step(self) -> int:
        return self.batch_size // self.samples_per_prompt

    @property
    def policy(self) -> PolicyTraining:
        """What loads, adapts and writes the policy."""
        return PolicyTraining(
            base_model=self.base_model,
            full=self.full,
            lora_rank=self.lora_rank,
            max_length=self.max_length,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTraining(RLTraining):
    """A step goes `epochs` times through its completions, each time in `minibatches` steps of the optimiser."""

    epochs: int = 4
    minibatches: int = 4
    clip: float = 0.2
    value_clip: float = 0.2
    gae_lambda: float = 0.95
    value_learning_rate: float = 1e-3

    @property
    def rows_a_step(self) -> int:
        return math.ceil(self.batch_size / self.minibatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceTraining(RLTraining):
    """One step of the optimiser for each batch; `baseline`: the others of the prompt (RLOO), or of the whole batch."""

    baseline: Baseline = "rloo"
