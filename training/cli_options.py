"""What the training commands share: options, options made from settings, and how a command reports errors."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

PolicyOut = Annotated[Path, typer.Option(help="Directory for the weights, metrics and checkpoints.")]
Validation = Annotated[str | None, typer.Option(help="Held-out data; default: a share of the data.")]
Holdout = Annotated[
    float,
    typer.Option(min=0.0, max=0.9, help="That share, chosen by a hash of the prompt."),
]


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer in which every parameter that is a settings dataclass becomes the options of its fields.

    A field is an option if its type is `Annotated[T, typer.Option(...)]`; the others keep their defaults. The command
    receives the dataclass, made from the values of the options. Other parameters stay as they are.
    """
    parameters = inspect.signature(command).parameters
    settings_types = {name: parameter.annotation for name, parameter in parameters.items() if _is_settings(parameter)}

    @functools.wraps(command)
    def from_options(**values: Any) -> None:
        settings = {
            name: settings_type(**{field.name: values.pop(field.name) for field in option_fields(settings_type)})
            for name, settings_type in settings_types.items()
        }
        command(**settings, **values)

    expanded: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if name in settings_types:
            expanded += [_parameter_of(field) for field in option_fields(settings_types[name])]
        else:
            expanded.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    from_options.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]  # typer reads the options here
    return from_options


def option_fields(settings_type: Any) -> list[Field[Any]]:
    """The fields of a settings dataclass that are options, in their order."""
    return [field for field in fields(settings_type) if any(isinstance(a, OptionInfo) for a in get_args(field.type))]


def _is_settings(parameter: inspect.Parameter) -> bool:
    return is_dataclass(parameter.annotation)


def _parameter_of(field: Field[Any]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def echo_serve_command(written: Path, base_model: str) -> None:
    """Prints the command that serves the weights a training command has written."""
    options = f"--model {written}" if written.name == "model" else f"--model {base_model} --adapter {written}"
    typer.echo(f"Serve it with: nbest serve {options}")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Prints an error that the user can correct as one line on stderr, without a traceback, and exits with 1."""
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
