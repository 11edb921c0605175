"""A run of PPO or REINFORCE: what it writes, that it can go on, and that it stops when engine and learner part."""

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from reranker.candidate import Prompt
from reranker.models.shared_trunk import SharedTrunk
from server import factory
from server.config import Settings
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.tiny_models import save_tiny_policy, tiny_tokenizer
from tests.support.torch_generator import Fault, TorchGenerator
from tests.support.waiting import eventually
from training.checkpoints import CheckpointError
from training.cli import train_app
from training.data.preferences import DataError, PreferenceRow
from training.errors import TrainingError
from training.policy.finetune import RunOptions
from training.policy.tokens import TokenisedRow
from training.rl import train
from training.rl.backend import Actors, normalization_of, server_settings
from training.rl.config import PPOTraining, ReinforceTraining
from training.rl.prompts import in_tokens, of_step, read_prompts, seeds_of_step
from training.rl.rewards import ScoreScale
from training.rl.rollout import Rollouts, RolloutWorker
from training.rl.train import train_rl
from training.rl.update import update
from training.rl.weight_sync import SyncError

QUIET = RunOptions(progress=False)
TEXTS = ("The film was a delight", "What is the capital of", "The ending made no sense at all")
FUNCTION = "reward=python:reward.py:reward"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return save_prompts(tmp_path / "prompts.jsonl")


def save_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


class World:
    """A generator in this process for each start, and what becomes of it."""

    def __init__(self, policy: Path) -> None:
        self.policy = policy
        self.generators: list[TorchGenerator] = []
        self.scorer = ScriptedScorer()
        self.judge: ScriptedScorer | None = None
        self.on_load: Callable[[TorchGenerator], None] = lambda generator: None

    @asynccontextmanager
    async def start(self, settings: Settings, held: SharedTrunk | None) -> AsyncIterator[Actors]:
        world = self

        class Watched(TorchGenerator):
            async def load_adapter(self, path: str) -> str:
                world.on_load(self)
                return await super().load_adapter(path)

        self.generators.append(Watched(self.policy, settings.adapter))
        yield Actors(self.generators[-1], self.scorer, self.judge)


def settings_of(method: str, base: Path, **more: Any) -> PPOTraining | ReinforceTraining:
    fields: dict[str, Any] = {
        "base_model": str(base),
        "dtype": "float32",
        "steps": 6,
        "batch_size": 8,
        "samples_per_prompt": 4,
    }
    fields |= {"max_tokens": 5, "learning_rate": 3e-3, "reward_model": FUNCTION, "kl_target": 0.5, "kl_horizon": 50}
    if method == "ppo":
        return PPOTraining(**fields | {"epochs": 2, "minibatches": 2} | more)
    return ReinforceTraining(**fields | more)


def logged(out: Path, column: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_a_run_writes_an_adapter_and_the_measures_of_every_step(method: str, base: Path, prompts: Path) -> None:
    out = base.parent / "out"
    written = train_rl(prompts, out, settings_of(method, base), QUIET, start=World(base).start)
    assert written == out / "adapter"
    assert logged(out, "step") == [1, 2, 3, 4, 5, 6]
    assert logged(out, "kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert logged(out, "kl_k3")[-1] > 0
    assert logged(out, "first_ratio_error") == pytest.approx([0.0] * 6, abs=1e-4)
    assert max(logged(out, "mismatch")) < 1e-4
    assert (out / "metrics.png").stat().st_size > 0
    assert list((out / "tensorboard").iterdir())
    held = json.loads((out / "memory.json").read_text())["held"]
    assert held["base"] == sum(weights.nbytes for weights in load_file(base / "model.safetensors").values())
    assert 0 < held["policy"] == held["gradients"] < held["base"]
    assert held["optimiser"] > 2 * held["policy"]
    seconds = zip(logged(out, "reward_s"), logged(out, "rollout_s"), strict=True)
    assert all(0 < scoring < drawing_and_scoring for scoring, drawing_and_scoring in seconds)
    assert not (out / "checkpoints").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written)
    assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert model is not None


def test_all_weights_can_learn_and_each_step_reloads_them(base: Path, prompts: Path) -> None:
    out, world = base.parent / "out", World(base)
    written = train_rl(prompts, out, settings_of("ppo", base, full=True, steps=2), QUIET, start=world.start)
    assert written == out / "model"
    assert len(set(world.generators[0].versions)) == 3
    assert not torch.equal(
        load_file(base / "model.safetensors")["model.norm.weight"],
        load_file(written / "model.safetensors")["model.norm.weight"],
    )


class PowerCutError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    ("method", "cut_at_load", "overlap"),
    [("ppo", 2, False), ("ppo", 4, False), ("reinforce", 4, False), ("ppo", 4, True), ("reinforce", 4, True)],
)
def test_an_interrupted_run_ends_as_one_that_was_not(
    method: str, cut_at_load: int, overlap: bool, base: Path, prompts: Path
) -> None:
    """Weights, optimiser, beta, what is drawn next and the versions of the weights; a checkpoint every second step.

    Where drawing overlaps learning, the batch after the checkpoint is by weights that are not in it.
    """
    settings = settings_of(method, base, steps=5, overlap=overlap)
    options = RunOptions(checkpoint_every=2, progress=False)
    through = World(base)
    expected = train_rl(prompts, base.parent / "through", settings, options, start=through.start)

    def cut(generator: TorchGenerator) -> None:
        if len(generator.versions) == cut_at_load:
            raise PowerCutError

    out, world = base.parent / "cut", World(base)
    world.on_load = cut
    with pytest.raises(PowerCutError):
        train_rl(prompts, out, settings, options, start=world.start)
    world.on_load = lambda generator: None
    if cut_at_load > 2:
        with pytest.raises(CheckpointError, match="--resume"):
            train_rl(prompts, out, settings, options, start=world.start)
    resuming = RunOptions(checkpoint_every=2, resume=True, progress=False)
    found = train_rl(prompts, out, settings, resuming, start=world.start)
    weights = "adapter_model.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    for column in ("step", "reward", "kl", "beta", "policy_loss", "entropy", "staleness", "mismatch", "importance"):
        assert logged(out, column) == logged(base.parent / "through", column)
    versions = through.generators[0].versions
    assert world.generators[-1].versions == versions[-len(world.generators[-1].versions) :]
    assert len(world.generators[-1].versions) == {2: 6, 4: 4}[cut_at_load]


class Diary:
    """What a run does, in its order; each draw of a batch by the number of the load that its weights came with."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, *, learn_after_draws: Sequence[int]) -> None:
        """Learning from batch k ends when so many batches as `learn_after_draws` has at k are there."""
        diary = self
        self.lines: list[str] = []
        waits = iter(learn_after_draws)

        class Drawing(RolloutWorker):
            async def draw(self, prompts: Any, seeds: Any, version: str | None, scale: ScoreScale) -> Rollouts:
                drawn = await super().draw(prompts, seeds, version, scale)
                diary.lines.append(f"draw {world.generators[0].versions.index(str(version))}")
                return drawn

        def learning(*arguments: Any) -> dict[str, float]:
            draws = next(waits)
            assert eventually(lambda: sum(line.startswith("draw") for line in diary.lines) >= draws)
            learnt = update(*arguments)
            diary.lines.append("learn")
            return learnt

        monkeypatch.setattr(train, "RolloutWorker", Drawing)
        monkeypatch.setattr(train, "update", learning)
        world.on_load = lambda generator: diary.lines.append("load")


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_drawing_overlaps_learning_one_step_off_and_the_weights_change_after_both(
    method: str, base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is that of a run in turn; later batches are by the policy before, and their tokens weighed."""
    settings, in_turn, out = settings_of(method, base, steps=3), base.parent / "in turn", base.parent / "out"
    world = World(base)
    diary = Diary(world, monkeypatch, learn_after_draws=(1, 2, 3))
    train_rl(prompts, in_turn, settings, QUIET, validation_data=prompts, start=world.start)
    assert diary.lines == ["load", "draw 0", "learn", "load", "draw 1", "learn", "load", "draw 2", "learn", "load"]
    world = World(base)
    diary = Diary(world, monkeypatch, learn_after_draws=(2, 3, 3))
    overlapping = replace(settings, overlap=True)
    train_rl(prompts, out, overlapping, QUIET, validation_data=prompts, start=world.start)
    assert diary.lines == ["load", "draw 0", "draw 0", "learn", "load", "draw 1", "learn", "load", "learn", "load"]
    assert (logged(in_turn, "staleness"), logged(out, "staleness")) == ([0, 0, 0], [0, 1, 1])
    for column in ("reward", "policy_loss", "mismatch"):
        assert logged(out, column)[0] == logged(in_turn, column)[0]
    assert max(logged(in_turn, "mismatch")) < 1e-4 < min(logged(out, "mismatch")[1:])
    assert min(abs(one - 1) for one in logged(out, "importance")[1:]) > 1e-4
    assert logged(out, "first_ratio_error") == pytest.approx([0.0] * 3, abs=1e-4)


def test_where_learning_fails_the_batch_that_is_drawn_meanwhile_is_given_up(
    base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[str] = []

    class Endless(RolloutWorker):
        async def draw(self, *arguments: Any) -> Rollouts:
            if not draws:
                draws.append("first")
                return await super().draw(*arguments)
            draws.append("begun")
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value]  # never
            finally:
                draws.append("given up")

    def diverge(*_: Any) -> dict[str, float]:
        assert eventually(lambda: len(draws) == 2)
        raise TrainingError("diverged")

    monkeypatch.setattr(train, "RolloutWorker", Endless)
    monkeypatch.setattr(train, "update", diverge)
    with pytest.raises(TrainingError, match="diverged"):
        train_rl(prompts, base.parent / "out", settings_of("ppo", base, overlap=True), QUIET, start=World(base).start)
    assert draws == ["first", "begun", "given up"]


@pytest.mark.parametrize("fault", ["stale", "wrong scale", "stale prefix"])
def test_an_engine_that_draws_with_other_weights_stops_the_run_with_both_numbers(
    fault: Fault, base: Path, prompts: Path
) -> None:
    world = World(base)

    def break_third(generator: TorchGenerator) -> None:
        if len(generator.versions) == 2:
            generator.fault = fault

    world.on_load = break_third
    settings = settings_of("ppo", base)
    with pytest.raises(SyncError, match=r"has -?\d+\.\d{4} nats a token by the engine and -?\d+\.\d{4} by the learner"):
        train_rl(prompts, base.parent / "out", settings, QUIET, start=world.start)
    assert len(logged(base.parent / "out", "step")) == 1, "the second step ended with the broken sync"


def row(text: str) -> TokenisedRow:
    return TokenisedRow(PreferenceRow(1, Prompt(text=text), (), (), 1), list(tiny_tokenizer()(text)["input_ids"]), [])


def worker(generator: Any, scorer: ScriptedScorer, **more: Any) -> RolloutWorker:
    return RolloutWorker(
        generator, scorer, **{"samples": 3, "max_tokens": 2, "temperature": 1.0, "truncation_penalty": 0.5} | more
    )


async def test_a_reward_is_scaled_and_a_completion_that_was_cut_pays_for_it() -> None:
    """Rewards 4 and 6 on a scale of mean 2 and deviation 2: 1, and 2 - .5."""
    generator = ScriptedGenerator(["a b", "c d e", "a b"])
    scorer = ScriptedScorer({"a b": 4.0, "c d": 6.0})
    found = await worker(generator, scorer).draw([row("x")], [5], None, ScoreScale(2.0, 2.0))
    assert [(one.reward, one.score, one.is_cut) for one in found.completions] == [
        (4.0, 1.0, False),
        (6.0, 1.5, True),
        (4.0, 1.0, False),
    ]
    assert generator.calls[0][1].seed == 5
    assert [one.drawn_logprobs for one in found.completions] == [(-1.0, -1.0)] * 3


async def test_what_failed_or_has_no_reward_is_left_out_and_counted() -> None:
    scorer = ScriptedScorer({"a": 1.0, "b": float("nan")})
    found = await worker(ScriptedGenerator(["a", "b", None]), scorer).draw([row("x")], [0], None, ScoreScale())
    assert ([one.text for one in found.completions], found.lost) == (["a"], 2)


async def test_a_step_without_any_reward_ends_the_run_with_the_reason() -> None:
    with pytest.raises(TrainingError, match="none of the 3 completions of a step has a reward: the scripted scorer"):
        await worker(ScriptedGenerator(["a"]), ScriptedScorer(fails=True)).draw([row("x")], [0], None, ScoreScale())


async def test_completions_of_other_weights_are_not_learnt_from() -> None:
    with pytest.raises(TrainingError, match="drew with the weights None, and newest were loaded last"):
        await worker(ScriptedGenerator(["a"]), ScriptedScorer()).draw([row("x")], [0], "newest", ScoreScale())


def test_every_pass_takes_all_prompts_in_an_order_of_its_own_and_begins_anywhere() -> None:
    rows = [row(str(number)) for number in range(5)]

    def names(step: int) -> list[str]:
        return [str(one.row.prompt.text) for one in of_step(rows, step, 3, seed=7)]

    drawn = [name for step in range(5) for name in names(step)]
    passes = [drawn[begin : begin + 5] for begin in (0, 5, 10)]
    assert all(sorted(one) == ["0", "1", "2", "3", "4"] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert len({*seeds_of_step("step 0", 3, 7), *seeds_of_step("step 1", 3, 7), *seeds_of_step("step 0", 3, 8)}) == 9


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"text": "a"}, "the fields are text; a line has prompt or messages"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 125}, "does not fit the 128 read; lower --max-tokens"),
        ({"messages": "a"}, "messages is neither a string nor a list of messages"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_told_with_its_line(line: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=told) as raised:
        in_tokens(read_prompts(path, None, 0.0).trained, path, tiny_tokenizer(), 128, 5)
    assert f"{path}:2: " in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 10}, "10 does not divide into prompts of 4"),
        ({"samples_per_prompt": 1}, "nothing to be compared with"),
        ({"temperature": 0.0}, "at temperature 0"),
        ({"kl_target": 0.0}, "a target of no KL"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_before_anything_is_loaded(
    fields: dict[str, Any], told: str, prompts: Path
) -> None:
    with pytest.raises(TrainingError, match=told):
        train_rl(prompts, prompts.parent / "out", settings_of("reinforce", Path("nowhere"), **fields), QUIET)


def test_rewards_are_set_on_the_scale_of_the_reference_once(base: Path, prompts: Path) -> None:
    """To mean 0 and deviation 1: the scores of the first step are of that order, its rewards are not."""
    world = World(base)
    settings = settings_of("ppo", base, reward_model="length=movie-sentiment", steps=1)
    train_rl(prompts, base.parent / "out", settings, QUIET, start=world.start)
    (reward,), (score,), (deviation,) = (
        logged(base.parent / "out", name) for name in ("reward", "score", "reward_deviation")
    )
    assert abs(score) < 1.5 < reward
    assert deviation > 0


def test_a_functions_numbers_are_left_alone_and_a_models_are_not() -> None:
    assert normalization_of(PPOTraining(reward_model=FUNCTION)) == "none"
    assert normalization_of(PPOTraining()) == "reference"
    assert normalization_of(PPOTraining(reward_normalization="none")) == "none"


def test_the_engine_begins_with_the_learners_adapter_and_precision(base: Path, tmp_path: Path) -> None:
    settings = server_settings(PPOTraining(base_model=str(base)), tmp_path, bfloat16=False)
    assert (settings.model, settings.adapter, settings.dtype) == (str(base), tmp_path, "float32")


def test_the_engine_is_told_where_the_weights_are_wherever_it_stands(
    base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Told(TorchGenerator):
        async def load_adapter(self, path: str) -> str:
            told.append(path)
            return await super().load_adapter(path)

    @asynccontextmanager
    async def start(settings: Settings, _: SharedTrunk | None) -> AsyncIterator[Actors]:
        told.append(str(settings.adapter))
        yield Actors(Told(base, settings.adapter), ScriptedScorer())

    monkeypatch.chdir(base.parent)
    train_rl(prompts, Path("out"), settings_of("ppo", base, steps=1), QUIET, start=start)
    assert told == [str(base.parent / "out" / "checkpoints" / "engine" / "adapter")] * 3


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_the_command_tells_how_to_serve_what_it_wrote(
    method: str, base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def start(settings: Settings, *, tempered_logprobs: bool, held: SharedTrunk | None) -> AsyncIterator[BestOfN]:
        assert tempered_logprobs
        assert held is not None
        assert held.is_of(str(base))
        yield BestOfN(TorchGenerator(base, settings.adapter), {"reward": ScriptedScorer()})

    monkeypatch.setattr(factory, "start", start)
    out = base.parent / "out"
    options = {"--prompts": prompts, "--out": out, "--model": base, "--steps": 1, "--batch-size": 4, "--max-tokens": 3}
    options |= {"--kl-coef": 0.1, "--learning-rate": 1e-3, "--reward-normalization": "none", "--seed": 1}
    arguments = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(train_app, [method, *arguments, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert f"nbest serve --model {base} --adapter {out / 'adapter'}" in result.output


def test_a_misspelt_reward_is_told_in_a_sentence(base: Path, prompts: Path) -> None:
    options = ["--prompts", str(prompts), "--out", str(base.parent / "out"), "--model", str(base)]
    result = CliRunner().invoke(train_app, ["ppo", *options, "--reward-model", "mine=python:reward"])
    assert result.exit_code == 1
    assert "should read python:FILE.py:FUNCTION" in result.output
