"""`nbest batch`, `rerank`, `export` and `calibrate`; the main command imports this module when it calls one of them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from server.cli_options import CommandError, console, with_settings
from server.config import Settings
from server.offline.errors import OfflineError

app = typer.Typer(rich_markup_mode=None)

_Input = Annotated[
    str, typer.Argument(metavar="IN", help="JSON lines, a Parquet table, an OpenAI batch file; - is stdin.")
]
_RunOut = Annotated[Path, typer.Option("--out", help="Directory for the results; an interrupted run continues there.")]
_InFlight = Annotated[
    int | None, typer.Option(min=1, help="Candidates that run at once; default: 1.5 times --max-num-seqs.")
]
_AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Continue although the models or the sampling have changed.")
]
_RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try the lines of failed.jsonl again.")]


@app.command()
@with_settings
def batch(
    settings: Settings,
    source: _Input,
    out: _RunOut,
    best_of: Annotated[int | None, typer.Option(min=1, help="Candidates, where a line has no best_of.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a candidate, where the line has none.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="Temperature, as above.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="top_p, as above.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run; each line derives its own.")] = 0,
    in_flight: _InFlight = None,
    accept_changes: _AcceptChanges = False,
    retry_failed: _RetryFailed = False,
) -> None:
    """Answer every line of a file with the best of N.

    Writes results.jsonl, failed.jsonl and a summary to OUT. After an interruption, even a kill, the same command
    continues the run. docs/offline.md lists what a line may hold. Settings of the HTTP server have no effect here.
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
    """Score and rank the candidates that each line of a file brings.

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

    if command == "batch":
        require_models(settings)
    run = {"batch": offline.batch, "rerank": offline.rerank}[command]
    try:
        run(settings, offline.BatchOptions(**options), console)
    except OfflineError as error:
        raise CommandError(f"{error}.") from error
    except (NbestError, StartError) as error:
        raise CommandError(str(error)) from error
    except offline.RunInterruptedError as error:
        console.print(str(error), style="yellow")
        raise typer.Exit(128 + error.signal_number) from error
    finally:
        kill_children()


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of nbest batch or nbest rerank.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; FILE.card.md describes its source.")],
    form_of_rows: Annotated[
        Literal["sft", "preference", "raw"],
        typer.Option("--format", help="sft: the winners; preference: pairs; raw: every candidate."),
    ],
    pairs: Annotated[
        Literal["best-worst", "best-random", "all"], typer.Option(help="Which candidates make pairs.")
    ] = "best-worst",
    form: Annotated[
        Literal["as-asked", "conversational", "plain"],
        typer.Option(help="Messages, text, or each prompt as it was sent."),
    ] = "as-asked",
    min_reward: Annotated[
        float | None, typer.Option(help="Least reward of a completion, or of the chosen completion.")
    ] = None,
    min_margin: Annotated[float | None, typer.Option(min=0.0, help="Least difference of a pair's rewards.")] = None,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep rows of the same texts.")] = False,
    balance_length: Annotated[
        bool,
        typer.Option(
            "--balance-length",
            help="Make the longer text as often the chosen as the rejected one.",
        ),
    ] = False,
    top_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the rows to keep, of the highest reward.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random candidate of best-random.")] = 0,
) -> None:
    """Make training data of the results: files that TRL's trainers load."""
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
        typer.Argument(metavar="DIR", help="Output of nbest batch with --best-of 16 or more, on your prompts."),
    ],
    quality: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the gain of best of all over a single sample that must be kept."),
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

    Give one of --quality, --tokens and --seconds. DIR/calibration.json and calibration.png hold what best-of-n and
    adaptive stopping would have made of the run's candidates; the best setting that reaches the target is written as
    a settings file: nbest serve --config DIR/settings.toml.
    """
    from server.offline.calibrate_command import calibrate_run

    path = out or directory / "settings.toml"
    try:
        calibrate_run(directory, path, Console(), quality=quality, tokens=tokens, seconds=seconds)
    except OfflineError as error:
        raise CommandError(f"{error}.") from error
