"""What the commands of `nbest train` have in common: options, and how they end."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DtypeOption(StrEnum):
    """What the frozen trunk computes in while training."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


PolicyOut = Annotated[Path, typer.Option(help="Directory for the weights, metrics and checkpoints.")]
Policy = Annotated[str, typer.Option(help="Policy to train: prepared name, directory or hub id.")]
Full = Annotated[bool, typer.Option("--full", help="Train all weights and write OUT/model, not an adapter.")]
Merge = Annotated[
    bool, typer.Option("--merge", help="Also write OUT/model, the base model with the adapter added to it.")
]
LoraRank = Annotated[int, typer.Option(min=1, help="Rank of the adapters.")]
Epochs = Annotated[float, typer.Option(min=0.0, help="Passes over the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Rows computed at once, if a batch does not fit in memory.")
]
LearningRate = Annotated[float | None, typer.Option(min=0.0, help="Highest learning rate, which decays to 0.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and completion; default: the model's.")]
Validation = Annotated[str | None, typer.Option(help="Held-out data; default: a share of the data.")]
Holdout = Annotated[float, typer.Option(min=0.0, max=0.9, help="That share, chosen by hash of the prompt.")]
Dtype = Annotated[DtypeOption, typer.Option(help="What the policy computes in.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, to hold fewer.")
]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps after which all is saved to go on from.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT, or start if there is none.")
]
Seed = Annotated[int, typer.Option(help="Decides the adapters' start and the order of the data.")]


def tell_policy(written: Path, base_model: str) -> None:
    named = f"--model {written}" if written.name == "model" else f"--model {base_model} --adapter {written}"
    typer.echo(f"Serve it with: nbest serve {named}")


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """What a user can mend is told without a traceback."""
    from reranker.prepared import PreparationError
    from reranker.reward_model import RewardModelError
    from server.config import ConfigError
    from server.errors import NbestError
    from training.checkpoints import CheckpointError
    from training.data_source import DataSourceError
    from training.errors import TrainingError
    from training.preference_data import DataError

    try:
        yield
    except (
        CheckpointError,
        ConfigError,
        DataError,
        DataSourceError,
        NbestError,
        RewardModelError,
        PreparationError,
        TrainingError,
        OSError,
    ) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        typer.echo(f"Error: {error.name} is not installed; it comes with: pip install 'nbest[train]'", err=True)
        raise typer.Exit(1) from error
