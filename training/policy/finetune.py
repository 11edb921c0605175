"""What fine-tuning by demonstrations and by preferences have in common: the policy, its training and its weights.

Learning are low-rank adapters in all linear layers but the output (arXiv 2106.09685), in float32 over a frozen model,
or with `full` all weights. OUT/adapter is a PEFT directory, OUT/model one of transformers with its tokenizer that
`nbest serve --model` takes; either appears whole or not at all. With `merge` an adapter is also added to its base
model: in float32, and rounded once, to the precision in which the base model is stored.

The order of the data depends on the seed alone, so a run that goes on from a checkpoint ends where it would have ended
without the interruption.
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
from reranker.models.device import Precision, takes_bfloat16
from training import checkpoints
from training.atomic_directory import appearing_whole
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow, hold_out
from training.errors import TrainingError
from training.metrics_log import LOG_EVERY_STEPS, MetricsLog
from training.policy.tokens import TokenisedRow, tokenise


@dataclass(frozen=True, slots=True)
class PolicyTraining:
    """Everything that decides the result of a run.

    `batch_size` is in rows a step, of which `micro_batch_size` are computed at once (all, unless given). `max_length`
    covers prompt and completion; by default the model's context.
    """

    base_model: str = "smollm2-135m-instruct"
    full: bool = False
    lora_rank: int = 16
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 2e-4
    warmup_fraction: float = 0.05
    max_length: int | None = None
    dtype: Precision = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0

    @property
    def rows_at_once(self) -> int:
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What does not decide the result. With `merge` an adapter is written as a whole model too."""

    checkpoint_every: int = 500
    resume: bool = False
    merge: bool = False
    progress: bool = True


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows trained on, and those held out."""

    trained: list[PreferenceRow]
    held_out: list[PreferenceRow]
    trained_source: Source
    held_out_source: Source

    @classmethod
    def of(
        cls,
        train: list[PreferenceRow],
        source: Source,
        validation: tuple[list[PreferenceRow], Source] | None,
        holdout: float,
    ) -> Self:
        """Held out are the validation rows or, without any, a share of the others by the hash of the prompt.

        Raises:
            DataError: nothing is left to train on.
        """
        if validation:
            return cls(train, validation[0], source, validation[1])
        trained, held_out = hold_out(train, holdout)
        if not trained:
            raise DataError(source, [(1, "all rows are held out and none is trained on; lower --holdout")])
        return cls(trained, held_out, source, source)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.trained, self.held_out)).encode()).hexdigest()


class TrainablePolicy:
    """The model to be trained and its tokenizer; `dropout` leaves the model's own, of which most have none.

    It is held in float32 or, with `bfloat16`, in that if it is stored in it: for bases that are frozen.
    """

    def __init__(self, settings: PolicyTraining, *, dropout: bool, bfloat16: bool = False) -> None:
        set_seed(settings.seed)
        self.settings = settings
        self.directory = resolve(settings.base_model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        if self.tokenizer.eos_token_id is None:
            raise TrainingError(
                f"{settings.base_model} has no EOS token, so nothing it learns could end; choose another"
            )
        config = AutoConfig.from_pretrained(self.directory)
        if not dropout:  # in the configuration: attention's is a number of it and no module that could be turned off
            config.update({name: 0.0 for name in config.to_dict() if name.endswith(("dropout", "pdrop"))})
        self.stored_dtype = config.dtype or torch.float32
        held_dtype = torch.bfloat16 if bfloat16 and self.stored_dtype is torch.bfloat16 else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, config=config, dtype=held_dtype)
        context = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_length = min(context, settings.max_length or context)

    @property
    def adapters(self) -> LoraConfig | None:
        """What PEFT is to add; None where all weights learn."""
        if self.settings.full:
            return None
        return LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=self.settings.lora_rank,
            lora_alpha=2 * self.settings.lora_rank,
            lora_dropout=0.0,
        )

    def tokenised(self, parts: Parts) -> tuple[list[TokenisedRow], list[TokenisedRow]]:
        """(rows trained on, rows held out) in tokens.

        Raises:
            DataError: some do not fit.
        """
        return (
            tokenise(parts.trained, self.tokenizer, self.max_length, parts.trained_source),
            tokenise(parts.held_out, self.tokenizer, self.max_length, parts.held_out_source),
        )

    def arguments(self, out: Path, options: RunOptions, *, validates: bool) -> dict[str, Any]:
        """What TRL's configurations have in common."""
        settings = self.settings
        if settings.batch_size % settings.rows_at_once:
            raise TrainingError(
                f"a batch of {settings.batch_size} does not divide into micro batches of {settings.rows_at_once}; "
                "change one of them"
            )
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
            "use_cpu": self.model.device.type == "cpu",  # which transformers wants to be told for bfloat16 there
            "bf16": takes_bfloat16(settings.dtype, self.model.device.type),
            "gradient_checkpointing": settings.gradient_checkpointing,
            "max_length": None,  # the rows are in tokens already, and cut
            "eval_strategy": "epoch" if validates else "no",
            "logging_steps": LOG_EVERY_STEPS,
            "save_steps": options.checkpoint_every,
            "save_total_limit": 2,
            "report_to": "none",  # training.metrics_log does it
            "logging_nan_inf_filter": False,  # a loss that is no number is told as it is
            "disable_tqdm": not options.progress,
            "dataloader_pin_memory": False,
        }


def fit(
    trainer: Any, policy: TrainablePolicy, parts: Parts, method: str, out: Path, options: RunOptions, log: MetricsLog
) -> Path:
    """Trains, from the last checkpoint where the run is resumed, and writes the weights; returns what can be served.

    Raises:
        TrainingError: training diverged; nothing is written.
        CheckpointError: `out` holds checkpoints that this run cannot go on from.
    """
    run = asdict(policy.settings) | {"method": method, "data": parts.digest}
    checkpoint = checkpoints.start(out / "checkpoints", run, resume=options.resume)
    trainer.add_callback(log)
    if not options.progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    learnt = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not all(bool(parameter.isfinite().all()) for parameter in learnt):
        raise TrainingError("training diverged, so the weights are no numbers; train with a lower learning rate")
    written = write_weights(trainer.model, policy, out, merge=options.merge)
    shutil.rmtree(out / "checkpoints")
    return written


def write_weights(model: Any, policy: TrainablePolicy, out: Path, *, merge: bool) -> Path:
    """OUT/adapter, and OUT/model where it is asked for; the last of them.

    The model is rounded to the precision of its base: `model` is of no use after that.
    """
    if not policy.settings.full:
        written = write_adapter(model, policy, out)
        if not merge:
            return written
        model = model.float().merge_and_unload()
    model.to(policy.stored_dtype)
    with appearing_whole(out / "model") as unfinished:
        model.save_pretrained(unfinished)
        policy.tokenizer.save_pretrained(unfinished)
    return out / "model"


def write_adapter(model: Any, policy: TrainablePolicy, out: Path) -> Path:
    """OUT/adapter, as PEFT writes it."""
    # The name, not the directory of this machine it was resolved to: the adapter is read on others.
    model.peft_config["default"].base_model_name_or_path = policy.settings.base_model
    with appearing_whole(out / "adapter") as unfinished:
        # Embeddings never learn here; left to itself PEFT asks the hub about them, at every save.
        model.save_pretrained(unfinished, save_embedding_layers=False)
    return out / "adapter"
