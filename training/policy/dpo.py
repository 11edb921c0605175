"""Direct preference optimisation: the policy learns to prefer the chosen text of each pair to the rejected text.

The loss of a pair (Rafailov et al. 2023, arXiv 2305.18290) is -log sigma(beta * (log-ratio of the chosen - log-ratio of
the rejected)), where a text's log-ratio is log pi(text | prompt) - log pi_ref(text | prompt), summed over its tokens;
pi_ref is the policy before training. If preferences follow Bradley and Terry's model of a reward r, the minimum is
pi_ref * exp(r / beta) / Z, the optimum of RLHF with a KL penalty of beta. Dropout is off, so that pi and pi_ref differ
only by training. The loop is TRL's DPOTrainer.
"""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from training.data.data_source import Source
from training.data.preferences import RATED_GROUP, DataError, PreferenceRow, read_rows
from training.metrics_log import MetricsLog
from training.policy.config import DPOTraining, RunOptions
from training.policy.finetune import DataSplit, TrainablePolicy, fit, trl_arguments
from training.policy.tokens import TokenisedRow


class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL is untyped here
    """TRL's trainer over rows that are already in tokens; TRL would tokenise prompt and answer as one text."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def train_dpo(
    data: Source,
    out: Path,
    settings: DPOTraining,
    options: RunOptions,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
) -> Path:
    """Trains on preferences (see `training.data.preferences`) and returns the directory to serve.

    After every epoch the loss and the accuracy are measured on the validation data or, without any, on the share
    `holdout` of the rows. The accuracy is the share of pairs whose chosen text has the higher log-ratio.

    Raises:
        DataError, DataSourceError: rows or a source that cannot be used, found before the first step.
        CheckpointError: `out` holds checkpoints that this run cannot continue from.
        TrainingError: the policy cannot be trained with these settings, or training diverged; nothing is written.
    """
    validation = (_read_pairs(validation_data), validation_data) if validation_data else None
    split = DataSplit.of(_read_pairs(data), data, validation, holdout)
    policy = TrainablePolicy(settings, dropout=False)
    train, held_out = policy.tokenised(split)
    trainer = TokenisedDPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        peft_config=policy.adapters,
        args=DPOConfig(**trl_arguments(settings, policy, out, options, validates=bool(held_out)), beta=settings.beta),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(held_out) if held_out else None,
    )
    log = MetricsLog(
        out,
        ("reward_margin", "reward_accuracy", "validation_loss", "validation_reward_accuracy"),
        logged={
            "rewards/margins": "reward_margin",
            "rewards/accuracies": "reward_accuracy",
            "eval_loss": "validation_loss",
            "eval_rewards/accuracies": "validation_reward_accuracy",
        },
    )
    return fit(trainer, policy, split, "dpo", out, options, log)


def _read_pairs(source: Source) -> list[PreferenceRow]:
    rows = read_rows(source)
    if rated := [row.line for row in rows if row.group == RATED_GROUP]:
        raise DataError(source, [(line, "a rated text is no pair; give prompt, chosen and rejected") for line in rated])
    return rows


def _dataset(rows: list[TokenisedRow]) -> Dataset:
    """Each chosen text of a row paired with each of its rejected texts."""
    return Dataset.from_list(
        [
            {"prompt_ids": row.prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            for row in rows
            for chosen_ids, rating in zip(row.completions, row.row.ratings, strict=True)
            if rating == math.inf
            for rejected_ids, other_rating in zip(row.completions, row.row.ratings, strict=True)
            if other_rating != math.inf
        ]
    )
