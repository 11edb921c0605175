"""The `nbest` command.

Nothing heavy is imported before a command needs it, so that `nbest --help` answers at once. The flags of `serve` and
`doctor` are made from the fields of `Settings`: there is no second list of them.
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any, Literal

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
    from reranker.models import bundled

    try:
        for name in names or [model.name for model in bundled.prepared_models()]:
            typer.echo(bundled.prepare(name))
    except bundled.PreparationError as error:
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
    admin: Annotated[bool, typer.Option("--admin", help="Let the key load adapters into the running server.")] = False,
) -> None:
    """Make a key, print it once, and append its hash and budgets to the file.

    A server started with --keys-file takes it within a second.
    """
    from server.http import api_keys

    budgets = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    typer.echo(api_keys.new_key(file, name, admin=admin, **budgets))
    console.print(f"This is the only time the key is shown; {file} has its hash under {name}.")


_Input = Annotated[
    str, typer.Argument(metavar="IN", help="JSON lines, a Parquet table, an OpenAI batch file; - is stdin.")
]
_RunOut = Annotated[Path, typer.Option("--out", help="Directory for the results; a run that stopped goes on there.")]
_InFlight = Annotated[
    int | None, typer.Option(min=1, help="Candidates under way at once; default: 1.5 times --max-num-seqs.")
]
_AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on although models or sampling are not those of the beginning.")
]
_RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try the lines of failed.jsonl again.")]


@app.command()
@with_settings
def batch(
    settings: Settings,
    source: _Input,
    out: _RunOut,
    best_of: Annotated[int | None, typer.Option(min=1, help="Candidates for a line that does not say.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a candidate, likewise.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="Temperature, likewise.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus, likewise.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The run's seed, from which every line gets its own.")] = 0,
    in_flight: _InFlight = None,
    accept_changes: _AcceptChanges = False,
    retry_failed: _RetryFailed = False,
) -> None:
    """Answer every line of a file with the best of N.

    Writes results.jsonl, failed.jsonl and a summary to OUT. Stopped or killed at any moment, the same command goes on.
    docs/offline.md tells what a line may hold. Settings of the HTTP server have no effect here.
    """
    given = {"best_of": best_of, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    defaults = {name: value for name, value in given.items() if value is not None}
    most = max(settings.max_best_of, best_of or 1)
    _offline(
        "batch",
        settings.model_copy(update={"max_best_of": most, "default_stopping": None}),
        source=source,
        out=out,
        seed=seed,
        defaults=defaults,
        in_flight=in_flight,
        accept_changes=accept_changes,
        retry_failed=retry_failed,
    )


@app.command()
@with_settings
def rerank(
    settings: Settings,
    source: _Input,
    out: _RunOut,
    in_flight: _InFlight = None,
    accept_changes: _AcceptChanges = False,
    retry_failed: _RetryFailed = False,
) -> None:
    """Score the candidates that every line of a file brings, and choose among them.

    A results.jsonl is such a file too. Only the reward models are loaded; settings of the policy have no effect here.
    """
    _offline(
        "rerank",
        settings,
        source=source,
        out=out,
        in_flight=in_flight,
        accept_changes=accept_changes,
        retry_failed=retry_failed,
    )


def _offline(command: str, settings: Settings, **options: Any) -> None:
    from server.doctor import require_models
    from server.errors import NbestError
    from server.launch import StartError, kill_children
    from server.offline import batch as offline
    from server.offline.errors import OfflineError

    if command == "batch":
        require_models(settings)
    run = {"batch": offline.batch, "rerank": offline.rerank}[command]
    try:
        run(settings, offline.BatchOptions(**options), console)
    except OfflineError as error:
        raise CommandError(f"{error}.") from error
    except (NbestError, StartError) as error:  # of a model that is loaded
        raise CommandError(str(error)) from error
    except offline.RunInterruptedError as error:
        console.print(str(error), style="yellow")
        raise typer.Exit(128 + error.number) from error
    finally:
        kill_children()


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of nbest batch or nbest rerank.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; FILE.card.md tells where its rows come from.")],
    form_of_rows: Annotated[
        Literal["sft", "preference", "raw"],
        typer.Option("--format", help="sft: the winners; preference: pairs; raw: every candidate."),
    ],
    pairs: Annotated[
        Literal["best-worst", "best-random", "all"], typer.Option(help="Which candidates make pairs.")
    ] = "best-worst",
    form: Annotated[
        Literal["as-asked", "conversational", "plain"],
        typer.Option(help="Messages, text, or each prompt as it was asked."),
    ] = "as-asked",
    min_reward: Annotated[
        float | None, typer.Option(help="Least reward of a completion, or of the chosen one.")
    ] = None,
    min_margin: Annotated[float | None, typer.Option(min=0.0, help="Least difference of a pair's rewards.")] = None,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep rows of the same texts.")] = False,
    balance_length: Annotated[
        bool, typer.Option("--balance-length", help="As many pairs with the longer text chosen as with the shorter.")
    ] = False,
    top_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the rows to keep, of the highest reward.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the random one of best-random.")] = 0,
) -> None:
    """Make training data of the results: files that TRL's trainers load."""
    from server.offline.errors import OfflineError
    from server.offline.export import ExportOptions, run_export
    from server.offline.filters import Filters

    filters = Filters(min_reward, min_margin, keep_duplicates, balance_length, top_fraction)
    try:
        counts = run_export(directory, out, ExportOptions(form_of_rows, pairs, form, filters, seed))
    except OfflineError as error:
        raise CommandError(f"{error}.") from error
    console.print(f"{counts['written']:,} of {counts['rows']:,} rows in {out}.")


@app.command()
def calibrate(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Output of nbest batch with --best-of 16 or more, on prompts of yours."),
    ],
    quality: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share to be had of what best of all rises above a single sample."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1.0, help="Most tokens generated for a request, on average.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Most seconds of a full engine for a request, on average.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Settings file to write; default: DIR/settings.toml.")] = None,
) -> None:
    """Recommend how many candidates to draw, and when to stop, for a target.

    Give one of --quality, --tokens and --seconds. What best-of-n and adaptive stopping would have made of the run's
    candidates is told in DIR/calibration.json and calibration.png, and the best that reaches the target is written as
    settings: nbest serve --config DIR/settings.toml.
    """
    from server.offline.calibrate_command import Goal, calibrate_run
    from server.offline.errors import OfflineError

    try:
        calibrate_run(directory, Goal(quality, tokens, seconds), out or directory / "settings.toml", Console())
    except OfflineError as error:
        raise CommandError(f"{error}.") from error


@app.command()
def improve(
    prompts: Annotated[str, typer.Option(help="Training prompts: lines of prompt or messages, as nbest batch reads.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; one that stopped goes on there.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of sampling and fine-tuning.")] = 2,
    held_out: Annotated[str | None, typer.Option(help="Prompts to measure on; default: a share of the others.")] = None,
    holdout: Annotated[float, typer.Option(min=0.0, max=0.9, help="That share, chosen by hash of the prompt.")] = 0.2,
    model: Annotated[str, typer.Option(help="Policy: prepared name, directory or hub id.")] = "smollm2-135m-instruct",
    reward_model: Annotated[str, typer.Option(metavar="NAME=SPEC", help="What chooses and measures.")] = (
        "movie-sentiment=movie-sentiment"
    ),
    best_of: Annotated[int, typer.Option(min=1, help="Candidates of a training prompt.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a candidate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Temperature of sampling.")] = 1.0,
    top_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the winners to keep, of the highest reward.")
    ] = None,
    evaluation_samples: Annotated[int, typer.Option(min=1, help="Samples of a held-out prompt.")] = 4,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the winners of a round.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Winners a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate of a round.")] = 2e-4,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn, and the order of training.")] = 0,
) -> None:
    """Teach a policy what best-of-n chooses: sample N, keep the winners, fine-tune, measure, repeat.

    Every round's samples, winners, weights and measurements stay in OUT/round-K. Stopped or killed at any moment, the
    same command goes on; more --rounds go on from the last. Settings of the engine come from NBEST_ variables.
    """
    from training.checkpoints import CheckpointError
    from training.data.data_source import DataSourceError
    from training.data.preferences import DataError
    from training.errors import TrainingError
    from training.policy.rejection_sampling import Improvement, table_lines
    from training.policy.rejection_sampling import improve as run

    settings = Improvement(
        model=model,
        reward_model=reward_model,
        best_of=best_of,
        max_tokens=max_tokens,
        temperature=temperature,
        top_fraction=top_fraction,
        evaluation_samples=evaluation_samples,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        seed=seed,
    )
    try:
        table = run(prompts, out, settings, rounds, held_out=held_out, holdout=holdout)
    except (CheckpointError, DataError, DataSourceError, TrainingError, OSError) as error:
        raise CommandError(str(error)) from error
    typer.echo("\n".join(table_lines(table)))


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
