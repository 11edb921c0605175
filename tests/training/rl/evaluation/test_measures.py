"""The evaluations of a run: their figures by hand, what is written of them, and that they go on where a run does."""

import csv
import json
import math
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
from tests.training.rl.test_train import FUNCTION, PowerCutError, World, settings_of
from training.cli import train_app
from training.errors import TrainingError
from training.policy.finetune import RunOptions
from training.rl.evaluation.measures import Change, Evaluation, EvaluationSample, change, repetition
from training.rl.train import train_rl

OPENINGS = [f"The film number {number} was" for number in range(12)]
WEIGHTS = "adapter_model.safetensors"


def sample(place: int, **fields: Any) -> EvaluationSample:
    common: dict[str, Any] = {"prompt": "a", "completion": "b", "reward": 0.0, "judge": None, "kl": 0.0, "length": 5}
    common |= {"cut": False, "repetition": 0.0, "reference_nats": -2.5}
    return EvaluationSample(place, **common | fields)


def test_the_figures_are_means_over_prompts() -> None:
    """Rewards 0, 0, 2, 2: squared deviations 4, variance 4 / 3, standard error sqrt(4 / 3 / 4). -10 nats, 20 tokens."""
    of_prompts: list[dict[str, Any]] = [
        {"reward": 0.0, "judge": 0.5, "kl": 1.0, "length": 2, "cut": True, "repetition": 0.2},
        {"reward": 0.0, "judge": None, "kl": -1.0, "length": 4, "repetition": 0.0},
        {"reward": 2.0, "judge": None, "kl": 3.0, "length": 6, "repetition": 0.2},
        {"reward": 2.0, "judge": None, "kl": 1.0, "length": 8, "repetition": 0.0},
    ]
    found = Evaluation(0, tuple(sample(place, **fields) for place, fields in enumerate(of_prompts))).figures()
    assert found == pytest.approx(
        {
            "completions": 4,
            "reward": 1.0,
            "reward_standard_error": 1 / math.sqrt(3),
            "judge": 0.5,
            "kl": 1.0,
            "kl_standard_error": math.sqrt(2 / 3),
            "length": 5.0,
            "cut": 0.25,
            "repetition": 0.1,
            "perplexity": math.exp(0.5),
        }
    )


def test_a_change_is_measured_prompt_by_prompt() -> None:
    """0 to 1 and 10 to 13: 1 and 3, so 2 with a standard error of 1, however far apart the prompts are."""
    before = Evaluation(0, (sample(0, reward=0.0), sample(1, reward=10.0), sample(2, reward=50.0)))
    after = Evaluation(1, (sample(1, reward=13.0), sample(0, reward=1.0)))
    assert change(before, after, "reward") == Change(before=5.0, after=7.0, standard_error=1.0, prompts=2)
    assert change(before, after, "judge") is None


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([], 0.0), ([1, 1, 1], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1, 1, 1, 1, 1, 1], 2 / 3), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(token_ids: list[int], share: float) -> None:
    """Six ones hold three 4-grams, all alike; 1 2 3 4 twice holds five, of which the last was there."""
    assert repetition(token_ids) == pytest.approx(share)


def test_samples_are_read_as_they_were_written() -> None:
    """A line separator of Unicode in a completion ends no line of the file."""
    written = Evaluation(3, (sample(0, completion="a\u2028b\n"), sample(1, prompt=[{"role": "user", "content": "é"}])))
    assert Evaluation.of_lines(3, written.lines()) == written


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
    """A line of JSON ends with a newline and with nothing else that Unicode has."""
    lines = (out / "evaluations" / f"step-{step}.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def quiet(*, resume: bool = False) -> RunOptions:
    return RunOptions(checkpoint_every=2, resume=resume, progress=False)


def judged_world(base: Path) -> World:
    world = World(base)
    world.judge = ScriptedScorer()
    return world


def test_the_policy_is_evaluated_at_the_start_on_the_way_and_at_the_end(
    base: Path, prompts: Path, held_out: Path
) -> None:
    out, world = base.parent / "out", judged_world(base)
    settings = settings_of("ppo", base, steps=5, evaluate_every=2, judge="length=python:a.py:a", learning_rate=1e-2)
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=world.start)
    rows = table(out)
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"]
    assert {row["completions"] for row in rows} == {"3.0"}
    assert float(rows[0]["kl"]) == pytest.approx(0.0, abs=1e-4), "the policy begins as its reference"
    assert abs(float(rows[-1]["kl"])) > 1e-2
    assert all(float(row["reward"]) == float(row["judge"]) for row in rows), "both doubles reward the length"
    first, last = samples_of(out, 0), samples_of(out, 5)
    assert [one["prompt"] for one in first] == [one["prompt"] for one in last]
    assert sorted(one["prompt"] for one in first) == ["I saw it and", "The cast of this film", "The ending was"]
    assert all(one["reference_nats"] < 0 and one["length"] <= 5 for one in last)
    scalars = EventAccumulator(str(out / "tensorboard" / "evaluations")).Reload().Scalars("reward")
    assert [(one.step, one.value) for one in scalars] == [
        (int(row["step"]), pytest.approx(float(row["reward"]))) for row in rows
    ]
    assert (out / "evaluations.png").stat().st_size > 0
    assert (out / "alarms.jsonl").read_text() == "", "three prompts are too few for one"


def test_evaluating_and_judging_change_nothing_that_is_learnt(base: Path, prompts: Path) -> None:
    settings = {"steps": 3, "samples_per_prompt": 2}
    judged = settings_of("reinforce", base, **settings, judge="length=python:a.py:a", evaluate_every=1)
    seldom = settings_of("reinforce", base, **settings, evaluate_every=100)
    one = train_rl(prompts, base.parent / "a", judged, quiet(), holdout=0.4, start=judged_world(base).start)
    other = train_rl(prompts, base.parent / "b", seldom, quiet(), holdout=0.4, start=World(base).start)
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_prompts_that_are_held_out_are_not_learnt_from(base: Path, prompts: Path) -> None:
    out, world = base.parent / "out", World(base)
    settings = settings_of("reinforce", base, steps=8, evaluate_every=100)
    train_rl(prompts, out, settings, quiet(), holdout=0.4, start=world.start)
    drawn = [prompt.text for prompt in world.generators[0].prompts]
    evaluated = {one["prompt"] for one in samples_of(out, 0)}
    assert 0 < len(evaluated) < len(OPENINGS)
    assert {prompt: drawn.count(prompt) for prompt in evaluated} == dict.fromkeys(evaluated, 2), "at the start and end"
    assert set(OPENINGS) == set(drawn)


@pytest.mark.parametrize("cut_at_load", [2, 4, 5, 6])
def test_an_interrupted_run_has_the_evaluations_of_one_that_was_not(
    cut_at_load: int, base: Path, prompts: Path, held_out: Path
) -> None:
    """Cut at the sync of step 1, 3, 4 and 5, with checkpoints after 2 and 4: the evaluation of step 3 is made twice."""
    settings = settings_of("ppo", base, steps=5, evaluate_every=1, judge="length=python:a.py:a")
    through, out = base.parent / "through", base.parent / "cut"
    train_rl(prompts, through, settings, quiet(), validation_data=held_out, start=judged_world(base).start)

    def cut(generator: TorchGenerator) -> None:
        if len(generator.versions) == cut_at_load - 1:
            raise PowerCutError

    world = judged_world(base)
    world.on_load = cut
    with pytest.raises(PowerCutError):
        train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=world.start)
    world.on_load = lambda generator: None
    train_rl(prompts, out, settings, quiet(resume=True), validation_data=held_out, start=world.start)
    assert [row["step"] for row in table(out)] == ["0", "1", "2", "3", "4", "5"]
    files = sorted(path.relative_to(through) for path in (through / "evaluations").iterdir())
    for name in (*files, Path("evaluations.csv"), Path("alarms.jsonl")):
        assert (out / name).read_text() == (through / name).read_text()
    assert sorted(path.relative_to(out) for path in (out / "evaluations").iterdir()) == files


def test_a_reward_that_is_gamed_raises_an_alarm_in_every_place(
    base: Path, prompts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The judge dislikes what the reward likes, on ten prompts, and learning is fast."""
    out, world = base.parent / "out", World(base)
    world.judge = Opposed()
    held_out = write(base.parent / "held-out.jsonl", [f"{text} and" for text in OPENINGS])
    settings = settings_of(
        "reinforce", base, steps=30, evaluate_every=30, judge="a=python:a.py:a", learning_rate=3e-2, kl_target=None
    )
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=world.start)
    (alarm,) = [
        one for one in map(json.loads, (out / "alarms.jsonl").read_text().splitlines()) if one["measure"] == "judge"
    ]
    assert (alarm["step"], alarm["since"]) == (30, 0)
    assert alarm["reward_change"] == pytest.approx(-alarm["change"])
    told = capfd.readouterr().err
    assert f"Warning: {alarm['told']}; read {out / 'evaluations' / 'step-30.jsonl'}" in told
    assert [float(row["alarms"]) >= 1 for row in table(out)] == [False, True]


class Opposed(ScriptedScorer):
    """Punishes length."""

    async def score(self, prompt: Any, candidates: Any) -> Any:
        scores = await super().score(prompt, candidates)
        return type(scores)(tuple(-reward for reward in scores.rewards_N), scores.scored_tokens)


def test_a_judge_that_fails_is_told_and_ends_nothing(
    base: Path, prompts: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, world = base.parent / "out", World(base)
    world.judge = ScriptedScorer(fails=True)
    settings = settings_of("reinforce", base, steps=1, judge="a=python:a.py:a")
    train_rl(prompts, out, settings, quiet(), validation_data=held_out, start=world.start)
    assert [(row["judge"], row["completions"]) for row in table(out)] == [("", "3.0")] * 2
    assert "Warning: the judge has nothing to say of some held-out completions: the scripted" in capfd.readouterr().err


def test_a_judge_without_held_out_prompts_is_refused(base: Path, prompts: Path) -> None:
    settings = settings_of("reinforce", base, judge="a=python:a.py:a")
    with pytest.raises(TrainingError, match="no prompt is held out for the judge; give --validation"):
        train_rl(prompts, base.parent / "out", settings, quiet(), holdout=0.0, start=judged_world(base).start)


def test_without_held_out_prompts_there_are_no_evaluations(base: Path, prompts: Path) -> None:
    out = base.parent / "out"
    train_rl(prompts, out, settings_of("reinforce", base, steps=1), quiet(), holdout=0.0, start=World(base).start)
    assert not (out / "evaluations.csv").exists()


def test_the_judge_of_the_docs_likes_what_is_friendly() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module: dict[str, Any] = {}
    exec(code, module)
    liked, hated = module["judge"]("The film was", [" a great joy.", " a horrible failure."])
    assert liked > 0 > hated


def test_a_misspelt_judge_is_told_in_a_sentence(base: Path, prompts: Path) -> None:
    options = ["--prompts", str(prompts), "--out", str(base.parent / "out"), "--model", str(base)]
    result = CliRunner().invoke(train_app, ["ppo", *options, "--reward-model", FUNCTION, "--judge", "a=python:reward"])
    assert result.exit_code == 1
    assert "should read python:FILE.py:FUNCTION" in result.output
