"""The options of `nbest train` that commands share."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from training.cli import DPOOptions, SFTOptions
from training.cli_options import DtypeOption, settings_of, takes
from training.policy.dpo import DPOTraining
from training.policy.finetune import PolicyTraining, RunOptions
from training.rl.cli import PPOOptions, ReinforceOptions
from training.rl.config import PPOTraining, ReinforceTraining


@pytest.mark.parametrize(
    ("options", "settings", "others"),
    [
        (SFTOptions, PolicyTraining, {"data"}),
        (DPOOptions, DPOTraining, {"data"}),
        (PPOOptions, PPOTraining, {"prompts", "ray", "ray_address"}),
        (ReinforceOptions, ReinforceTraining, {"prompts", "ray", "ray_address"}),
    ],
)
def test_every_option_is_a_setting_or_says_where_things_are(options: Any, settings: Any, others: set[str]) -> None:
    """They are handed on by name, so one that is called otherwise would be lost."""
    named = {one.name for one in (*fields(settings), *fields(RunOptions))}
    assert {one.name for one in fields(options)} - named == {"validation", "holdout", "out", "model", *others}


@dataclass(frozen=True, kw_only=True)
class _First:
    out: Annotated[Path, typer.Option(help="Where to.")]
    rank: Annotated[int, typer.Option(min=1, help="How much.")] = 3


@dataclass(frozen=True, kw_only=True)
class _Last:
    dtype: Annotated[DtypeOption, typer.Option(help="In what.")] = DtypeOption.AUTO


@dataclass(frozen=True, kw_only=True)
class _Both(_Last, _First):
    pass


@dataclass(frozen=True)
class _Settings:
    base_model: str
    rank: int = 8
    dtype: str = ""
    epochs: int = 5


def test_a_command_takes_the_fields_of_a_dataclass_and_hands_them_on_as_settings() -> None:
    given: list[_Both] = []
    app = typer.Typer()

    @app.command()
    @takes(_Both)
    def command(options: _Both) -> None:
        """What it does."""
        given.append(options)

    told = CliRunner().invoke(app, ["--help"]).output
    assert "What it does." in told
    assert told.index("--out") < told.index("--rank") < told.index("--dtype")
    assert CliRunner().invoke(app, ["--out", "a", "--dtype", "float32"]).exit_code == 0
    assert given == [_Both(out=Path("a"), rank=3, dtype=DtypeOption.FLOAT32)]
    settings = settings_of(_Settings, given[0], base_model="b")
    assert settings == _Settings("b", 3, "float32", 5)
    assert type(settings.dtype) is str


def test_a_bad_option_is_refused_as_any_other() -> None:
    app = typer.Typer()
    app.command()(takes(_Both)(lambda options: None))
    assert CliRunner().invoke(app, ["--out", "a", "--rank", "0"]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2
