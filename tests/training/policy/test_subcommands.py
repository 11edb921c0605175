from pathlib import Path

import pytest

from training.errors import TrainingError
from training.policy.subcommands import commands_in


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with commands_in(tmp_path / "out") as run:
        run(["version"])
        with pytest.raises(TrainingError, match=r"nbest export nowhere .* ended with 1; what is done is kept"):
            run(["export", "nowhere", "--format", "sft", "--out", str(tmp_path / "x.jsonl")])


def test_a_second_run_on_a_directory_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with commands_in(tmp_path), pytest.raises(TrainingError, match="a run works in"), commands_in(tmp_path):
        pass
    with commands_in(tmp_path) as run:
        run(["version"])
