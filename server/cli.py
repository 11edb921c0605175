"""The `nbest` command.

Nothing heavy is imported before a command needs it, so that `nbest --help` answers at once. The flags of `serve` and
`doctor` are made from the fields of `Settings`: there is no second list of them.
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from server.config import CONFIG_VARIABLE, ConfigError, Settings, flag_of, is_secret, load_settings

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as a shell reports a command ended by Ctrl-C."""

app = typer.Typer(
    name="nbest",
    help="Best-of-N inference: sample N candidates, score each with a reward model, answer with the best.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(help="API keys of the server.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
console = Console(stderr=True, highlight=False, soft_wrap=True)
"""For what is said to a person; results go to stdout."""

_Config = Annotated[Path | None, typer.Option("--config", help=f"TOML file of settings; also {CONFIG_VARIABLE}.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Turns `command(settings, ...)` into one with `--config` and an option for every setting that is no secret."""

    def run(ctx: typer.Context, config: _Config = None, **options: Any) -> None:
        values = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
        # The options carry their defaults for --help only; the environment and the file stand above those.
        sources = {name: ctx.get_parameter_source(name) for name in values}
        given = {name: value for name, value in values.items() if getattr(sources[name], "name", "") == "COMMANDLINE"}
        command(load_settings(given, config), **options)

    own = list(inspect.signature(command).parameters.values())[1:]
    before = list(inspect.signature(run).parameters.values())[:-1]
    signature = inspect.Signature(
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*before, *own)] + _setting_parameters()
    )
    vars(run)["__signature__"] = signature  # what typer builds the options from, together with the annotations
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


def group_of(module: str, name: str) -> type[TyperGroup]:
    """A group of commands that imports the Typer app holding them when one of them is asked for, and not before."""

    class Deferred(TyperGroup):
        def _group(self) -> TyperGroup:
            held: typer.Typer = getattr(import_module(module), name)
            held.rich_markup_mode = app.rich_markup_mode  # one look for all commands
            return typer.main.get_group(held)

        def list_commands(self, ctx: Any) -> list[str]:
            return self._group().list_commands(ctx)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return self._group().get_command(ctx, cmd_name)

    return Deferred


@app.command()
@with_settings
def serve(settings: Settings) -> None:
    """Serve best-of-N over HTTP until Ctrl-C.

    Every option is also a key of the TOML file and, in capitals after NBEST_, an environment variable. Flags win over
    the environment, and that over the file.
    """
    from server import launch
    from server.doctor import require_models

    require_models(settings)
    try:
        if settings.ray:
            from server import cluster

            cluster.serve(settings, console)
        else:
            launch.serve(settings, console)
    except launch.StartError as error:
        raise CommandError(str(error)) from error


@app.command()
@with_settings
def doctor(
    settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False
) -> None:
    """Say what would be served and what is wrong.

    Looks at what is installed and prepared, the device, memory, disk and port, and names the way out of every problem.
    The exit code is 1 if `nbest serve` with the same options would not come up.
    """
    from server import doctor as examination

    report = examination.examine(settings)
    if as_json:
        typer.echo(report.as_json())
    else:
        examination.show(report, Console())
    raise typer.Exit(int(not report.can_serve))


@app.command()
def prepare(
    names: Annotated[list[str] | None, typer.Argument(help="Embedded models; all of them when none is named.")] = None,
) -> None:
    """Unpack the embedded models, once.

    They go to the user's cache, or to NBEST_CACHE, and `nbest serve` needs no network for them.
    """
    from reranker import prepared

    try:
        for name in names or [model.name for model in prepared.prepared_models()]:
            typer.echo(prepared.prepare(name))
    except prepared.PreparationError as error:
        raise CommandError(str(error)) from error


@keys_app.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; letters, digits, - and _.")],
    file: Annotated[Path, typer.Option("--file", help="TOML file to append it to; made if it is not there.")] = Path(
        "keys.toml"
    ),
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute; default: any.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens a minute; default: any.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Tokens a day; default: any.")] = None,
) -> None:
    """Make a key, print it once, and append its hash and budgets to the file.

    A server started with --keys-file takes it within a second.
    """
    from server import auth

    budgets = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    typer.echo(auth.new_key(file, name, **budgets))
    console.print(f"This is the only time the key is shown; {file} has its hash under {name}.")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"nbest {metadata.version('nbest')}")


app.add_typer(
    typer.Typer(cls=group_of("training.cli", "train_app"), help="Train a reward model or a policy."), name="train"
)
app.add_typer(
    typer.Typer(cls=group_of("training.cli", "evaluate_app"), help="Measure a model on held-out data."),
    name="evaluate",
)


class CommandError(Exception):
    """The command could not do what was asked; the message is one sentence for the user."""


def main() -> None:
    """The entry point: an expected error is one sentence on stderr and an exit code, never a traceback."""
    try:
        app()
    except (ConfigError, CommandError) as error:
        console.print(f"Error: {error}", markup=False, style="red")
        sys.exit(USAGE_ERROR if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
