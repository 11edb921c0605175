"""The evaluations of a run: when they happen, what they write, how they resume, and the alarms they raise."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from tests.support.doubles import ScriptedScorer
from tests.support.paths import ROOT
from tests.support.tiny_models import save_tiny_policy
from tests.support.torch_generator import TorchGenerator
from tests.training.rl.test_train import FUNCTION, PowerCutError, RecordedBackend, settings_of
from training.cli import train_app
from training.errors import TrainingError
from training.policy.config import RunOptions
from training.rl.train import train_rl

pytestmark = pytest.mark.slow

OPENINGS = [f"The film number {number} was" for number in range(12)]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "base")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", OPENINGS)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write(tmp_path / "held-out.jsonl", ["The ending was", "I saw it and", "The cast of this film"])


def table(out: Path) -> list[dict[str, str]]:
    with (out / "evaluations.csv").open() as file:
        return list(csv.DictReader(file))


def samples_of(out: Path, step: int) -> list[dict[str, Any]]:
    """Only a newline ends a line; str.splitlines would also split at the other line ends of Unicode."""
    lines = (out / "evaluations" / f"step-{step}.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def quiet(*, resume: bool = False) -> RunOptions:
    return RunOptions(checkpoint_every=2, resume=resume, progress=False)


def judged_backend(base: Path) -> RecordedBackend:
    backend = RecordedBackend(base)
    backend.judge = ScriptedScorer()
    return backend


def test_the_policy_is_evaluated_at_the_start_every_few_steps_and_at_the_end(
    base: Path, prompts: Path, held_out: Path
) -> None:
    out, backend = base.parent / "out", judged_backend(base)
    settings = settings_of("ppo", base, steps=5, evaluate_every=2, judge="length=python:a.py:a", learning_rate=1e-2)
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=backend.start)
    rows = table(out)
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"]
    assert {row["completions"] for row in rows} == {"3.0"}
    assert float(rows[0]["kl"]) == pytest.approx(0.0, abs=1e-4), "the policy starts as its reference"
    assert abs(float(rows[-1]["kl"])) > 1e-2
    assert all(float(row["reward"]) == float(row["judge"]) for row in rows), "both test doubles reward the length"
    first, last = samples_of(out, 0), samples_of(out, 5)
    assert [line["prompt"] for line in first] == [line["prompt"] for line in last]
    assert sorted(line["prompt"] for line in first) == ["I saw it and", "The cast of this film", "The ending was"]
    assert all(line["reference_nats"] < 0 and line["length"] <= 5 for line in last)
    scalars = EventAccumulator(str(out / "tensorboard" / "evaluations")).Reload().Scalars("reward")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [
        (int(row["step"]), pytest.approx(float(row["reward"]))) for row in rows
    ]
    assert (out / "evaluations.png").stat().st_size > 0
    assert (out / "alarms.jsonl").read_text() == "", "three prompts are too few for an alarm"


def test_evaluation_and_judge_do_not_change_the_trained_weights(base: Path, prompts: Path) -> None:
    settings = {"steps": 3, "samples_per_prompt": 2}
    judged = settings_of("reinforce", base, **settings, judge="length=python:a.py:a", evaluate_every=1)
    unjudged = settings_of("reinforce", base, **settings, evaluate_every=100)
    with_judge = train_rl(prompts, base.parent / "a", judged, quiet(), holdout=0.4, start=judged_backend(base).start)
    without_judge = train_rl(
        prompts, base.parent / "b", unjudged, quiet(), holdout=0.4, start=RecordedBackend(base).start
    )
    assert (with_judge / WEIGHTS).read_bytes() == (without_judge / WEIGHTS).read_bytes()


def test_held_out_prompts_are_not_trained_on(base: Path, prompts: Path) -> None:
    out, backend = base.parent / "out", RecordedBackend(base)
    settings = settings_of("reinforce", base, steps=8, evaluate_every=100)
    train_rl(prompts, out, settings, quiet(), holdout=0.4, start=backend.start)
    sampled = [prompt.text for prompt in backend.generators[0].prompts]
    evaluated = {line["prompt"] for line in samples_of(out, 0)}
    assert 0 < len(evaluated) < len(OPENINGS)
    assert {prompt: sampled.count(prompt) for prompt in evaluated} == dict.fromkeys(evaluated, 2), (
        "at the start and end"
    )
    assert set(OPENINGS) == set(sampled)


@pytest.mark.parametrize("cut_at_load", [2, 4, 5, 6])
def test_an_interrupted_run_has_the_evaluations_of_an_uninterrupted_run(
    cut_at_load: int, base: Path, prompts: Path, held_out: Path
) -> None:
    """Cut at the sync of step 1, 3, 4 or 5, with checkpoints after 2 and 4: the evaluation of step 3 is made twice."""
    settings = settings_of("ppo", base, steps=5, evaluate_every=1, judge="length=python:a.py:a")
    uninterrupted, out = base.parent / "uninterrupted", base.parent / "cut"
    train_rl(prompts, uninterrupted, settings, quiet(), validation_data=held_out, start=judged_backend(base).start)

    def cut(generator: TorchGenerator) -> None:
        if len(generator.versions) == cut_at_load - 1:
            raise PowerCutError

    backend = judged_backend(base)
    backend.on_load = cut
    with pytest.raises(PowerCutError):
        train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=backend.start)
    backend.on_load = lambda generator: None
    train_rl(prompts, out, settings, quiet(resume=True), validation_data=held_out, start=backend.start)
    assert [row["step"] for row in table(out)] == ["0", "1", "2", "3", "4", "5"]
    files = sorted(path.relative_to(uninterrupted) for path in (uninterrupted / "evaluations").iterdir())
    for name in (*files, Path("evaluations.csv"), Path("alarms.jsonl")):
        assert (out / name).read_text() == (uninterrupted / name).read_text()
    assert sorted(path.relative_to(out) for path in (out / "evaluations").iterdir()) == files


def test_reward_hacking_raises_an_alarm_in_the_file_the_table_and_the_output(
    base: Path, prompts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The judge's reward is the negative of the reward, on twelve prompts, and the learning rate is high."""
    out, backend = base.parent / "out", RecordedBackend(base)
    backend.judge = NegatedScorer()
    held_out = write(base.parent / "held-out.jsonl", [f"{text} and" for text in OPENINGS])
    settings = settings_of(
        "reinforce", base, steps=30, evaluate_every=30, judge="a=python:a.py:a", learning_rate=3e-2, kl_target=None
    )
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=backend.start)
    alarms = [json.loads(line) for line in (out / "alarms.jsonl").read_text().splitlines()]
    (alarm,) = [alarm for alarm in alarms if alarm["metric"] == "judge"]
    assert (alarm["step"], alarm["since"]) == (30, 0)
    assert alarm["reward_change"] == pytest.approx(-alarm["change"])
    warning = f"Warning: {alarm['message']}; read {out / 'evaluations' / 'step-30.jsonl'}"
    assert warning in capfd.readouterr().err
    assert [float(row["alarms"]) >= 1 for row in table(out)] == [False, True]


class NegatedScorer(ScriptedScorer):
    """The negative of the scripted scorer, so that it penalises length."""

    async def score(self, prompt: Any, candidates: Any) -> Any:
        scores = await super().score(prompt, candidates)
        return type(scores)(tuple(-reward for reward in scores.rewards_N), scores.scored_tokens)


def test_a_failing_judge_causes_a_warning_and_the_run_continues(
    base: Path, prompts: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, backend = base.parent / "out", RecordedBackend(base)
    backend.judge = ScriptedScorer(fails=True)
    settings = settings_of("reinforce", base, steps=1, judge="a=python:a.py:a")
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=backend.start)
    assert [(row["judge"], row["completions"]) for row in table(out)] == [("", "3.0")] * 2
    assert "Warning: the judge gave some held-out completions no reward: the scripted" in capfd.readouterr().err


def test_a_judge_without_held_out_prompts_is_refused(base: Path, prompts: Path) -> None:
    settings = settings_of("reinforce", base, judge="a=python:a.py:a")
    with pytest.raises(TrainingError, match="no prompt is held out for the judge; give --validation"):
        train_rl(prompts, base.parent / "out", settings, quiet(), holdout=0.0, start=judged_backend(base).start)


def test_without_held_out_prompts_there_are_no_evaluations(base: Path, prompts: Path) -> None:
    out = base.parent / "out"
    train_rl(
        prompts, out, settings_of("reinforce", base, steps=1), quiet(), holdout=0.0, start=RecordedBackend(base).start
    )
    assert not (out / "evaluations.csv").exists()


def test_the_judge_in_the_docs_rewards_friendly_completions() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module: dict[str, Any] = {}
    exec(code, module)
    friendly, hostile = module["judge"]("The film was", [" a great joy.", " a horrible failure."])
    assert friendly > 0 > hostile


def test_a_misspelt_judge_is_reported_in_a_sentence(base: Path, prompts: Path) -> None:
    options = ["--prompts", str(prompts), "--out", str(base.parent / "out"), "--model", str(base)]
    result = CliRunner().invoke(train_app, ["ppo", *options, "--reward-model", FUNCTION, "--judge", "a=python:reward"])
    assert result.exit_code == 1
    assert "should read python:FILE.py:FUNCTION" in result.output
