"""Supervised fine-tuning, by which the policy learns to say what the demonstrations say.

The loss is the mean of -log p over the tokens of the completions; the prompts' are read and not learnt. On the winners
of best-of-n this is rejection-sampling fine-tuning (RAFT, arXiv 2304.06767). The loop is TRL's SFTTrainer.
"""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from training.data.data_source import Source
from training.data.demonstrations import demonstration
from training.data.preferences import read_rows
from training.metrics_log import MetricsLog
from training.policy.finetune import Parts, PolicyTraining, RunOptions, TrainablePolicy, fit
from training.policy.tokens import TokenisedRow

NOT_LEARNT = -100
"""The label of a token without a loss, as torch's cross entropy has it."""


def train_sft(
    data: Source,
    out: Path,
    settings: PolicyTraining,
    options: RunOptions,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
) -> Path:
    """Trains on demonstrations (see `training.data.demonstrations`) and returns the directory that can be served.

    After every epoch the loss is measured on the validation data or, without any, on the share `holdout` of the rows.

    Raises:
        DataError, DataSourceError: rows or a source that cannot be used, found before the first step.
        CheckpointError: `out` holds checkpoints that this run cannot go on from.
        TrainingError: the policy cannot be trained like this, or training diverged; nothing is written.
    """
    validation = (read_rows(validation_data, demonstration), validation_data) if validation_data else None
    parts = Parts.of(read_rows(data, demonstration), data, validation, holdout)
    policy = TrainablePolicy(settings, dropout=True)
    trained, held_out = policy.tokenised(parts)
    trainer = SFTTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        peft_config=policy.adapters,
        args=SFTConfig(**policy.arguments(out, options, validates=bool(held_out))),
        train_dataset=_dataset(trained),
        eval_dataset=_dataset(held_out) if held_out else None,
    )
    log = MetricsLog(
        out,
        ("token_accuracy", "validation_loss"),
        logged={"mean_token_accuracy": "token_accuracy", "eval_loss": "validation_loss"},
    )
    return fit(trainer, policy, parts, "sft", out, options, log)


def _dataset(rows: list[TokenisedRow]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": one.prompt_ids + completion_ids,
                "labels": [NOT_LEARNT] * len(one.prompt_ids) + completion_ids,
            }
            for one in rows
            for completion_ids in one.completions
        ]
    )
