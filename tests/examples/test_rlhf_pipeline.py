"""The stages against the real command line, what is skipped and told, and figures from samples that are known."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer

import examples.rlhf_pipeline.data as example_data
from benchmarks.movie_ratings import RatedText, split_of
from benchmarks.policy_evaluation import JudgedSample
from examples.rlhf_pipeline import comparison
from examples.rlhf_pipeline.__main__ import main
from examples.rlhf_pipeline.comparison import compare, repetition, verdict
from examples.rlhf_pipeline.data import demonstrations, preferences, unlike, write_data
from examples.rlhf_pipeline.size import FULL, SMALL, Size
from examples.rlhf_pipeline.stages import POLICIES, Stage, run_missing, stages
from server.cli import app
from training.checkpoints import CheckpointError
from training.data.preferences import read_rows
from training.errors import TrainingError
from training.policy.subcommands import commands_in

README = Path(comparison.__file__).with_name("README.md").read_text()
PROMPTS = ("This film", "The plot", "The music")


def planned(out: Path = Path("runs/a road"), size: Size = SMALL) -> list[Stage]:
    return stages(out, size, dtype="float32", seed=3)


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """What `nbest` understands of its arguments; nothing is run."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "get_command"):
        command = command.get_command(typer.Context(command), words.pop(0))
    return dict(command.make_context("nbest", words).params)


@pytest.mark.parametrize("stage", [*planned(), *planned(size=FULL)], ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_nbest_takes(stage: Stage) -> None:
    out = parsed(stage.arguments)["out"]
    assert out == stage.result or out in stage.result.parents


def test_a_flag_that_is_gone_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --gone"):
        parsed([*planned()[0].arguments, "--gone", "1"])
    with pytest.raises(Exception, match="Missing parameter: data"):
        parsed(["train", "sft", "--out", "x"])


def test_a_stage_reads_only_what_an_earlier_one_wrote() -> None:
    out = Path("runs/a road")
    there = [out / "data"]
    for stage in planned(out):
        own = Path(stage.arguments[stage.arguments.index("--out") + 1])
        read = [Path(word.partition("=")[2] or word) for word in stage.arguments if str(out) in word]
        for path in read:
            assert path == own or any(one == path or path in one.parents or one in path.parents for one in there), path
        assert own == stage.result or own in stage.result.parents
        there.append(stage.result)
    assert len({stage.result for stage in planned(out)}) == len(planned(out))


def test_every_policy_starts_where_the_reward_model_does_and_is_measured_alike() -> None:
    by_name = {stage.name: stage for stage in planned()}
    start = "runs/a road/sft/model"
    for name in ("reward", "pool", "candidates", *POLICIES):
        assert start in by_name[name].arguments
    assert set(POLICIES) == {name.removesuffix("-samples") for name in by_name if name.endswith("-samples")}


def test_the_readme_knows_every_stage() -> None:
    named = set(re.findall(r"^\| `([a-z-]+)`", README, re.MULTILINE))
    assert named == {stage.name for stage in planned() if not stage.name.endswith("-samples")}


class Recorded:
    """Stands for `nbest`: makes what the stage would have made, until the stage of that name, which fails."""

    def __init__(self, stages: Sequence[Stage], failing: str = "") -> None:
        self._by_arguments = {stage.arguments: stage for stage in stages}
        self._failing = failing
        self.ran: list[str] = []

    def __call__(self, arguments: Sequence[str]) -> None:
        stage = self._by_arguments[tuple(arguments)]
        if stage.name == self._failing:
            raise TrainingError(f"{stage.command} ended with 1")
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        stage.result.touch()
        self.ran.append(stage.name)


def test_what_is_there_is_skipped_and_what_failed_is_where_it_goes_on(tmp_path: Path) -> None:
    road = planned(tmp_path)
    names = [stage.name for stage in road]
    failing, told = Recorded(road, "dpo"), list[str]()
    with pytest.raises(TrainingError, match=r"stage 9 of 15, dpo: nbest train dpo .* ended with 1"):
        run_missing(road, failing, told.append)
    assert failing.ran == names[: names.index("dpo")]
    assert f"$ {road[0].command}" in told[0]
    rest, told = Recorded(road), []
    run_missing(road, rest, told.append)
    assert rest.ran == names[names.index("dpo") :]
    assert told[0] == "[1/15] sft: is there already"
    again = Recorded(road)
    run_missing(road, again, told.append)
    assert again.ran == []


def test_a_command_is_shown_as_one_would_type_it() -> None:
    assert planned()[0].command.startswith("nbest train sft --data 'runs/a road/data/demonstrations.jsonl' --out")


def test_the_commands_are_shown_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["rlhf_pipeline", "--show", "--seed", "3", "--small", "--out", str(tmp_path / "out")]
    )
    main()
    assert capsys.readouterr().out.splitlines() == [stage.command for stage in planned(tmp_path / "out")]
    assert not (tmp_path / "out").exists()


def test_an_error_is_told_with_the_way_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf_pipeline", "--out", str(tmp_path)])
    told = rf"Error: a run works in .*\nTo go on: python -m examples\.rlhf_pipeline --out {tmp_path}"
    with commands_in(tmp_path), pytest.raises(SystemExit, match=told):
        main()


def rated(count: int = 400) -> list[RatedText]:
    """Texts of nine words each, rated from -4 to 4 in turn."""
    return [
        RatedText(f"In film number {number} nobody is to be seen", float(number % 9 - 4)) for number in range(count)
    ]


def test_demonstrations_are_what_people_rated_well() -> None:
    texts = {text.text: text.rating for text in rated()}
    rows = demonstrations([*rated(), RatedText("Too short.", 4.0)], 30, seed=0)
    assert len(rows) == len({str(row) for row in rows}) == 30
    assert all(texts[row["prompt"] + row["completion"]] >= 1 for row in rows)
    assert all(len(row["prompt"].split()) == 3 for row in rows)
    assert demonstrations(rated(), 30, seed=0) == rows != demonstrations(rated(), 30, seed=1)


def test_preferences_are_of_texts_rated_apart_each_in_one_pair() -> None:
    texts = {text.text: text.rating for text in rated()}
    rows = preferences(rated(), 100, seed=0)
    assert all(texts[row["chosen"]] - texts[row["rejected"]] >= 1 for row in rows)
    used = [text for row in rows for text in row.values()]
    assert len(used) == len(set(used)) == 200
    assert preferences(rated(), 100, seed=0) == rows != preferences(rated(), 100, seed=1)


def test_the_data_hold_out_texts_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins_like_a_held_out_one = [
        RatedText(f"THIS film is number {number}, and a delight", 3.0) for number in range(99)
    ]
    monkeypatch.setattr(example_data, "fetch_sdist", lambda directory: directory.mkdir(parents=True))
    monkeypatch.setattr(example_data, "read_sdist", lambda _, domain: [*rated(), *begins_like_a_held_out_one])
    size = replace(SMALL, demonstrations=1000, pairs=1000, test_pairs=1000)
    write_data(tmp_path / "data", size, dtype="float32", seed=0)

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]

    shown = [row["prompt"] + row["completion"] for row in read("demonstrations")]
    preferred = [text for row in read("preferences") for text in row.values()]
    assert shown
    assert preferred
    assert {split_of(text) for text in shown + preferred} == {"train"}
    assert not [text for text in shown + preferred if text.casefold().startswith("this film is")]
    tested = [text for row in read("test-preferences") for text in row.values()]
    assert {split_of(text) for text in tested} == {"test"}
    prompts, held_out = ({row["prompt"] for row in read(name)} for name in ("prompts", "held-out-prompts"))
    assert (len(prompts), len(held_out)) == (size.training_prompts, size.held_out_prompts)
    assert not prompts & held_out
    assert len(read_rows(tmp_path / "data" / "preferences.jsonl")) == len(preferred) / 2


def test_a_directory_belongs_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_data, "fetch_sdist", lambda directory: directory.mkdir(parents=True))
    monkeypatch.setattr(example_data, "read_sdist", lambda _, domain: rated())
    write_data(tmp_path / "data", SMALL, dtype="float32", seed=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    write_data(tmp_path / "data", SMALL, dtype="float32", seed=0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    with pytest.raises(CheckpointError, match="belongs to a run with another ppo_steps, seed"):
        write_data(tmp_path / "data", replace(SMALL, ppo_steps=3), dtype="float32", seed=1)


def test_texts_that_begin_like_an_opening_are_left_out() -> None:
    texts = [RatedText("THE PLOT is thin", -1.0), RatedText("Its plot is thin", -1.0)]
    assert unlike(texts, ("The plot",)) == texts[1:]


def samples(rewards: Sequence[float], *, nats: float, vader: float = 0.5, text: str = " is good") -> list[JudgedSample]:
    """For each prompt samples of these rewards; ten tokens of two nats each under the start, `nats` by the policy."""
    return [JudgedSample(prompt, text, float(one), vader, 10, -20.0, nats) for prompt in PROMPTS for one in rewards]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose samples were drawn and judged, each policy's four and the start's sixteen, and then compared."""
    out = tmp_path_factory.mktemp("compared")
    judged = {
        "start": samples(range(16), nats=-20.0),
        "rejection": samples([7, 8, 7, 8], nats=-19.0),
        "dpo": samples([9, 10, 9, 10], nats=-18.0),
        "reinforce": samples([13, 14, 13, 14], nats=-15.0, vader=0.1, text=" good good good good"),
        "ppo": samples([12, 12, 12, 12], nats=-17.0),
    }
    (out / "judged").mkdir()
    for name, found in judged.items():
        (out / "judged" / f"{name}.json").write_text(json.dumps([asdict(one) for one in found]))
    evaluation = out / "reward" / "evaluation"
    evaluation.mkdir(parents=True)
    accuracy = {"accuracy": 0.88, "low": 0.84, "high": 0.92, "comparisons": 300, "rows": 300}
    (evaluation / "evaluation.json").write_text(json.dumps({"overall": accuracy}))
    compare(out, FULL, dtype="float32", seed=0)
    return out


def test_all_stand_in_one_table_and_one_plot(compared: Path) -> None:
    page = (compared / "comparison.md").read_text()
    assert (compared / "comparison.png").stat().st_size > 0
    assert "| start, best of 1 | 7.50 (7.50 … 7.50) | 0.50 (0.50 … 0.50) | 7.39 (7.39 … 7.39) | ≤ 0.00 |" in page
    assert "| start, best of 16 | 15.00 (15.00 … 15.00) |" in page
    assert "| ppo, best of 1 | 12.00 (12.00 … 12.00) | 0.50 (0.50 … 0.50) | 7.39 (7.39 … 7.39) | 3.00 " in page
    assert "orders 88 % (84 … 92) of 300 pairs" in page
    result = json.loads((compared / "comparison.json").read_text())
    kl = {name: one["kl"]["mean"] for name, one in result["policies_at_best_of_1"].items()}
    assert kl == {"rejection": 1.0, "dpo": 2.0, "reinforce": 5.0, "ppo": 3.0}


def test_it_is_said_where_reward_rose_and_the_text_got_worse(compared: Path) -> None:
    page = (compared / "comparison.md").read_text()
    assert "- rejection: the reward did not rise, or not by more than chance: 0.00 (0.00 … 0.00).\n" in page
    assert "- dpo: the reward rose by 2.00 (2.00 … 2.00), and no measure says that the text got worse.\n" in page
    assert (
        "- reinforce: the reward rose by 6.00 (6.00 … 6.00), and the text got worse: VADER, which nothing was trained "
        "on, fell by 0.40 (0.40 … 0.40); the share of words that a text has had before rose by 0.75 (0.75 … 0.75).\n"
        in page
    )
    assert "| reinforce | 14.00 | 0.10 | **This film** good good good good |" in page


def test_a_verdict_is_about_the_differences_of_prompts() -> None:
    """Prompts differ by far more than policies do, and by 1 in each all the same."""
    start = [[JudgedSample(prompt, " a", 100.0 * place, 0.5, 1, -2.0, -2.0)] for place, prompt in enumerate(PROMPTS)]
    better = [[replace(pool[0], reward=pool[0].reward + 1)] for pool in start]
    assert verdict("it", start, better).startswith("it: the reward rose by 1.00 (1.00 … 1.00)")


@pytest.mark.parametrize(("text", "share"), [("", 0.0), (" a b", 0.0), ("A a a a", 0.75)])
def test_repetition_is_the_share_of_words_said_before(text: str, share: float) -> None:
    assert repetition(text) == share
