"""What the commands of `nbest train` have in common: options, and how they end.

The options of a command are the fields of a dataclass. What commands share stands in one dataclass that theirs derive
from; of several bases the fields of the last come first, and so they do in `--help`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import typer


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Options = TypeVar("Options", bound=_Dataclass)
Settings = TypeVar("Settings", bound=_Dataclass)


class DtypeOption(StrEnum):
    """What the frozen trunk computes in while training."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


PolicyOut = Annotated[Path, typer.Option(help="Directory for the weights, metrics and checkpoints.")]
PolicyModel = Annotated[str, typer.Option(help="Policy to train: prepared name, directory or hub id.")]
Validation = Annotated[str | None, typer.Option(help="Held-out data; default: a share of the data.")]
Holdout = Annotated[float, typer.Option(min=0.0, max=0.9, help="That share, chosen by hash of the prompt.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, to hold fewer.")
]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps after which all is saved to go on from.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT, or start if there is none.")
]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights learn, and how they are written."""

    full: Annotated[bool, typer.Option("--full", help="Train all weights and write OUT/model, not an adapter.")] = False
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write OUT/model, the base model with the adapter added to it.")
    ] = False
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16


def takes(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """A command whose options are the fields of a dataclass; typer finds them in a signature that is made of these."""

    def decorated(command: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            command(kind(**given))

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for field in fields(kind)
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorated


def settings_of(kind: type[Settings], options: object, **more: Any) -> Settings:
    """The settings that options of the same names give, and `more`; what no option names stays as it is."""
    given = {field.name: getattr(options, field.name) for field in fields(kind) if hasattr(options, field.name)}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    return kind(**plain | more)


def tell_policy(written: Path, base_model: str) -> None:
    named = f"--model {written}" if written.name == "model" else f"--model {base_model} --adapter {written}"
    typer.echo(f"Serve it with: nbest serve {named}")


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """What a user can mend is told without a traceback."""
    from reranker.models.bundled import PreparationError
    from reranker.models.reward_model import RewardModelError
    from server.config import ConfigError
    from server.errors import NbestError
    from training.checkpoints import CheckpointError
    from training.data.data_source import DataSourceError
    from training.data.preferences import DataError
    from training.errors import TrainingError

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
