"""`nbest improve`: its rounds over a tiny policy that is really trained, and a scripted engine in place of vLLM."""

import json
from collections.abc import Callable, Sequence
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
from training.policy.rejection_sampling import Improvement, improve, table_lines
from training.policy.subcommands import Command, commands_in

RESULTS = (
    "prompts/train.jsonl",
    "round-0/evaluation/summary.json",
    "round-1/winners.jsonl",
    "round-1/sft/model/model.safetensors",
    "round-1/evaluation/summary.json",
)


class PowerCutError(Exception):
    """Stands for whatever ends a run."""


def in_process(arguments: Sequence[str]) -> None:
    """The command of these arguments in this process, with the scripted engine."""
    with scripted(SeededGenerator()):
        result = CliRunner().invoke(app, list(arguments))
    if result.exit_code:
        raise TrainingError(f"{result.output}{result.exception!r}")


def cut_at(step: int) -> Command:
    """A command that works until the one of that number is to begin."""
    numbers = count()

    def run(arguments: Sequence[str]) -> None:
        if next(numbers) == step:
            raise PowerCutError
        in_process(arguments)

    return run


@pytest.fixture
def settings(tmp_path: Path) -> Improvement:
    base = save_tiny_policy(tmp_path / "base")
    return Improvement(
        str(base), "length=logprob", best_of=3, max_tokens=8, evaluation_samples=2, batch_size=4, epochs=1
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"film {number % 10}"}) + "\n" for number in range(12)))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_round_samples_from_the_policy_of_the_one_before_and_learns_its_winners(
    prompts: Path, settings: Improvement, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    table = improve(prompts, out, settings, 2, command=in_process)
    drawn_by = {
        (number, what): json.loads((out / f"round-{number}" / what / "run.json").read_text())["runs"][-1]
        for number, what in [(0, "evaluation"), (1, "samples"), (1, "evaluation"), (2, "samples"), (2, "evaluation")]
    }
    first, second = (str(out / f"round-{number}" / "sft" / "model") for number in (1, 2))
    models = [run["model"] for run in drawn_by.values()]
    assert models == [settings.model, settings.model, first, first, second]
    assert drawn_by[1, "samples"]["seed"] != drawn_by[2, "samples"]["seed"]
    assert drawn_by[0, "evaluation"]["seed"] == drawn_by[2, "evaluation"]["seed"]
    trained = lines(out / "round-1" / "winners.jsonl")
    held_out = {line["prompt"] for line in lines(out / "prompts" / "held-out.jsonl")}
    assert {line["prompt"] for line in trained} == {f"film {n}" for n in range(10)} - held_out
    assert [row["round"] for row in table] == [0, 1, 2]
    assert table[1]["demonstrations"] == len(trained)
    assert json.loads((out / "summary.json").read_text()) == table
    shown = table_lines(table)
    assert len(shown) == 4
    assert f"{table[0]['held_out_reward']['mean']:.2f}" in shown[1]


def test_a_run_killed_between_any_two_steps_goes_on_to_the_same_end(
    prompts: Path, settings: Improvement, tmp_path: Path
) -> None:
    def ends(out: Path, command: Command) -> list[bytes]:
        improve(prompts, out, settings, 1, command=command)
        return [(out / name).read_bytes() for name in RESULTS if "summary" not in name]

    whole = ends(tmp_path / "whole", in_process)
    for step in range(1, 5):  # an evaluation, samples, winners, training, an evaluation
        out = tmp_path / f"cut-{step}"
        with pytest.raises(PowerCutError):
            improve(prompts, out, settings, 1, command=cut_at(step))
        assert ends(out, in_process) == whole


def test_what_is_done_is_not_done_again_and_more_rounds_go_on(
    prompts: Path, settings: Improvement, tmp_path: Path
) -> None:
    called: list[Sequence[str]] = []

    def counted(arguments: Sequence[str]) -> None:
        called.append(arguments)
        in_process(arguments)

    improve(prompts, tmp_path / "out", settings, 1, command=counted)
    done = len(called)
    improve(prompts, tmp_path / "out", settings, 1, command=counted)
    assert len(called) == done
    improve(prompts, tmp_path / "out", settings, 2, command=counted)
    assert all("round-2" in " ".join(arguments) for arguments in called[done:])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda one: Improvement(one.model, one.reward_model, best_of=4), "another batch_size, best_of"),
        (lambda one: Improvement(one.model, "other=logprob"), "reward_model"),
    ],
)
def test_a_directory_of_another_run_is_refused(
    change: Callable[[Improvement], Improvement], told: str, prompts: Path, settings: Improvement, tmp_path: Path
) -> None:
    def stop(_: Sequence[str]) -> None:
        raise PowerCutError

    with pytest.raises(PowerCutError):
        improve(prompts, tmp_path / "out", settings, 1, command=stop)
    with pytest.raises(CheckpointError, match=told):
        improve(prompts, tmp_path / "out", change(settings), 1, command=stop)


def test_a_second_run_on_a_directory_is_refused(prompts: Path, settings: Improvement, tmp_path: Path) -> None:
    with commands_in(tmp_path / "out"), pytest.raises(TrainingError, match="a run works in"):
        improve(prompts, tmp_path / "out", settings, 1, command=in_process)


def test_equal_prompts_stay_on_one_side(tmp_path: Path, prompts: Path, settings: Improvement) -> None:
    with pytest.raises(PowerCutError):
        improve(prompts, tmp_path / "out", settings, 1, holdout=0.5, command=cut_at(0))
    train, held_out = (
        [line["prompt"] for line in lines(tmp_path / "out" / "prompts" / name)]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 12


def test_bad_prompts_are_told_with_their_numbers_before_anything_runs(tmp_path: Path, settings: Improvement) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n{\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: a line has a prompt or messages\n.*bad\.jsonl:3: "):
        improve(bad, tmp_path / "out", settings, 1, command=in_process)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="no prompt is left for"):
        improve(one, tmp_path / "out", settings, 1, command=in_process)
