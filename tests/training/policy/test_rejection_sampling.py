"""`nbest improve`: rounds over a tiny policy that is really trained, with a scripted engine in place of vLLM."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.support.offline_runs import SeededGenerator, scripted
from tests.support.tiny_models import save_tiny_policy
from training.checkpoints import CheckpointError
from training.data.preferences import DataError
from training.errors import TrainingError
from training.policy.config import RejectionSamplingTraining
from training.policy.rejection_sampling import improve, table_lines
from training.policy.subcommands import Command, locked_commands

pytestmark = pytest.mark.slow

RESULTS = (
    "prompts/train.jsonl",
    "round-0/evaluation/summary.json",
    "round-1/winners.jsonl",
    "round-1/sft/model/model.safetensors",
    "round-1/evaluation/summary.json",
)


class PowerCutError(Exception):
    """Stands for anything that kills a run."""


def in_process(arguments: Sequence[str]) -> None:
    """Runs the nbest command in this process, with the scripted engine."""
    with scripted(SeededGenerator()):
        result = CliRunner().invoke(app, list(arguments))
    if result.exit_code:
        raise TrainingError(f"{result.output}{result.exception!r}")


def cut_at(step: int) -> Command:
    """Runs commands until the command with that number, counted from 0, is about to start."""
    numbers = count()

    def run(arguments: Sequence[str]) -> None:
        if next(numbers) == step:
            raise PowerCutError
        in_process(arguments)

    return run


@pytest.fixture
def settings(tmp_path: Path) -> RejectionSamplingTraining:
    base = save_tiny_policy(tmp_path / "base")
    return RejectionSamplingTraining(
        str(base), "length=logprob", best_of=3, max_tokens=8, evaluation_samples=2, batch_size=4, epochs=1
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"film {number % 10}"}) + "\n" for number in range(12)))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_samples_from_the_policy_of_the_round_before_and_learns_its_winners(
    prompts: Path, settings: RejectionSamplingTraining, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    table = improve(prompts, out, settings, 2, command=in_process)
    runs = {
        (number, step): json.loads((out / f"round-{number}" / step / "run.json").read_text())["runs"][-1]
        for number, step in [(0, "evaluation"), (1, "samples"), (1, "evaluation"), (2, "samples"), (2, "evaluation")]
    }
    first, second = (str(out / f"round-{number}" / "sft" / "model") for number in (1, 2))
    models = [run["model"] for run in runs.values()]
    assert models == [settings.model, settings.model, first, first, second]
    assert runs[1, "samples"]["seed"] != runs[2, "samples"]["seed"]
    assert runs[0, "evaluation"]["seed"] == runs[2, "evaluation"]["seed"]
    trained = lines(out / "round-1" / "winners.jsonl")
    held_out = {line["prompt"] for line in lines(out / "prompts" / "held-out.jsonl")}
    assert {line["prompt"] for line in trained} == {f"film {n}" for n in range(10)} - held_out
    assert [row["round"] for row in table] == [0, 1, 2]
    assert table[1]["demonstrations"] == len(trained)
    assert json.loads((out / "summary.json").read_text()) == table
    shown = table_lines(table)
    assert len(shown) == 4
    assert f"{table[0]['held_out_reward']['mean']:.2f}" in shown[1]


def test_a_run_that_is_killed_between_any_two_steps_resumes_to_the_same_results(
    prompts: Path, settings: RejectionSamplingTraining, tmp_path: Path
) -> None:
    def results(out: Path, command: Command) -> list[bytes]:
        improve(prompts, out, settings, 1, command=command)
        return [(out / name).read_bytes() for name in RESULTS if "summary" not in name]

    whole = results(tmp_path / "whole", in_process)
    for step in range(1, 5):  # evaluation, samples, winners, training, evaluation
        out = tmp_path / f"cut-{step}"
        with pytest.raises(PowerCutError):
            improve(prompts, out, settings, 1, command=cut_at(step))
        assert results(out, in_process) == whole


def test_a_finished_step_is_not_repeated_and_more_rounds_continue_the_run(
    prompts: Path, settings: RejectionSamplingTraining, tmp_path: Path
) -> None:
    commands: list[Sequence[str]] = []

    def counted(arguments: Sequence[str]) -> None:
        commands.append(arguments)
        in_process(arguments)

    improve(prompts, tmp_path / "out", settings, 1, command=counted)
    finished = len(commands)
    improve(prompts, tmp_path / "out", settings, 1, command=counted)
    assert len(commands) == finished
    improve(prompts, tmp_path / "out", settings, 2, command=counted)
    assert all("round-2" in " ".join(arguments) for arguments in commands[finished:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best_of": 4, "batch_size": 16}, "another batch_size, best_of"),
        ({"reward_model": "other=logprob"}, "another reward_model"),
    ],
)
def test_a_directory_of_another_run_is_refused(
    change: dict[str, Any], message: str, prompts: Path, settings: RejectionSamplingTraining, tmp_path: Path
) -> None:
    def stop(_: Sequence[str]) -> None:
        raise PowerCutError

    with pytest.raises(PowerCutError):
        improve(prompts, tmp_path / "out", settings, 1, command=stop)
    with pytest.raises(CheckpointError, match=message):
        improve(prompts, tmp_path / "out", replace(settings, **change), 1, command=stop)


def test_a_second_run_in_a_directory_is_refused(
    prompts: Path, settings: RejectionSamplingTraining, tmp_path: Path
) -> None:
    with locked_commands(tmp_path / "out"), pytest.raises(TrainingError, match="another run is using"):
        improve(prompts, tmp_path / "out", settings, 1, command=in_process)


def test_equal_prompts_stay_in_one_part_of_the_split(
    tmp_path: Path, prompts: Path, settings: RejectionSamplingTraining
) -> None:
    with pytest.raises(PowerCutError):
        improve(prompts, tmp_path / "out", settings, 1, holdout=0.5, command=cut_at(0))
    train, held_out = (
        [line["prompt"] for line in lines(tmp_path / "out" / "prompts" / name)]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 12


def test_bad_prompts_are_reported_with_their_lines_before_anything_runs(
    tmp_path: Path, settings: RejectionSamplingTraining
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n{\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: a line has a prompt or messages\n.*bad\.jsonl:3: "):
        improve(bad, tmp_path / "out", settings, 1, command=in_process)
    single = tmp_path / "single.jsonl"
    single.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="no prompt is left for"):
        improve(single, tmp_path / "out", settings, 1, command=in_process)
