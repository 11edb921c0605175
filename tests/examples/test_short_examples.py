"""The short examples run with real scorers, tiny models and the real commands; only the vLLM engine is replaced."""

import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples import best_of_n_in_process, custom_scorer, llm_judge, rerank_candidates, teach_best_of_n
from reranker.candidate import Prompt
from server import factory
from server.cli import app
from server.config import Settings
from server.generation.base import Generator, SamplingParams
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator
from tests.support.offline_runs import SeededGenerator, scripted
from tests.support.paths import ROOT
from tests.support.tiny_models import save_tiny_policy, save_tiny_reward_model
from tests.support.torch_generator import TorchGenerator
from training.policy import rejection_sampling

EXAMPLES = ("best_of_n_in_process", "custom_scorer", "rerank_candidates", "llm_judge", "teach_best_of_n")


def replace_engine(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """Makes `factory.start` use this generator instead of a vLLM engine; the scorers stay real."""

    @asynccontextmanager
    async def started_generator(*_: Any, **__: Any) -> AsyncIterator[Generator]:
        yield generator

    monkeypatch.setattr(factory, "started_generator", started_generator)


async def test_best_of_n_in_process_ranks_samples_by_a_reward_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_engine(monkeypatch, TorchGenerator(save_tiny_policy(tmp_path / "policy")))
    settings = Settings(reward_models={"tiny": str(save_tiny_reward_model(tmp_path / "reward"))}, device="cpu")
    result = await best_of_n_in_process.answer(settings, "The film was", best_of=3, max_tokens=5)
    rewards = [scored.reward for scored in result.selection.ranking]
    assert len(rewards) == 3
    assert rewards == sorted(rewards, reverse=True)
    *candidates, cost = best_of_n_in_process.report(result).splitlines()
    assert candidates[0] == f"{rewards[0]:7.2f}  {result.selection.winner.candidate.text!r}"
    assert cost.startswith(f"{result.generated_tokens} tokens generated, ")


async def test_custom_scorer_selects_the_candidate_with_the_most_requested_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["a dull story", "an actor sings the music of the story", "nothing of the kind"]
    replace_engine(monkeypatch, ScriptedGenerator(texts))
    result = await custom_scorer.answer(custom_scorer.SETTINGS, best_of=3)
    assert [(scored.candidate.index, scored.reward) for scored in result.selection.ranking] == [
        (1, pytest.approx(1.0)),
        (0, pytest.approx(1 / 3)),
        (2, 0.0),
    ]


async def test_rerank_candidates_orders_existing_texts_by_a_reward_model(tmp_path: Path) -> None:
    settings = Settings(reward_models={"tiny": str(save_tiny_reward_model(tmp_path / "reward"))}, device="cpu")
    ranking = await rerank_candidates.rerank(settings, rerank_candidates.PROMPT, rerank_candidates.CANDIDATES)
    assert {scored.candidate.text for scored in ranking} == set(rerank_candidates.CANDIDATES)
    rewards = [scored.reward for scored in ranking]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == len(rewards)


class GradingGenerator(ScriptedGenerator):
    """Samples two answers; as the judge, whose requests have a JSON schema, it grades the second answer higher."""

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        if sampling.json_schema is None:
            return super().generate(prompt, sampling, n, stream_partial=stream_partial)
        grade = 9 if "reviews and your mood" in prompt.messages[-1].content else 3
        judge = ScriptedGenerator([json.dumps({"grade": grade})])
        return judge.generate(prompt, sampling, n, stream_partial=stream_partial)


async def test_llm_judge_selects_the_candidate_with_the_highest_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_engine(monkeypatch, GradingGenerator(["No idea.", "Look at reviews and your mood."]))
    result = await llm_judge.answer(llm_judge.SETTINGS, llm_judge.QUESTION, best_of=2)
    assert result.selection.winner.candidate.text == "Look at reviews and your mood."
    assert [scored.reward for scored in result.selection.ranking] == [9.0, 3.0]


def in_process(arguments: Sequence[str], **_: Any) -> None:
    """Runs an `nbest` command in this process with a scripted engine."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def test_teach_best_of_n_trains_on_the_winners_and_reports_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nbest improve` and the commands that it runs are the real ones, on a tiny policy that is really trained."""

    @contextmanager
    def locked_commands(_: Path) -> Iterator[Any]:
        yield in_process

    monkeypatch.setattr(rejection_sampling, "locked_commands", locked_commands)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: in_process(command[1:]))
    policy = save_tiny_policy(tmp_path / "policy")
    options = ("--model", str(policy), "--reward-model", "length=logprob", "--best-of", "2", "--max-tokens", "8")
    with scripted(SeededGenerator()):
        rewards = teach_best_of_n.teach(
            tmp_path / "out", *options, "--rounds", "1", "--batch-size", "4", prompts=4, held_out=2
        )
    assert len(rewards) == 2
    assert (tmp_path / "out" / "run" / "round-1" / "sft" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 50
    assert f"python -m examples.{name}" in source
    assert f"[{name}.py]({name}.py)" in (ROOT / "examples" / "README.md").read_text()
