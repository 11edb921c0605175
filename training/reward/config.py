"""Settings of reward training, and the command-line options made from them (see `training.policy.config`)."""

from dataclasses import dataclass
from typing import Annotated, Literal, cast

import typer

from reranker.models.device import Precision
from reranker.models.rendering_style import RenderingStyle
from training.policy.config import LearningRates

RewardMethod = Literal["lora", "head", "full"]

DEFAULT_RATES = LearningRates(adapter=3e-4, full=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTraining:
    """Everything that decides the result of a run, but for the data.

    `batch_size` counts rows: rated texts, or pairs. `min_gap` is the smallest difference of two ratings that makes a
    comparison; pairs always compare. `center` weighs the penalty on rewards far from zero. `num_layers` is the number
    of the model's lowest layers that are used, `lora_layers` the number of top layers among those that get adapters;
    None means all. `dtype` is the precision of matrix products; trained weights are float32. `learning_rate` is the
    peak: the rate rises over the first `warmup_fraction` of the steps and decays linearly to 0.
    """

    base_model: Annotated[
        str, typer.Option("--model", help="Model to start from: prepared name, directory or hub id.")
    ] = "smollm2-135m-instruct"
    method: Annotated[
        RewardMethod, typer.Option(help="lora: train adapters and the head; head: the head alone; full: all weights.")
    ] = "lora"
    style: Annotated[
        RenderingStyle,
        typer.Option(
            help="Text that the model reads. chat: by its chat template; transcript: all turns as plain text; pair: "
            "prompt and answer as a text pair; document: the answer without its conversation."
        ),
    ] = "chat"
    num_layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Number of the lowest layers to use; default: all.")
    ] = None
    lora_layers: Annotated[
        int | None, typer.Option(min=1, help="Number of the top layers in use that get adapters; default: all.")
    ] = None
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapters.")] = 8
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimiser step: pairs, or rated texts.")] = 32
    learning_rate: Annotated[
        float,
        typer.Option(
            min=0.0, help="Peak learning rate; it decays linearly to 0. Default: 3e-4, with --method full 1e-5."
        ),
    ] = None  # type: ignore[assignment]  # __post_init__ replaces it
    warmup_fraction: float = 0.05
    min_gap: Annotated[float, typer.Option(help="Smallest difference of two ratings that makes a comparison.")] = 1.0
    center: Annotated[
        float, typer.Option(min=0.0, help="Weight of a penalty on rewards far from zero, such as 0.01.")
    ] = 0.0
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of prompt and answer; default: the model's context.")
    ] = None
    dtype: Annotated[
        Precision, typer.Option(help="Precision of matrix products; auto: bfloat16 where the device is faster in it.")
    ] = "auto"
    seed: Annotated[int, typer.Option(help="Seed of the initial head and of the order of the data.")] = 0

    def __post_init__(self) -> None:
        if cast(float | None, self.learning_rate) is None:
            rate = DEFAULT_RATES.full if self.method == "full" else DEFAULT_RATES.adapter
            object.__setattr__(self, "learning_rate", rate)

    @property
    def weights_name(self) -> str:
        """The directory in OUT that holds the reward model."""
        return "model" if self.method == "full" else "adapter"
