"""Shared parts of the command line.

Options generated from `Settings`, commands that are imported only when they are called, and the error that becomes one
sentence on stderr.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from server.config import CONFIG_VARIABLE, Settings, flag_of, is_secret, load_settings

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Prints messages for the user to stderr; results go to stdout."""


class CommandError(Exception):
    """The command failed in an expected way; the message is one sentence for the user."""


class DeferredCommand(TyperCommand):
    """A command that is imported when it is called, but not for `nbest --help`.

    It is the command of this name in the Typer app, or the whole app if the app has no command of this name.
    """

    def __init__(self, name: str, module: str, app: str, help_text: str) -> None:
        super().__init__(name, help=help_text, rich_markup_mode=None)
        self._module = module
        self._app = app

    def load(self) -> Any:
        """The command itself."""
        app: typer.Typer = getattr(import_module(self._module), self._app)
        app.rich_markup_mode = None  # plain help texts, like those of the other commands
        group = typer.main.get_group(app)
        return group.commands.get(str(self.name), group)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.load().make_context(info_name, args, parent, **extra)


_Config = Annotated[Path | None, typer.Option("--config", help=f"TOML file of settings; also {CONFIG_VARIABLE}.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Turns `command(settings, ...)` into one with `--config` and an option for every setting that is not a secret."""

    def run(ctx: typer.Context, config: _Config = None, **options: Any) -> None:
        values = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
        # The defaults of the options are for --help only: the environment and the file override them.
        sources = {name: ctx.get_parameter_source(name) for name in values}
        given = {name: value for name, value in values.items() if getattr(sources[name], "name", "") == "COMMANDLINE"}
        command(load_settings(given, config), **options)

    own = list(inspect.signature(command).parameters.values())[1:]
    before = list(inspect.signature(run).parameters.values())[:-1]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*before, *own)]
    signature = inspect.Signature(keyword_only + _setting_parameters())
    vars(run)["__signature__"] = signature  # typer builds the options from this and from the annotations
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    return run


def _setting_parameters() -> list[inspect.Parameter]:
    parameters = []
    for name, field in Settings.model_fields.items():
        if is_secret(field):
            continue
        flag = names = flag_of(name)
        kind: Any = field.annotation
        default, metavar = field.default, None
        if kind is bool:
            names = f"{flag}/--no-{flag[2:]}"
        if isinstance(default, dict):
            kind, metavar = list[str], "NAME=SPEC"
            default = [f"{name}={spec}" for name, spec in default.items()]
        annotation = Annotated[kind, typer.Option(names, help=field.description, metavar=metavar)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters
