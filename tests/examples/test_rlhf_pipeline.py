"""The stages as commands of the real command line, skipping and resuming, and the comparison of known samples."""

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
from server.cli_options import DeferredCommand
from training.checkpoints import CheckpointError
from training.data.preferences import read_rows
from training.errors import TrainingError
from training.policy.subcommands import locked_commands

pytestmark = pytest.mark.slow

README = Path(comparison.__file__).with_name("README.md").read_text()
PROMPTS = ("This film", "The plot", "The music")


def planned(out: Path = Path("runs/a run"), size: Size = SMALL) -> list[Stage]:
    return stages(out, size, dtype="float32", seed=3)


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The parameters that `nbest` parses from its arguments, without running the command."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "get_command"):
        command = command.get_command(typer.Context(command), words.pop(0))
        if isinstance(command, DeferredCommand):
            command = command.load()
    return dict(command.make_context("nbest", words).params)


@pytest.mark.parametrize("stage", [*planned(), *planned(size=FULL)], ids=lambda stage: stage.name)
def test_every_stage_is_a_valid_nbest_command(stage: Stage) -> None:
    out = parsed(stage.arguments)["out"]
    assert out == stage.result or out in stage.result.parents


def test_parsing_a_stage_fails_for_an_unknown_option_or_a_missing_parameter() -> None:
    with pytest.raises(Exception, match="No such option: --gone"):
        parsed([*planned()[0].arguments, "--gone", "1"])
    with pytest.raises(Exception, match="Missing parameter: data"):
        parsed(["train", "sft", "--out", "x"])


def test_a_stage_reads_only_results_of_earlier_stages() -> None:
    out = Path("runs/a run")
    written = [out / "data"]
    for stage in planned(out):
        own = Path(stage.arguments[stage.arguments.index("--out") + 1])
        paths = [Path(word.partition("=")[2] or word) for word in stage.arguments if str(out) in word]
        for path in paths:
            assert path == own or any(
                result == path or path in result.parents or result in path.parents for result in written
            ), path
        assert own == stage.result or own in stage.result.parents
        written.append(stage.result)
    assert len({stage.result for stage in planned(out)}) == len(planned(out))


def test_the_reward_model_and_every_policy_have_the_same_start_and_every_policy_is_sampled() -> None:
    by_name = {stage.name: stage for stage in planned()}
    start = "runs/a run/sft/model"
    for name in ("reward", "pool", "candidates", *POLICIES):
        assert start in by_name[name].arguments
    assert set(POLICIES) == {name.removesuffix("-samples") for name in by_name if name.endswith("-samples")}


def test_the_readme_lists_every_stage() -> None:
    named = set(re.findall(r"^\| `([a-z-]+)`", README, re.MULTILINE))
    assert named == {stage.name for stage in planned() if not stage.name.endswith("-samples")}


class FakeNbest:
    """Replaces `nbest`: creates the result of each stage and records its name; the stage `failing` raises an error."""

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


def test_stages_with_a_result_are_skipped_and_a_run_continues_with_the_failed_stage(tmp_path: Path) -> None:
    pipeline = planned(tmp_path)
    names = [stage.name for stage in pipeline]
    failing, lines = FakeNbest(pipeline, "dpo"), list[str]()
    with pytest.raises(TrainingError, match=r"stage 9 of 15, dpo: nbest train dpo .* ended with 1"):
        run_missing(pipeline, failing, lines.append)
    assert failing.ran == names[: names.index("dpo")]
    assert f"$ {pipeline[0].command}" in lines[0]
    rest, lines = FakeNbest(pipeline), []
    run_missing(pipeline, rest, lines.append)
    assert rest.ran == names[names.index("dpo") :]
    assert lines[0] == "[1/15] sft: skipped, its result exists"
    third = FakeNbest(pipeline)
    run_missing(pipeline, third, lines.append)
    assert third.ran == []


def test_a_command_is_quoted_for_a_shell() -> None:
    assert planned()[0].command.startswith("nbest train sft --data 'runs/a run/data/demonstrations.jsonl' --out")


def test_show_prints_the_commands_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["rlhf_pipeline", "--show", "--seed", "3", "--small", "--out", str(tmp_path / "out")]
    )
    main()
    assert capsys.readouterr().out.splitlines() == [stage.command for stage in planned(tmp_path / "out")]
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_command_that_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf_pipeline", "--out", str(tmp_path)])
    message = rf"Error: another run is using .*\nTo continue: python -m examples\.rlhf_pipeline --out {tmp_path}"
    with locked_commands(tmp_path), pytest.raises(SystemExit, match=message):
        main()


def rated(count: int = 400) -> list[RatedText]:
    """Texts of nine words each, with ratings that cycle from -4 to 4."""
    return [
        RatedText(f"In film number {number} nobody is to be seen", float(number % 9 - 4)) for number in range(count)
    ]


def test_demonstrations_are_well_rated_texts() -> None:
    texts = {text.text: text.rating for text in rated()}
    rows = demonstrations([*rated(), RatedText("Too short.", 4.0)], 30, seed=0)
    assert len(rows) == len({str(row) for row in rows}) == 30
    assert all(texts[row["prompt"] + row["completion"]] >= 1 for row in rows)
    assert all(len(row["prompt"].split()) == 3 for row in rows)
    assert demonstrations(rated(), 30, seed=0) == rows != demonstrations(rated(), 30, seed=1)


def test_preferences_are_pairs_with_different_ratings_and_no_text_is_in_two() -> None:
    texts = {text.text: text.rating for text in rated()}
    rows = preferences(rated(), 100, seed=0)
    assert all(texts[row["chosen"]] - texts[row["rejected"]] >= 1 for row in rows)
    used = [text for row in rows for text in row.values()]
    assert len(used) == len(set(used)) == 200
    assert preferences(rated(), 100, seed=0) == rows != preferences(rated(), 100, seed=1)


def test_training_data_exclude_test_texts_and_held_out_openings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_held_out_opening = [RatedText(f"THIS film is number {number}, and a delight", 3.0) for number in range(99)]
    monkeypatch.setattr(example_data, "fetch_sdist", lambda directory: directory.mkdir(parents=True))
    monkeypatch.setattr(example_data, "read_sdist", lambda _, domain: [*rated(), *with_held_out_opening])
    size = replace(SMALL, demonstrations=1000, pairs=1000, test_pairs=1000)
    write_data(tmp_path / "data", size, dtype="float32", seed=0)

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]

    demonstrated = [row["prompt"] + row["completion"] for row in read("demonstrations")]
    compared = [text for row in read("preferences") for text in row.values()]
    assert demonstrated
    assert compared
    assert {split_of(text) for text in demonstrated + compared} == {"train"}
    assert not [text for text in demonstrated + compared if text.casefold().startswith("this film is")]
    test_texts = [text for row in read("test-preferences") for text in row.values()]
    assert {split_of(text) for text in test_texts} == {"test"}
    prompts, held_out = ({row["prompt"] for row in read(name)} for name in ("prompts", "held-out-prompts"))
    assert (len(prompts), len(held_out)) == (size.training_prompts, size.held_out_prompts)
    assert not prompts & held_out
    assert len(read_rows(tmp_path / "data" / "preferences.jsonl")) == len(compared) / 2


def test_a_directory_is_refused_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_data, "fetch_sdist", lambda directory: directory.mkdir(parents=True))
    monkeypatch.setattr(example_data, "read_sdist", lambda _, domain: rated())
    write_data(tmp_path / "data", SMALL, dtype="float32", seed=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    write_data(tmp_path / "data", SMALL, dtype="float32", seed=0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    with pytest.raises(CheckpointError, match="belongs to a run with another ppo_steps, seed"):
        write_data(tmp_path / "data", replace(SMALL, ppo_steps=3), dtype="float32", seed=1)


def test_texts_that_begin_like_an_opening_are_excluded() -> None:
    texts = [RatedText("THE PLOT is thin", -1.0), RatedText("Its plot is thin", -1.0)]
    assert unlike(texts, ("The plot",)) == texts[1:]


def samples(rewards: Sequence[float], *, nats: float, vader: float = 0.5, text: str = " is good") -> list[JudgedSample]:
    """A sample of every prompt for each reward; log-probabilities are -20 under the start, `nats` under the policy."""
    return [
        JudgedSample(prompt, text, float(reward), vader, 10, -20.0, nats) for prompt in PROMPTS for reward in rewards
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of a run with four samples of each policy and sixteen of the start for each prompt."""
    out = tmp_path_factory.mktemp("compared")
    judged = {
        "start": samples(range(16), nats=-20.0),
        "rejection": samples([7, 8, 7, 8], nats=-19.0),
        "dpo": samples([9, 10, 9, 10], nats=-18.0),
        "reinforce": samples([13, 14, 13, 14], nats=-15.0, vader=0.1, text=" good good good good"),
        "ppo": samples([12, 12, 12, 12], nats=-17.0),
    }
    (out / "judged").mkdir()
    for name, of_policy in judged.items():
        (out / "judged" / f"{name}.json").write_text(json.dumps([asdict(sample) for sample in of_policy]))
    evaluation = out / "reward" / "evaluation"
    evaluation.mkdir(parents=True)
    accuracy = {"accuracy": 0.88, "low": 0.84, "high": 0.92, "comparisons": 300, "rows": 300}
    (evaluation / "evaluation.json").write_text(json.dumps({"overall": accuracy}))
    compare(out, FULL, dtype="float32", seed=0)
    return out


def test_the_comparison_has_every_policy_in_a_table_and_a_plot(compared: Path) -> None:
    page = (compared / "comparison.md").read_text()
    assert (compared / "comparison.png").stat().st_size > 0
    assert "| start, best of 1 | 7.50 (7.50 … 7.50) | 0.50 (0.50 … 0.50) | 7.39 (7.39 … 7.39) | ≤ 0.00 |" in page
    assert "| start, best of 16 | 15.00 (15.00 … 15.00) |" in page
    assert "| ppo, best of 1 | 12.00 (12.00 … 12.00) | 0.50 (0.50 … 0.50) | 7.39 (7.39 … 7.39) | 3.00 " in page
    assert "orders 88 % (84 … 92) of 300 held-out pairs" in page
    result = json.loads((compared / "comparison.json").read_text())
    kl = {name: figures["kl"]["mean"] for name, figures in result["policies_at_best_of_1"].items()}
    assert kl == {"rejection": 1.0, "dpo": 2.0, "reinforce": 5.0, "ppo": 3.0}


def test_the_verdicts_say_where_the_reward_rose_and_the_text_got_worse(compared: Path) -> None:
    page = (compared / "comparison.md").read_text()
    assert "- rejection: the reward did not rise, or not by more than chance: 0.00 (0.00 … 0.00).\n" in page
    assert "- dpo: the reward rose by 2.00 (2.00 … 2.00), and by no measure did the text get worse.\n" in page
    assert (
        "- reinforce: the reward rose by 6.00 (6.00 … 6.00), and the text got worse: VADER, which no policy was "
        "trained on, fell by 0.40 (0.40 … 0.40); the share of repeated words rose by 0.75 (0.75 … 0.75).\n" in page
    )
    assert "| reinforce | 14.00 | 0.10 | **This film** good good good good |" in page


def test_a_verdict_compares_prompt_by_prompt() -> None:
    """The rewards of prompts differ by 100, and the policies differ by 1 on every prompt."""
    start = [[JudgedSample(prompt, " a", 100.0 * index, 0.5, 1, -2.0, -2.0)] for index, prompt in enumerate(PROMPTS)]
    better = [[replace(pool[0], reward=pool[0].reward + 1)] for pool in start]
    assert verdict("it", start, better).startswith("it: the reward rose by 1.00 (1.00 … 1.00)")


@pytest.mark.parametrize(("text", "share"), [("", 0.0), (" a b", 0.0), ("A a a a", 0.75)])
def test_repetition_is_the_share_of_words_that_occur_earlier(text: str, share: float) -> None:
    assert repetition(text) == share
