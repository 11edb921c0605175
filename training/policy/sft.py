"""Supervised fine-tuning: the policy learns the completions of demonstrations.

The loss is the mean of -log p over the tokens of the completions; tokens of the prompts have no loss. On the winners of
best-of-n this is rejection-sampling fine-tuning (RAFT, arXiv 2304.06767). The loop is TRL's SFTTrainer.
"""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from training.data.data_source import Source
from training.data.demonstrations import demonstration
from training.data.preferences import read_rows
from training.metrics_log import MetricsLog
from training.policy.config import RunOptions, SFTTraining
from training.policy.finetune import DataSplit, TrainablePolicy, fit, trl_arguments
from training.policy.tokens import TokenisedRow

NO_LOSS = -100
"""The label of a token without a loss, as in torch's cross entropy."""


def train_sft(
    data: Source,
    out: Path,
    settings: SFTTraining,
    options: RunOptions,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
) -> Path:
    """Trains on demonstrations (see `training.data.demonstrations`) and returns the directory to serve.

    After every epoch the loss is measured on the validation data or, without any, on the share `holdout` of the rows.

    Raises:
        DataError, DataSourceError: rows or a source that cannot be used, found before the first step.
        CheckpointError: `out` holds checkpoints that this run cannot continue from.
        TrainingError: the policy cannot be trained with these settings, or training diverged; nothing is written.
    """
    validation = (read_rows(validation_data, demonstration), validation_data) if validation_data else None
    split = DataSplit.of(read_rows(data, demonstration), data, validation, holdout)
    policy = TrainablePolicy(settings, dropout=True)
    train, held_out = policy.tokenised(split)
    trainer = SFTTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        peft_config=policy.adapters,
        args=SFTConfig(**trl_arguments(settings, policy, out, options, validates=bool(held_out))),
        train_dataset=_dataset(train),
        eval_dataset=_dataset(held_out) if held_out else None,
    )
    log = MetricsLog(
        out,
        ("token_accuracy", "validation_loss"),
        logged={"mean_token_accuracy": "token_accuracy", "eval_loss": "validation_loss"},
    )
    return fit(trainer, policy, split, "sft", out, options, log)


def _dataset(rows: list[TokenisedRow]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": row.prompt_ids + completion_ids,
                "labels": [NO_LOSS] * len(row.prompt_ids) + completion_ids,
            }
            for row in rows
            for completion_ids in row.completions
        ]
    )
