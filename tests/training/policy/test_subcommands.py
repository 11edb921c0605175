from pathlib import Path

import pytest

from training.errors import TrainingError
from training.policy.subcommands import locked_commands


def test_a_failed_command_is_named_with_its_arguments(tmp_path: Path) -> None:
    with locked_commands(tmp_path / "out") as run:
        run(["version"])
        with pytest.raises(TrainingError, match=r"nbest export nowhere .* ended with exit code 1; finished"):
            run(["export", "nowhere", "--format", "sft", "--out", str(tmp_path / "x.jsonl")])


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        locked_commands(tmp_path),
        pytest.raises(TrainingError, match="another run is using"),
        locked_commands(tmp_path),
    ):
        pass
    with locked_commands(tmp_path) as run:
        run(["version"])
