"""`nbest calibrate`: its recommendation on pools whose best setting is known, its files, and its errors."""

import json
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from reranker.stopping_replay import Pool
from server.app import create_app
from server.cli import app
from server.cli_options import CommandError
from server.config import ConfigError, Settings, load_settings
from server.observability.metrics import Metrics
from server.offline.calibration import Target, calibrate, pools_of
from server.offline.errors import OfflineError
from server.offline.records import Result
from server.schemas.requests import CompletionRequest
from tests.server.offline.test_export import result

EQUAL_POOLS = [Pool([0.0, 1.0, 2.0, 3.0], [10, 10, 10, 10])] * 8
"""The expected best of n of the rewards 0, 1, 2, 3 is 1.5, 2.3333, 2.75 and 3."""


@pytest.mark.parametrize(
    ("target", "best_of"),
    [
        (Target(quality=0.0), 1),
        (Target(quality=0.55), 2),  # 2.3333 is 0.5556 of the way from 1.5 to 3
        (Target(quality=0.56), 3),
        (Target(quality=1.0), 4),
        (Target(tokens=29.0), 2),
        (Target(tokens=30.0), 3),
    ],
)
def test_the_cheapest_setting_that_reaches_the_target_is_recommended(target: Target, best_of: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.offline.calibration.PRICES_IN_SD", ())
        calibration = calibrate(EQUAL_POOLS, target)
    assert calibration["recommended"]["server"] == {"default_best_of": best_of}
    assert calibration["recommended"]["tokens"]["mean"] == 10 * best_of
    means = [setting["reward"]["mean"] for setting in calibration["plain"]]
    assert means == pytest.approx([1.5, 7 / 3, 2.75, 3.0])


def normal_pools(prompts: int, size: int) -> list[Pool]:
    """Normal rewards, as the prior assumes; only their mean differs from prompt to prompt."""
    random = Random(0)
    means = [random.gauss(0, 1) for _ in range(prompts)]
    return [Pool([random.gauss(mean, 1.0) for _ in range(size)], [20] * size) for mean in means]


def test_adaptive_stopping_is_recommended_if_it_is_cheaper_and_it_reaches_the_target() -> None:
    calibration = calibrate(normal_pools(60, 24), Target(quality=0.9))
    best, plain = calibration["recommended"], calibration["plain"]
    policy = json.loads(best["server"]["default_stopping"])
    assert policy["policy"] == "adaptive"
    first, last = (plain[index]["reward"]["mean"] for index in (0, -1))
    assert best["reward"]["mean"] > first + 0.8 * (last - first)
    sufficient = next(setting for setting in plain if setting["reward"]["mean"] >= first + 0.9 * (last - first))
    assert best["tokens"]["mean"] < sufficient["tokens"]


def test_a_budget_below_one_candidate_is_refused() -> None:
    with pytest.raises(OfflineError, match="One candidate already takes 10 tokens, more than 3; allow more"):
        calibrate(EQUAL_POOLS, Target(tokens=3.0))


def lines(*pools: list[float | None]) -> list[Result]:
    return [Result.model_validate(result(line, pool)) for line, pool in enumerate(pools, start=1)]


def test_incomplete_pools_are_left_out() -> None:
    complete: list[list[float | None]] = [[1.0, 2.0]] * 8
    assert len(pools_of(lines(*complete, [1.0], [1.0, None]))) == 8
    with pytest.raises(OfflineError, match="7 prompts have all 2 candidates with a reward, and at least 8 are needed"):
        pools_of(lines(*complete[:7], [3.0]))
    with pytest.raises(OfflineError, match="A pool of one candidate cannot be calibrated"):
        pools_of(lines([1.0], [2.0]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pools = [[float(value) for value in pool.rewards_N] for pool in normal_pools(12, 8)]
    (tmp_path / "run.json").write_text('{"runs": [{}]}')
    records = [json.dumps(result(line, list(pool))) for line, pool in enumerate(pools, start=1)]
    (tmp_path / "results.jsonl").write_text("".join(f"{record}\n" for record in records))
    (tmp_path / "summary.json").write_text('{"this_run": {"generated_tokens": 600, "seconds": 60.0}}')
    return tmp_path


def calibrate_output(run: Path, *flags: str) -> str:
    """What `nbest calibrate` prints."""
    invocation = CliRunner().invoke(app, ["calibrate", str(run), *flags], catch_exceptions=False)
    assert invocation.exit_code == 0
    return invocation.output


def test_the_command_writes_settings_that_a_server_reads(run: Path) -> None:
    output = calibrate_output(run, "--quality", "0.9")
    assert "best of 8" in output
    assert "--quality 0.9: " in output
    assert f"nbest serve --config {run / 'settings.toml'}" in output
    assert (run / "calibration.png").stat().st_size > 0
    written = tomllib.loads((run / "settings.toml").read_text())
    assert written == json.loads((run / "calibration.json").read_text())["recommended"]["server"]
    assert load_settings({}, run / "settings.toml").default_best_of == written["default_best_of"]


def test_seconds_become_tokens_at_the_speed_of_the_run(run: Path) -> None:
    """A candidate is one token, and the run generated ten tokens per second."""
    output = calibrate_output(run, "--seconds", "0.3")
    calibration = json.loads((run / "calibration.json").read_text())
    assert calibration["target"] == {"tokens": 3.0}
    assert calibration["recommended"]["tokens"]["mean"] <= 3.3
    assert "--seconds 0.3: " in output
    assert (run / "settings.toml").read_text().startswith("# nbest calibrate --seconds 0.3: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give one of --quality, --tokens and --seconds"),
        (["--quality", "0.9", "--tokens", "5"], "Give one of"),
        (["--seconds", "1"], "does not say how fast the run was; give --tokens instead"),
    ],
)
def test_a_target_that_is_missing_ambiguous_or_unmeasurable_is_refused(
    flags: list[str], message: str, run: Path
) -> None:
    (run / "summary.json").unlink()
    with pytest.raises(CommandError, match=message):
        CliRunner().invoke(app, ["calibrate", str(run), *flags], catch_exceptions=False)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is not the output of nbest batch"):
        CliRunner().invoke(app, ["calibrate", str(tmp_path), "--quality", "1"], catch_exceptions=False)


DEFAULT = '{"policy": "adaptive", "price": 0.1}'


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "adaptive"),
        ({"nbest": {"return_candidates": True}}, "adaptive"),
        ({"best_of": 4}, None),
        ({"nbest": {"stopping": {"policy": "none"}}}, None),
        ({"nbest": {"strategy": "majority"}}, None),
        ({"nbest": {"reward_model": "other"}}, None),
    ],
)
def test_the_default_policy_applies_to_requests_that_set_none_of_its_fields(fields: Any, policy: str | None) -> None:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "x"} | fields)
    assert request.to_request(Settings(default_stopping=DEFAULT)).stopping.policy == policy


@pytest.mark.parametrize(
    ("default", "message"),
    [("adaptive", "not valid JSON"), ('{"policy": "adaptive", "checkpoints": [4]}', "checkpoints is used by")],
)
def test_an_invalid_default_policy_is_refused_before_anything_is_loaded(default: str, message: str) -> None:
    def start() -> Any:
        raise AssertionError("nothing is started")

    with pytest.raises(ConfigError, match=f"default_stopping cannot be used.*{message}"):
        create_app(start, Settings(default_stopping=default), Metrics())
