"""What every method of policy training uses: the model, the split of the data, TRL's arguments, and the weights.

Trained are low-rank adapters in all linear layers but the output (arXiv 2106.09685), in float32 over a frozen model, or
with `full` all weights. OUT/adapter is a PEFT directory. OUT/model is a transformers directory with the tokenizer, for
`nbest serve --model`. Either is written whole or not at all. With `merge` the adapter is also added to its base model:
in float32, then rounded once to the precision in which the base model is stored.

The order of the data depends on the seed alone, so a run that resumes from a checkpoint ends with the same weights as
an uninterrupted run.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from reranker.models.bundled import resolve
from reranker.models.device import takes_bfloat16
from training import checkpoints
from training.atomic_directory import atomic_model_directory
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow, hold_out
from training.errors import TrainingError
from training.lora_targets import lora_targets
from training.metrics_log import LOG_EVERY_STEPS, MetricsLog
from training.policy.config import FineTuning, PolicyTraining, RunOptions
from training.policy.tokens import TokenisedRow, tokenise


@dataclass(frozen=True, slots=True)
class DataSplit:
    """The rows to train on and the held-out rows, each with the source that errors name."""

    train: list[PreferenceRow]
    held_out: list[PreferenceRow]
    train_source: Source
    held_out_source: Source

    @classmethod
    def of(
        cls,
        rows: list[PreferenceRow],
        source: Source,
        validation: tuple[list[PreferenceRow], Source] | None,
        holdout: float,
    ) -> Self:
        """Holds out the validation rows or, without any, the share `holdout` of `rows` by the hash of the prompt.

        Raises:
            DataError: no row is left to train on.
        """
        if validation:
            return cls(rows, validation[0], source, validation[1])
        train, held_out = hold_out(rows, holdout)
        if not train:
            raise DataError(source, [(1, "all rows are held out and none is trained on; lower --holdout")])
        return cls(train, held_out, source, source)

    @property
    def digest(self) -> str:
        """The SHA-256 of all rows, which identifies the data of a run."""
        return hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()


class TrainablePolicy:
    """The model to train, and its tokenizer; `dropout` keeps the model's own rates, which most models set to 0.

    The model is loaded in float32. With `bfloat16`, a model that is stored in bfloat16 is loaded in it: for frozen
    base models.
    """

    def __init__(self, settings: PolicyTraining, *, dropout: bool, bfloat16: bool = False) -> None:
        set_seed(settings.seed)
        self.settings = settings
        self.directory = resolve(settings.base_model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        if self.tokenizer.eos_token_id is None:
            raise TrainingError(
                f"{settings.base_model} has no EOS token, so the policy cannot learn to end; choose another model"
            )
        config = AutoConfig.from_pretrained(self.directory)
        if not dropout:  # in the configuration, since attention reads its rate there and has no module to switch off
            config.update({name: 0.0 for name in config.to_dict() if name.endswith(("dropout", "pdrop"))})
        self.stored_dtype = config.dtype or torch.float32
        held_dtype = torch.bfloat16 if bfloat16 and self.stored_dtype is torch.bfloat16 else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, config=config, dtype=held_dtype)
        context = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_length = min(context, settings.max_length or context)

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that PEFT adds; None where all weights are trained."""
        if self.settings.full:
            return None
        return LoraConfig(
            task_type="CAUSAL_LM",
            **lora_targets(self.model.base_model),
            r=self.settings.lora_rank,
            lora_alpha=2 * self.settings.lora_rank,
            lora_dropout=0.0,
        )

    def tokenised(self, split: DataSplit) -> tuple[list[TokenisedRow], list[TokenisedRow]]:
        """(rows to train on, held-out rows) in tokens.

        Raises:
            DataError: rows that do not fit the model's context or hold nothing to learn.
        """
        return (
            tokenise(split.train, self.tokenizer, self.max_length, split.train_source),
            tokenise(split.held_out, self.tokenizer, self.max_length, split.held_out_source),
        )


def trl_arguments(
    settings: FineTuning, policy: TrainablePolicy, out: Path, options: RunOptions, *, validates: bool
) -> dict[str, Any]:
    """The arguments that TRL's SFTConfig and DPOConfig share.

    Raises:
        TrainingError: the batch does not divide into micro batches.
    """
    if settings.batch_size % settings.rows_at_once:
        raise TrainingError(
            f"a batch of {settings.batch_size} does not divide into micro batches of {settings.rows_at_once}; "
            "change one of them"
        )
    device_type = policy.model.device.type
    return {
        "output_dir": str(out / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.rows_at_once,
        "per_device_eval_batch_size": settings.rows_at_once,
        "gradient_accumulation_steps": settings.batch_size // settings.rows_at_once,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup_fraction,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": settings.seed,
        "use_cpu": device_type == "cpu",  # transformers needs it to allow bfloat16 on a CPU
        "bf16": takes_bfloat16(settings.dtype, device_type),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": None,  # the rows are already in tokens and truncated
        "eval_strategy": "epoch" if validates else "no",
        "logging_steps": LOG_EVERY_STEPS,
        "save_steps": options.checkpoint_every,
        "save_total_limit": 2,
        "report_to": "none",  # training.metrics_log writes the metrics
        "logging_nan_inf_filter": False,  # log a NaN loss as NaN
        "disable_tqdm": not options.progress,
        "dataloader_pin_memory": False,
    }


def fit(
    trainer: Any,
    policy: TrainablePolicy,
    split: DataSplit,
    method: str,
    out: Path,
    options: RunOptions,
    log: MetricsLog,
) -> Path:
    """Trains, from the last checkpoint if the run resumes, and writes the weights; returns the directory to serve.

    Raises:
        TrainingError: training diverged; nothing is written.
        CheckpointError: `out` holds checkpoints that this run cannot continue from.
    """
    run = asdict(policy.settings) | {"method": method, "data": split.digest}
    checkpoint = checkpoints.start(out / "checkpoints", run, resume=options.resume)
    trainer.add_callback(log)
    if not options.progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise TrainingError("training diverged: the weights are not finite; train with a lower learning rate")
    written = write_weights(trainer.model, policy, out, merge=options.merge)
    shutil.rmtree(out / "checkpoints")
    return written


def write_weights(model: Any, policy: TrainablePolicy, out: Path, *, merge: bool) -> Path:
    """Writes OUT/adapter and, with `merge` or `full`, OUT/model; returns OUT/model if it was written, else OUT/adapter.

    OUT/model is rounded to the precision of its base. This changes `model` in place, so it cannot be trained further.
    """
    if not policy.settings.full:
        written = write_adapter(model, policy, out)
        if not merge:
            return written
        model = model.float().merge_and_unload()
    model.to(policy.stored_dtype)
    with atomic_model_directory(out / "model") as unfinished:
        model.save_pretrained(unfinished)
        policy.tokenizer.save_pretrained(unfinished)
    return out / "model"


def write_adapter(model: Any, policy: TrainablePolicy, out: Path) -> Path:
    """Writes OUT/adapter as PEFT does, and returns it."""
    # The name of the base model, not the directory that it resolves to here: the adapter is loaded on other machines.
    model.peft_config["default"].base_model_name_or_path = policy.settings.base_model
    with atomic_model_directory(out / "adapter") as unfinished:
        # The embeddings are never trained here. Without this setting PEFT asks the hub about them at every save.
        model.save_pretrained(unfinished, save_embedding_layers=False)
    return out / "adapter"
