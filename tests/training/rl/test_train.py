"""A run of PPO or REINFORCE: its output, how it resumes, and that it ends if engine and learner disagree."""

import asyncio
import csv
import itertools
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
from training.policy.config import RunOptions
from training.policy.tokens import TokenisedRow
from training.rl import train
from training.rl.backend import Backend, normalization_of, server_settings
from training.rl.config import PPOTraining, ReinforceTraining
from training.rl.prompts import prompts_of_step, read_prompts, seeds_of_step, tokenise_prompts
from training.rl.rewards import ScoreScale
from training.rl.rollout import RolloutBatch, RolloutWorker
from training.rl.train import train_rl
from training.rl.update import update
from training.rl.weight_sync import SyncError

pytestmark = pytest.mark.slow

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


class RecordedBackend:
    """Starts a generator in this process for each run, and records the generators; `on_load` is called at each load."""

    def __init__(self, policy: Path) -> None:
        self.policy = policy
        self.generators: list[TorchGenerator] = []
        self.scorer = ScriptedScorer()
        self.judge: ScriptedScorer | None = None
        self.on_load: Callable[[TorchGenerator], None] = lambda generator: None

    @asynccontextmanager
    async def start(self, settings: Settings, shared_trunk: SharedTrunk | None) -> AsyncIterator[Backend]:
        backend = self

        class Watched(TorchGenerator):
            async def load_adapter(self, path: str) -> str:
                backend.on_load(self)
                return await super().load_adapter(path)

        self.generators.append(Watched(self.policy, settings.adapter))
        yield Backend(self.generators[-1], self.scorer, self.judge)


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
def test_a_run_writes_an_adapter_and_the_metrics_of_every_step(method: str, base: Path, prompts: Path) -> None:
    out = base.parent / "out"
    written = train_rl(prompts, out, settings_of(method, base), QUIET, start=RecordedBackend(base).start)
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
    assert all(0 < reward_s < rollout_s for reward_s, rollout_s in seconds)
    assert not (out / "checkpoints").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written)
    assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert model is not None


def test_with_full_training_the_engine_reloads_all_weights_after_each_step(base: Path, prompts: Path) -> None:
    out, backend = base.parent / "out", RecordedBackend(base)
    written = train_rl(prompts, out, settings_of("ppo", base, full=True, steps=2), QUIET, start=backend.start)
    assert written == out / "model"
    assert len(set(backend.generators[0].versions)) == 3
    assert not torch.equal(
        load_file(base / "model.safetensors")["model.norm.weight"],
        load_file(written / "model.safetensors")["model.norm.weight"],
    )


class PowerCutError(Exception):
    """Stands for anything that kills a run."""


@pytest.mark.parametrize(
    ("method", "cut_at_load", "overlap"),
    [("ppo", 2, False), ("ppo", 4, False), ("reinforce", 4, False), ("ppo", 4, True), ("reinforce", 4, True)],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_run(
    method: str, cut_at_load: int, overlap: bool, base: Path, prompts: Path
) -> None:
    """Equal are weights, optimiser, beta, later samples and weight versions, with a checkpoint every second step.

    With overlap, the batch after the checkpoint was sampled with weights that the checkpoint does not hold.
    """
    settings = settings_of(method, base, steps=5, overlap=overlap)
    options = RunOptions(checkpoint_every=2, progress=False)
    uninterrupted = RecordedBackend(base)
    expected = train_rl(prompts, base.parent / "uninterrupted", settings, options, start=uninterrupted.start)

    def cut(generator: TorchGenerator) -> None:
        if len(generator.versions) == cut_at_load:
            raise PowerCutError

    out, backend = base.parent / "cut", RecordedBackend(base)
    backend.on_load = cut
    with pytest.raises(PowerCutError):
        train_rl(prompts, out, settings, options, start=backend.start)
    backend.on_load = lambda generator: None
    if cut_at_load > 2:
        with pytest.raises(CheckpointError, match="--resume"):
            train_rl(prompts, out, settings, options, start=backend.start)
    resuming = RunOptions(checkpoint_every=2, resume=True, progress=False)
    resumed = train_rl(prompts, out, settings, resuming, start=backend.start)
    weights = "adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (expected / weights).read_bytes()
    for column in ("step", "reward", "kl", "beta", "policy_loss", "entropy", "staleness", "mismatch", "importance"):
        assert logged(out, column) == logged(base.parent / "uninterrupted", column)
    versions = uninterrupted.generators[0].versions
    assert backend.generators[-1].versions == versions[-len(backend.generators[-1].versions) :]
    assert len(backend.generators[-1].versions) == {2: 6, 4: 4}[cut_at_load]


class EventRecorder:
    """Records loads, samples and learning steps in order; a sample with the number of the load of its weights."""

    def __init__(
        self, backend: RecordedBackend, monkeypatch: pytest.MonkeyPatch, *, learn_after_samples: Sequence[int]
    ) -> None:
        """Learning from batch k ends once `learn_after_samples[k]` batches are sampled."""
        recorder = self
        self.events: list[str] = []
        waits = iter(learn_after_samples)

        class RecordedWorker(RolloutWorker):
            async def sample(self, prompts: Any, seeds: Any, version: str | None, scale: ScoreScale) -> RolloutBatch:
                batch = await super().sample(prompts, seeds, version, scale)
                recorder.events.append(f"sample {backend.generators[0].versions.index(str(version))}")
                return batch

        def learning(*arguments: Any) -> dict[str, float]:
            samples = next(waits)
            assert eventually(lambda: sum(event.startswith("sample") for event in recorder.events) >= samples)
            metrics = update(*arguments)
            recorder.events.append("learn")
            return metrics

        monkeypatch.setattr(train, "RolloutWorker", RecordedWorker)
        monkeypatch.setattr(train, "update", learning)
        backend.on_load = lambda generator: recorder.events.append("load")


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_with_overlap_sampling_runs_during_learning_and_the_weights_change_after_both(
    method: str, base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step equals that without overlap; later batches are by the policy before, with importance weights."""
    settings, in_turn, out = settings_of(method, base, steps=3), base.parent / "in turn", base.parent / "out"
    backend = RecordedBackend(base)
    recorder = EventRecorder(backend, monkeypatch, learn_after_samples=(1, 2, 3))
    train_rl(prompts, in_turn, settings, QUIET, validation_data=prompts, start=backend.start)
    steps = [["load", f"sample {step}", "learn"] for step in range(3)]
    assert recorder.events == [*itertools.chain(*steps), "load"]
    backend = RecordedBackend(base)
    recorder = EventRecorder(backend, monkeypatch, learn_after_samples=(2, 3, 3))
    overlapping = replace(settings, overlap=True)
    train_rl(prompts, out, overlapping, QUIET, validation_data=prompts, start=backend.start)
    first, second, third = ["load", "sample 0", "sample 0", "learn"], ["load", "sample 1", "learn"], ["load", "learn"]
    assert recorder.events == [*first, *second, *third, "load"]
    assert (logged(in_turn, "staleness"), logged(out, "staleness")) == ([0, 0, 0], [0, 1, 1])
    for column in ("reward", "policy_loss", "mismatch"):
        assert logged(out, column)[0] == logged(in_turn, column)[0]
    assert max(logged(in_turn, "mismatch")) < 1e-4 < min(logged(out, "mismatch")[1:])
    assert min(abs(weight - 1) for weight in logged(out, "importance")[1:]) > 1e-4
    assert logged(out, "first_ratio_error") == pytest.approx([0.0] * 3, abs=1e-4)


def test_a_failure_of_learning_cancels_the_sampling_of_the_next_batch(
    base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Endless(RolloutWorker):
        async def sample(self, *arguments: Any) -> RolloutBatch:
            if not events:
                events.append("first")
                return await super().sample(*arguments)
            events.append("started")
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value]  # which is never set
            finally:
                events.append("cancelled")

    def diverge(*_: Any) -> dict[str, float]:
        assert eventually(lambda: len(events) == 2)
        raise TrainingError("diverged")

    monkeypatch.setattr(train, "RolloutWorker", Endless)
    monkeypatch.setattr(train, "update", diverge)
    settings = settings_of("ppo", base, overlap=True)
    with pytest.raises(TrainingError, match="diverged"):
        train_rl(prompts, base.parent / "out", settings, QUIET, start=RecordedBackend(base).start)
    assert events == ["first", "started", "cancelled"]


@pytest.mark.parametrize("fault", ["stale", "wrong scale", "stale prefix"])
def test_an_engine_with_other_weights_ends_the_run_with_both_numbers(fault: Fault, base: Path, prompts: Path) -> None:
    backend = RecordedBackend(base)

    def break_third(generator: TorchGenerator) -> None:
        if len(generator.versions) == 2:
            generator.fault = fault

    backend.on_load = break_third
    settings = settings_of("ppo", base)
    with pytest.raises(SyncError, match=r"has -?\d+\.\d{4} nats a token by the engine and -?\d+\.\d{4} by the learner"):
        train_rl(prompts, base.parent / "out", settings, QUIET, start=backend.start)
    assert len(logged(base.parent / "out", "step")) == 1, "the second step ended with the faulty sync"


def row(text: str) -> TokenisedRow:
    return TokenisedRow(PreferenceRow(1, Prompt(text=text), (), (), 1), list(tiny_tokenizer()(text)["input_ids"]), [])


def worker(generator: Any, scorer: ScriptedScorer, **more: Any) -> RolloutWorker:
    return RolloutWorker(
        generator, scorer, **{"samples": 3, "max_tokens": 2, "temperature": 1.0, "truncation_penalty": 0.5} | more
    )


async def test_a_reward_is_scaled_and_the_truncation_penalty_subtracted_if_the_completion_was_cut() -> None:
    """Rewards 4 and 6 on a scale with mean 2 and deviation 2: 1, and 2 - .5."""
    generator = ScriptedGenerator(["a b", "c d e", "a b"])
    scorer = ScriptedScorer({"a b": 4.0, "c d": 6.0})
    batch = await worker(generator, scorer).sample([row("x")], [5], None, ScoreScale(2.0, 2.0))
    assert [(completion.reward, completion.score, completion.is_cut) for completion in batch.completions] == [
        (4.0, 1.0, False),
        (6.0, 1.5, True),
        (4.0, 1.0, False),
    ]
    assert generator.calls[0][1].seed == 5
    assert [completion.drawn_logprobs for completion in batch.completions] == [(-1.0, -1.0)] * 3


async def test_candidates_without_a_reward_are_left_out_and_counted() -> None:
    scorer = ScriptedScorer({"a": 1.0, "b": float("nan")})
    batch = await worker(ScriptedGenerator(["a", "b", None]), scorer).sample([row("x")], [0], None, ScoreScale())
    assert ([completion.text for completion in batch.completions], batch.lost) == (["a"], 2)


async def test_a_step_without_any_reward_ends_the_run_with_the_reason() -> None:
    with pytest.raises(TrainingError, match="none of the 3 completions of a step has a reward: the scripted scorer"):
        await worker(ScriptedGenerator(["a"]), ScriptedScorer(fails=True)).sample([row("x")], [0], None, ScoreScale())


async def test_a_completion_of_other_weights_ends_the_run() -> None:
    with pytest.raises(TrainingError, match="sampled with the weights None, but newest were loaded last"):
        await worker(ScriptedGenerator(["a"]), ScriptedScorer()).sample([row("x")], [0], "newest", ScoreScale())


def test_every_pass_takes_all_prompts_once_in_an_order_of_its_own() -> None:
    rows = [row(str(number)) for number in range(5)]

    def names(step: int) -> list[str]:
        return [str(prompt.row.prompt.text) for prompt in prompts_of_step(rows, step, 3, seed=7)]

    sampled = [name for step in range(5) for name in names(step)]
    passes = [sampled[begin : begin + 5] for begin in (0, 5, 10)]
    assert all(sorted(order) == ["0", "1", "2", "3", "4"] for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert len({*seeds_of_step("step 0", 3, 7), *seeds_of_step("step 1", 3, 7), *seeds_of_step("step 0", 3, 8)}) == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "the fields are text; a line has prompt or messages"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 125}, "does not fit the 128 read; lower --max-tokens"),
        ({"messages": "a"}, "messages is neither a string nor a list of messages"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_reported_with_its_line(line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message) as raised:
        tokenise_prompts(read_prompts(path, None, 0.0).train, path, tiny_tokenizer(), 128, 5)
    assert f"{path}:2: " in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 10}, "10 does not divide into prompts of 4"),
        ({"samples_per_prompt": 1}, "no other to be compared with"),
        ({"temperature": 0.0}, "at temperature 0"),
        ({"kl_target": 0.0}, "a KL target of 0"),
    ],
)
def test_contradictory_settings_are_refused_before_anything_is_loaded(
    fields: dict[str, Any], message: str, prompts: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        train_rl(prompts, prompts.parent / "out", settings_of("reinforce", Path("nowhere"), **fields), QUIET)


def test_rewards_are_scaled_by_the_samples_of_the_reference(base: Path, prompts: Path) -> None:
    """The scale has mean 0 and deviation 1: the scores of the first step are of that order, its rewards are not."""
    backend = RecordedBackend(base)
    settings = settings_of("ppo", base, reward_model="length=movie-sentiment", steps=1)
    train_rl(prompts, base.parent / "out", settings, QUIET, start=backend.start)
    (reward,), (score,), (deviation,) = (
        logged(base.parent / "out", name) for name in ("reward", "score", "reward_deviation")
    )
    assert abs(score) < 1.5 < reward
    assert deviation > 0


def test_rewards_of_a_function_are_not_scaled_and_those_of_a_model_are() -> None:
    assert normalization_of(PPOTraining(reward_model=FUNCTION)) == "none"
    assert normalization_of(PPOTraining()) == "reference"
    assert normalization_of(PPOTraining(reward_normalization="none")) == "none"


def test_the_engine_starts_with_the_learners_adapter_and_precision(base: Path, tmp_path: Path) -> None:
    settings = server_settings(PPOTraining(base_model=str(base)), tmp_path, bfloat16=False)
    assert (settings.model, settings.adapter, settings.dtype) == (str(base), tmp_path, "float32")


def test_the_engine_receives_an_absolute_path_of_the_weights(
    base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []

    class RecordedGenerator(TorchGenerator):
        async def load_adapter(self, path: str) -> str:
            paths.append(path)
            return await super().load_adapter(path)

    @asynccontextmanager
    async def start(settings: Settings, _: SharedTrunk | None) -> AsyncIterator[Backend]:
        paths.append(str(settings.adapter))
        yield Backend(RecordedGenerator(base, settings.adapter), ScriptedScorer())

    monkeypatch.chdir(base.parent)
    train_rl(prompts, Path("out"), settings_of("ppo", base, steps=1), QUIET, start=start)
    assert paths == [str(base.parent / "out" / "checkpoints" / "engine" / "adapter")] * 3


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_the_command_prints_how_to_serve_the_weights(
    method: str, base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def start(
        settings: Settings, *, tempered_logprobs: bool, shared_trunk: SharedTrunk | None
    ) -> AsyncIterator[BestOfN]:
        assert tempered_logprobs
        assert shared_trunk is not None
        assert shared_trunk.is_of(str(base))
        yield BestOfN(TorchGenerator(base, settings.adapter), {"reward": ScriptedScorer()})

    monkeypatch.setattr(factory, "start", start)
    out = base.parent / "out"
    options = {"--prompts": prompts, "--out": out, "--model": base, "--steps": 1, "--batch-size": 4, "--max-tokens": 3}
    options |= {"--kl-coef": 0.1, "--learning-rate": 1e-3, "--reward-normalization": "none", "--seed": 1}
    arguments = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(train_app, [method, *arguments, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert f"nbest serve --model {base} --adapter {out / 'adapter'}" in result.output


def test_a_misspelt_reward_is_reported_in_a_sentence(base: Path, prompts: Path) -> None:
    options = ["--prompts", str(prompts), "--out", str(base.parent / "out"), "--model", str(base)]
    result = CliRunner().invoke(train_app, ["ppo", *options, "--reward-model", "mine=python:reward"])
    assert result.exit_code == 1
    assert "should read python:FILE.py:FUNCTION" in result.output
