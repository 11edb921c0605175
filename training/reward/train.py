"""Trains a reward model on preferences.

The loss is Bradley and Terry's (1952): the better of two texts wins with probability sigma(r_better - r_worse), and
-log of that is minimised, as for InstructGPT (arXiv 2203.02155, section 3.5). As there, every text of a batch is
computed once and compared with all texts that it can be compared with: a batch of B rated texts gives up to B(B-1)/2
comparisons for B forward passes. A batch of pairs has one comparison for each pair and, where the data gives one, a
margin by which the better text should win (Llama 2, arXiv 2307.09288, section 3.2.2).

The scalar head is trained. With the method `lora`, so are low-rank adapters in the linear layers of the trunk
(arXiv 2106.09685), which itself is frozen; with the method `full`, so is the whole trunk. The head starts at a standard
deviation of 1/sqrt(d + 1), so that the first rewards are of order one (arXiv 2403.17031, 4.1). The loop is
transformers' Trainer.

With `num_layers` the reward model uses only that many of the lowest layers of the trunk. The upper layers of a language
model serve to predict the next token; probes find the meaning of a text below them. A shorter trunk is also cheaper.

OUT/adapter is a PEFT directory that `RewardModel.load` reads. OUT/model (method `full`) is a transformers directory.
Either is written whole or not at all. The order of the data depends on the seed and the epoch alone, so a run that
resumes from a checkpoint ends with the same weights as an uninterrupted run.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from reranker.models.bundled import resolve
from reranker.models.device import takes_bfloat16
from reranker.models.rendering import Rendered, pad
from reranker.models.reward_model import RewardConfig, RewardModelError, forward_rewards, load_classifier, make_renderer
from training import checkpoints
from training.atomic_directory import atomic_model_directory
from training.data.data_source import Source
from training.data.preferences import (
    DataError,
    Example,
    has_comparison,
    hold_out,
    ordered_pairs,
    read_rows,
    render_rows,
)
from training.lora_targets import lora_targets
from training.metrics_log import LOG_EVERY_STEPS, MetricsLog
from training.reward.config import RewardTraining
from training.reward.evaluate import score_all
from training.reward.pair_accuracy import PairAccuracy, pair_accuracy


def bradley_terry_loss(
    rewards_N: torch.Tensor,
    better_K: torch.Tensor,
    worse_K: torch.Tensor,
    *,
    margins_K: torch.Tensor | float = 0.0,
    center: float = 0.0,
) -> torch.Tensor:
    """Mean of -log sigma(r_better - r_worse - margin) over K comparisons, in nats; 0 if there is no comparison.

    The loss does not change when all rewards change by the same amount. `center` adds
    center * mean((r_better + r_worse)^2), which pulls them to zero (arXiv 2312.09244); TRL calls it
    `center_rewards_coefficient` and suggests 0.01.
    """
    if len(better_K) == 0:
        return rewards_N.sum() * 0.0
    better_rewards_K, worse_rewards_K = rewards_N[better_K], rewards_N[worse_K]
    loss = -F.logsigmoid(better_rewards_K - worse_rewards_K - margins_K).mean()
    return loss + center * (better_rewards_K + worse_rewards_K).square().mean()


def train_reward(
    train_data: Source,
    out: Path,
    settings: RewardTraining,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
    checkpoint_every: int = 500,
    resume: bool = False,
    progress: bool = True,
) -> PairAccuracy | None:
    """Trains on preferences (see `training.data.preferences`); writes the reward model and its metrics into `out`.

    After every epoch the pair accuracy is measured on the validation data or, without any, on the share `holdout` of
    the rows, which is not trained on. Returns the last measurement, or None if no row is held out. Every
    `checkpoint_every` steps a checkpoint is written; with `resume` the run continues from the last checkpoint, or
    starts from the beginning if there is none.

    Raises:
        training.data.preferences.DataError: rows that cannot be used, found before the first step.
        training.data.data_source.DataSourceError: there is no such data.
        training.checkpoints.CheckpointError: `out` holds checkpoints that this run cannot continue from.
        reranker.models.reward_model.RewardModelError: the base model cannot be loaded, or training diverged;
            nothing is saved.
    """
    rows = read_rows(train_data)
    rows, held_out = (rows, read_rows(validation_data)) if validation_data else hold_out(rows, holdout)
    for part, name in ((rows, "trained on"), (held_out, "held out")):
        if (part or name == "trained on") and not has_comparison(part, settings.min_gap):
            raise DataError(
                validation_data if validation_data and part is held_out else train_data,
                [(1, f"the rows {name} give no comparison: they are too few, or their ratings too similar")],
            )
    if settings.batch_size == 1 and all(len(row.texts) == 1 for row in rows):
        raise DataError(
            train_data,
            [(1, "rated texts are compared within a batch, and a batch of 1 has no comparison; raise --batch-size")],
        )
    set_seed(settings.seed)
    base = resolve(settings.base_model)
    classifier = load_classifier(base, new_head=True, num_layers=settings.num_layers)
    renderer = make_renderer(base, classifier, settings.style)
    renderer.max_length = min(renderer.max_length, settings.max_length or renderer.max_length)
    examples = render_rows(rows, renderer, train_data)
    validation = render_rows(held_out, renderer, validation_data or train_data)

    model = _trainable(classifier, settings)
    pad_id = renderer.tokenizer.pad_token_id or 0
    classifier.config.pad_token_id = pad_id
    run = asdict(settings) | {"data": hashlib.sha256(repr((rows, held_out)).encode()).hexdigest()}
    checkpoint = checkpoints.start(out / "checkpoints", run, resume=resume)

    last_validation: PairAccuracy | None = None

    def validate() -> dict[str, float]:
        nonlocal last_validation
        rewards = iter(_scores(model, [r for example in validation for r in example.rendered], pad_id, settings))
        rewards_by_row = [tuple(next(rewards) for _ in example.rendered) for example in validation]
        last_validation = pair_accuracy(rewards_by_row, validation, min_gap=settings.min_gap)
        return {"validation_pair_accuracy": last_validation.accuracy}

    log = MetricsLog(out, ("validation_pair_accuracy",), validate if validation else None)
    trainer = RewardTrainer(
        settings,
        model=model,
        args=_training_arguments(out, settings, checkpoint_every, progress=progress),
        train_dataset=examples,
        data_collator=lambda batch: collate(batch, pad_id, settings.min_gap),
        callbacks=[log],
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad):
        raise RewardModelError("training diverged: the weights are not finite; train with a lower learning rate")
    config = RewardConfig(settings.base_model, settings.style, settings.num_layers)
    _save(model, renderer.tokenizer, config, out / settings.weights_name)
    shutil.rmtree(out / "checkpoints")
    return last_validation


def _training_arguments(
    out: Path, settings: RewardTraining, checkpoint_every: int, *, progress: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_fraction,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        logging_steps=LOG_EVERY_STEPS,
        save_steps=checkpoint_every,
        save_total_limit=2,
        report_to="none",  # training.metrics_log writes the metrics
        logging_nan_inf_filter=False,  # log a NaN loss as NaN
        remove_unused_columns=False,
        disable_tqdm=not progress,
        dataloader_pin_memory=False,
    )


class RewardTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' loop with the Bradley-Terry loss, in batches of texts of similar length, which saves padding."""

    def __init__(self, settings: RewardTraining, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings = settings

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        examples = train_dataset or self.train_dataset
        steps_per_epoch = math.ceil(len(examples) / self._settings.batch_size)
        return _SeededLengthGroupedSampler(
            [max(len(r.token_ids) for r in example.rendered) for example in examples],
            self._settings,
            epoch=lambda: int(self.state.global_step) // steps_per_epoch,
        )

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
        rewards_N = _forward(model, inputs, self._settings)
        return bradley_terry_loss(
            rewards_N,
            inputs["better"],
            inputs["worse"],
            margins_K=inputs["margins"],
            center=self._settings.center,
        )


class _SeededLengthGroupedSampler(LengthGroupedSampler):  # type: ignore[misc]  # transformers is untyped here
    """transformers' sampler, in an order that depends only on seed and epoch, so that a resumed run repeats it."""

    def __init__(self, lengths: list[int], settings: RewardTraining, epoch: Callable[[], int]) -> None:
        super().__init__(settings.batch_size, lengths=lengths)
        self._seed = settings.seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(super().__iter__())


def collate(batch: Sequence[Example], pad_id: int, min_gap: float) -> dict[str, torch.Tensor]:
    """All texts of the examples as one padded batch, and the comparisons among them."""
    input_ids_N_T, attention_mask_N_T = pad([r for example in batch for r in example.rendered], pad_id)
    ratings_N = torch.tensor([rating for example in batch for rating in example.ratings])
    groups_N = torch.tensor([example.group for example in batch for _ in example.ratings])
    margins_N = torch.tensor([example.margin for example in batch for _ in example.ratings])
    better_K, worse_K = ordered_pairs(ratings_N, groups_N, min_gap)
    return {
        "input_ids": input_ids_N_T,
        "attention_mask": attention_mask_N_T,
        "better": better_K,
        "worse": worse_K,
        "margins": margins_N[better_K],
    }


def _trainable(classifier: Any, settings: RewardTraining) -> Any:
    """The classifier with a new head and, by the method, adapters or the whole trunk to train; the rest is frozen."""
    head = getattr(classifier, "score", None)
    if head is None:
        raise RewardModelError(f"{settings.base_model} is an encoder; reward training needs a decoder, so choose one")
    torch.nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    if settings.method == "full":
        return classifier
    targets: dict[str, Any] = {"target_modules": DUMMY_TARGET_MODULES}
    if settings.method == "lora":
        num_layers = classifier.config.num_hidden_layers
        adapted = range(max(0, num_layers - (settings.lora_layers or num_layers)), num_layers)
        targets = lora_targets(classifier.base_model) | {"layers_to_transform": list(adapted)}
    return get_peft_model(
        classifier,
        LoraConfig(
            task_type="SEQ_CLS",  # trains the head and saves it with the adapters
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            **targets,
        ),
    )


def _forward(model: Any, inputs: dict[str, torch.Tensor], settings: RewardTraining) -> torch.Tensor:
    device = inputs["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=takes_bfloat16(settings.dtype, device)):
        classifier = model if settings.method == "full" else model.get_base_model()
        return forward_rewards(classifier, inputs["input_ids"], inputs["attention_mask"])


@torch.inference_mode()
def _scores(model: Any, rendered_N: list[Rendered], pad_id: int, settings: RewardTraining) -> list[float]:
    """rewards_N of the current model, which is in training mode before and after."""
    device = next(model.parameters()).device

    def score(batch: list[Rendered]) -> list[float]:
        input_ids_N_T, attention_mask_N_T = pad(batch, pad_id)
        inputs = {"input_ids": input_ids_N_T.to(device), "attention_mask": attention_mask_N_T.to(device)}
        return [float(reward) for reward in _forward(model, inputs, settings)]

    model.eval()
    rewards_N = score_all(score, rendered_N)
    model.train()
    return rewards_N


def _save(model: Any, tokenizer: Any, config: RewardConfig, directory: Path) -> None:
    """Writes the weights whole or not at all, and the tokenizer if they are a model of their own."""
    with atomic_model_directory(directory) as unfinished:
        if isinstance(model, PeftModel):
            # The name of the base model, not the directory that it resolves to here: the adapter is loaded on other
            # machines. The embeddings are never trained; without this setting PEFT asks the hub about them.
            model.peft_config["default"].base_model_name_or_path = config.base_model
            model.save_pretrained(unfinished, save_embedding_layers=False)
        else:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        config.save(unfinished)
