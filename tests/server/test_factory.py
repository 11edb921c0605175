"""A server put together from its settings, with an upstream generator so that no engine starts."""

import json
from pathlib import Path

import pytest

from reranker.candidate import Message, Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfNRequest
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import address_of, app_over, pipeline

PROMPT = Prompt(messages=(Message("user", "Capital of France?"),))


@pytest.fixture
def check(tmp_path: Path) -> str:
    (tmp_path / "check.py").write_text("def short(prompt, completions):\n    return [-len(c) for c in completions]\n")
    return f"python:{tmp_path}/check.py:short"


async def test_policy_and_judge_elsewhere_and_a_function_here(check: str) -> None:
    """Two servers of ours stand for the policy's and the judge's; both answer by their script."""
    policy = app_over(pipeline(ScriptedGenerator(["Paris it is", "Paris"])), default_best_of=2)
    judge = app_over(pipeline(ScriptedGenerator([json.dumps({"grade": 7})])))
    async with address_of(policy) as policy_url, address_of(judge) as judge_url:
        settings = Settings(
            model="scripted",
            generator="openai",
            base_url=f"{policy_url}/v1",
            judge_base_url=f"{judge_url}/v1",
            reward_models={"short": check, "judge": "judge:scripted", "both": "ensemble:mean:short,judge"},
        )
        async with factory.start(settings) as served:
            assert list(served.scorers) == ["short", "judge", "both"]
            for name, rewards in {"short": [-5.0, -11.0], "judge": [7.0, 7.0], "both": [0.5, -0.5]}.items():
                result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 2, reward_model=name))
                assert [one.reward for one in result.selection.ranking] == rewards


async def test_the_served_policy_judges_itself() -> None:
    policy = app_over(pipeline(ScriptedGenerator(['{"grade":3}'])))
    async with address_of(policy) as url:
        settings = Settings(
            model="scripted", generator="openai", base_url=f"{url}/v1", reward_models={"own": "judge:self"}
        )
        async with factory.start(settings) as served:
            result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 1))
    assert result.selection.winner.reward == 3.0
