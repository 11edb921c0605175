"""Options made from settings: which settings are options, and that the identity of a run stays the same."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from training.cli_options import option_fields, settings_as_options
from training.policy.config import DPOTraining, RejectionSamplingTraining, RunOptions, SFTTraining
from training.reward.config import RewardTraining
from training.rl.config import PPOTraining, ReinforceTraining, RLRunOptions

FINE_TUNING = {
    "base_model": "smollm2-135m-instruct",
    "full": False,
    "lora_rank": 16,
    "epochs": 1.0,
    "batch_size": 16,
    "micro_batch_size": None,
    "learning_rate": 2e-4,
    "warmup_fraction": 0.05,
    "max_length": None,
    "dtype": "auto",
    "gradient_checkpointing": False,
    "seed": 0,
}
RL = {
    "base_model": "smollm2-135m-instruct",
    "full": False,
    "lora_rank": 16,
    "reward_model": "movie-sentiment=movie-sentiment",
    "steps": 100,
    "batch_size": 64,
    "samples_per_prompt": 4,
    "micro_batch_size": None,
    "max_tokens": 64,
    "temperature": 1.0,
    "learning_rate": 1e-4,
    "warmup_fraction": 0.05,
    "kl_coef": 0.05,
    "kl_target": None,
    "kl_horizon": 10_000,
    "truncation_penalty": 0.0,
    "reward_normalization": None,
    "overlap": False,
    "largest_importance": 2.0,
    "sync_tolerance": None,
    "evaluate_every": 10,
    "judge": None,
    "max_length": None,
    "dtype": "auto",
    "gradient_checkpointing": False,
    "seed": 0,
}
PPO = {"epochs": 4, "minibatches": 4, "clip": 0.2, "value_clip": 0.2, "gae_lambda": 0.95, "value_learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("settings", "identity"),
    [
        (SFTTraining(), FINE_TUNING),
        (DPOTraining(), FINE_TUNING | {"learning_rate": 5e-5, "beta": 0.1}),
        (PPOTraining(), RL | PPO),
        (ReinforceTraining(), RL | {"baseline": "rloo"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_runs_that_were_started_before_still_have_the_same_identity(settings: Any, identity: dict[str, Any]) -> None:
    """A checkpoint resumes only under equal fields and values in run.json, so neither may change by accident."""
    assert asdict(settings) == identity


@pytest.mark.parametrize(
    ("settings_type", "from_python_only"),
    [
        (SFTTraining, {"warmup_fraction"}),
        (DPOTraining, {"warmup_fraction"}),
        (
            PPOTraining,
            {"warmup_fraction", "largest_importance", "clip", "value_clip", "gae_lambda", "value_learning_rate"},
        ),
        (ReinforceTraining, {"warmup_fraction", "largest_importance"}),
        (RewardTraining, {"warmup_fraction"}),
        (RejectionSamplingTraining, set()),
        (RunOptions, {"progress"}),
        (RLRunOptions, {"progress"}),
    ],
)
def test_every_setting_is_an_option_but_these(settings_type: Any, from_python_only: set[str]) -> None:
    options = {field.name for field in option_fields(settings_type)}
    assert {field.name for field in fields(settings_type)} - options == from_python_only


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (SFTTraining(full=True), 1e-5),
        (DPOTraining(full=True), 5e-7),
        (PPOTraining(full=True), 1e-6),
        (RewardTraining(), 3e-4),
        (RewardTraining(method="full"), 1e-5),
        (SFTTraining(full=True, learning_rate=0.0), 0.0),
    ],
)
def test_without_a_learning_rate_the_default_is_that_of_the_method(settings: Any, rate: float) -> None:
    assert settings.learning_rate == rate


@dataclass(frozen=True, kw_only=True)
class _Base:
    rank: Annotated[int, typer.Option("--rank", min=1, help="How much.")] = 3
    hidden: int = 7


@dataclass(frozen=True, kw_only=True)
class _Settings(_Base):
    base_model: Annotated[str, typer.Option("--model", help="Of what.")] = "small"


Out = Annotated[Path, typer.Option(help="Where to.")]


def test_a_command_takes_the_fields_of_its_settings_as_options() -> None:
    received: list[tuple[Path, _Settings, bool]] = []
    app = typer.Typer()

    @app.command()
    @settings_as_options
    def command(out: Out, settings: _Settings, last: bool = False) -> None:
        """What it does."""
        received.append((out, settings, last))

    help_text = CliRunner().invoke(app, ["--help"]).output
    assert "What it does." in help_text
    assert help_text.index("--out") < help_text.index("--rank") < help_text.index("--model") < help_text.index("--last")
    assert "hidden" not in help_text
    assert CliRunner().invoke(app, ["--out", "a", "--model", "large"]).exit_code == 0
    assert received == [(Path("a"), _Settings(rank=3, base_model="large", hidden=7), False)]


def test_a_wrong_value_of_a_setting_is_a_usage_error() -> None:
    app = typer.Typer()

    @app.command()
    @settings_as_options
    def command(out: Out, settings: _Settings) -> None:
        pytest.fail(f"ran with {settings}")

    assert CliRunner().invoke(app, ["--out", "a", "--rank", "0"]).exit_code == 2
    assert CliRunner().invoke(app, []).exit_code == 2
