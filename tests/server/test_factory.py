"""Building the pipeline from the settings; the generator is an upstream server, so no engine starts."""

import json
from pathlib import Path

import pytest

from reranker.candidate import Message, Prompt
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import address_of, app_over, pipeline

PROMPT = Prompt(messages=(Message("user", "Capital of France?"),))


@pytest.fixture
def check(tmp_path: Path) -> str:
    (tmp_path / "check.py").write_text("def short(prompt, completions):\n    return [-len(c) for c in completions]\n")
    return f"python:{tmp_path}/check.py:short"


async def test_an_upstream_policy_an_upstream_judge_and_a_local_function_are_served_together(check: str) -> None:
    """Two scripted servers act as the upstream servers of the policy and of the judge."""
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
                assert [scored.reward for scored in result.selection.ranking] == rewards


async def test_the_served_policy_can_be_the_judge() -> None:
    policy = app_over(pipeline(ScriptedGenerator(['{"grade":3}'])))
    async with address_of(policy) as url:
        settings = Settings(
            model="scripted", generator="openai", base_url=f"{url}/v1", reward_models={"own": "judge:self"}
        )
        async with factory.start(settings) as served:
            result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 1))
    assert result.selection.winner.reward == 3.0
