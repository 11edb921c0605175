"""SPECs and their scorers: the grammar, several scorers served together, and requests that select one."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.models.reward_model import RewardModel
from reranker.scorers import spec
from reranker.scorers.base import Scorer
from reranker.scorers.judge import JudgeAnswer
from reranker.scorers.registry import ScorerContext, make_scorers
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator
from tests.support.paths import ROOT
from tests.support.serving import HELLO, app_over, client_of
from tests.support.tiny_models import save_tiny_reward_model, tiny_tokenizer

PROMPT = Prompt(messages=(Message("user", "How was the film?"),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("movie-sentiment", spec.RewardModelSpec("movie-sentiment")),
        ("org/reward", spec.RewardModelSpec("org/reward")),
        ("./logprob", spec.RewardModelSpec("./logprob")),
        ("vllm:http://gpu:8001", spec.EndpointSpec("http://gpu:8001", "classify", None)),
        ("vllm:http://gpu:8001/", spec.EndpointSpec("http://gpu:8001", "classify", None)),
        ("vllm:http://gpu:8001/v1/score", spec.EndpointSpec("http://gpu:8001", "score", None)),
        ("vllm:https://gpu/a/pooling#org/rm", spec.EndpointSpec("https://gpu/a", "pooling", "org/rm")),
        ("style:pair:org/reward", spec.RewardModelSpec("org/reward", "pair")),
        ("style:chat:vllm:http://gpu/pooling", spec.EndpointSpec("http://gpu", "pooling", None, "chat")),
        ("judge:self", spec.JudgeSpec("self", pairwise=False)),
        ("judge:org/large:fp8", spec.JudgeSpec("org/large:fp8", pairwise=False)),
        ("pairwise:judge:large", spec.JudgeSpec("large", pairwise=True)),
        ("python:checks/unit.py:passes", spec.FunctionSpec("checks/unit.py", "passes")),
        ("python:checks.unit:passes", spec.FunctionSpec("checks.unit", "passes")),
        ("logprob", spec.LogprobSpec("logprob")),
        ("self_certainty", spec.LogprobSpec("self_certainty")),
        ("ensemble:min:a,b", spec.EnsembleSpec("min", ("a", "b"))),
        ("ensemble:mean-std:0.5:a,b,c", spec.EnsembleSpec("mean-std", ("a", "b", "c"), 0.5)),
        ("cascade:4:a,b", spec.CascadeSpec(4.0, ("a", "b"))),
        ("cascade:0.25:a,b", spec.CascadeSpec(0.25, ("a", "b"))),
    ],
)
def test_a_spec_is_parsed(text: str, expected: object) -> None:
    assert spec.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm:gpu:8001", "needs an address, such as vllm:http://localhost:8001/classify"),
        ("style:pairs:org/reward", "should read style:STYLE:SPEC, with a STYLE of chat, pair, transcript, document"),
        ("style:pair", "should read style:STYLE:SPEC"),
        ("style:pair:judge:large", "should read style:STYLE:SPEC"),
        ("style:pair:vllm:http://gpu/score", "combines prompt and candidate for /score; leave style:pair: out"),
        ("judge:", "needs a model"),
        ("pairwise:large", "should read pairwise:judge:MODEL"),
        ("pairwise:judge:", "should read pairwise:judge:MODEL"),
        ("python:checks.py", "should read python:FILE.py:FUNCTION"),
        ("python::f", "should read python:FILE.py:FUNCTION"),
        ("python:checks/unit:f", "should read python:FILE.py:FUNCTION"),
        ("logprob:sum", "takes nothing after the colon; remove sum"),
        ("ensemble:a,b", "should read ensemble:mean:NAME,NAME"),
        ("ensemble:min:a", "two or more other served scorers"),
        ("ensemble:min:a,a", "two or more other served scorers"),
        ("cascade:a,b", "should read cascade:KEEP:CHEAP,EXPENSIVE"),
        ("cascade:0:a,b", "should read cascade:KEEP:CHEAP,EXPENSIVE"),
        ("cascade:1.5:a,b", "should read cascade:KEEP:CHEAP,EXPENSIVE"),
        ("cascade:4:a,a", "should read cascade:KEEP:CHEAP,EXPENSIVE"),
        ("cascade:4:a,b,c", "should read cascade:KEEP:CHEAP,EXPENSIVE"),
        ("ensemble:mean-std:a,b", "K is 'a,b' and must be a number"),
        ("ensemble:mean-std:-1:a,b", "K is '-1' and must be a number of at least 0"),
    ],
)
def test_a_malformed_spec_is_refused_with_the_right_form(text: str, message: str) -> None:
    with pytest.raises(spec.ScorerSpecError, match=message):
        spec.parse(text)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"a": "logprob", "both": "ensemble:min:a,b"}, "no scorer 'b' is served; add it with --reward-model b=SPEC"),
        (
            {"both": "ensemble:min:a,both", "a": "logprob"},
            "'both' is itself made of other scorers and must come before 'both'",
        ),
        ({"a": "logprob", "x": "judge:"}, "x=judge: needs a model"),
    ],
)
def test_members_must_be_served_and_composite_ones_come_first(specs: dict[str, str], message: str) -> None:
    with pytest.raises(spec.ScorerSpecError, match=message):
        spec.parse_all(specs)


@pytest.mark.parametrize("form", sorted(spec.FORMS))
def test_every_form_is_documented(form: str) -> None:
    assert f"`{form}" in (ROOT / "docs" / "scorers.md").read_text()


@asynccontextmanager
async def made(specs: Mapping[str, str], answer: str = '{"grade": 5}') -> AsyncIterator[dict[str, Scorer]]:
    async def ask(question: Prompt, json_schema: dict[str, Any] | None) -> JudgeAnswer:
        return JudgeAnswer(answer, num_tokens=10)

    async with AsyncExitStack() as stack:
        yield await make_scorers(
            specs, ScorerContext(judge_model=lambda model: ask, device="cpu", reward_dtype="float32"), stack
        )


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, str]:
    """A SPEC of each form that needs no server; the reward model's tokenizer differs from the policy's."""
    (tmp_path / "checks.py").write_text("def short(prompt, completions):\n    return [-len(c) for c in completions]\n")
    tokenizer = tiny_tokenizer(corpus=["a corpus of other words gives other tokens"])
    return {
        "both": "ensemble:min:short,likely",
        "reward": str(save_tiny_reward_model(tmp_path / "reward", tokenizer=tokenizer)),
        "short": f"python:{tmp_path}/checks.py:short",
        "likely": "logprob",
        "sure": "self_certainty",
        "judge": "judge:large",
        "duel": "pairwise:judge:large",
        "all": "ensemble:mean-std:1:both,sure",
        "two": "cascade:2:short,judge",
    }


async def test_several_scorers_are_served_and_a_request_selects_one(specs: dict[str, str]) -> None:
    texts = ["dull", "a delight from start to finish", "so so"]
    async with made(specs) as scorers:
        assert list(scorers) == list(specs)
        served = BestOfN(ScriptedGenerator(texts), scorers)
        names = [*specs, None]
        results = await asyncio.gather(
            *(
                served.run(BestOfNRequest(PROMPT, SamplingParams(), 3, reward_model=name))
                for name in names
                if name != "duel"
            )
        )
    by_name = {result.reward_model: result.selection for result in results}
    assert results[-1].reward_model == "both"  # the default is the first
    rewards = {
        name: {scored.candidate.text: scored.reward for scored in selection.ranking}
        for name, selection in by_name.items()
    }
    assert rewards["short"] == {text: -len(text) for text in texts}
    assert set(rewards["likely"].values()) == {-1.0}  # each word of the double has a log-probability of −1 nat
    assert set(rewards["judge"].values()) == {5.0}
    assert [by_name[name].winner.candidate.text for name in ("short", "both", "all")] == ["dull"] * 3
    model = RewardModel.load(specs["reward"], device="cpu", dtype="float32")
    expected = model.score([model.render(PROMPT, text) for text in texts])
    assert [rewards["reward"][text] for text in texts] == pytest.approx(expected, abs=1e-4)


async def test_a_tournament_can_be_served() -> None:
    async with made({"duel": "pairwise:judge:large"}, answer='{"better": "A"}') as scorers:
        scores = await scorers["duel"].score(PROMPT, [Candidate(i, t, num_tokens=1) for i, t in enumerate("ab")])
    assert scores.rewards_N == (1.0, 0.5)


async def test_http_requests_select_a_scorer_and_the_models_endpoint_lists_them(specs: dict[str, str]) -> None:
    async with (
        made(specs) as scorers,
        client_of(app_over(BestOfN(ScriptedGenerator(["a b", "a"]), scorers))) as client,
    ):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model["reward_models"] == list(specs)
        request = {"prompt": "How was it?", "candidates": ["aa", "a"], "reward_model": "short"}
        reply = (await client.post("/v1/score", json=request)).json()
        assert [item["score"] for item in reply["data"]] == [-2.0, -1.0]
        body = HELLO | {"best_of": 2, "nbest": {"reward_model": "short", "return_candidates": True}}
        reply = (await client.post("/v1/chat/completions", json=body)).json()
        assert reply["choices"][0]["message"]["content"] == "a"
        assert reply["choices"][0]["logprobs"] is None
        unknown = await client.post("/v1/score", json=request | {"candidates": ["a"], "reward_model": "likely"})
        assert unknown.status_code == 503
        assert "log-probabilities are known" in unknown.json()["error"]["message"]


async def test_scorers_are_closed_if_a_later_one_cannot_be_made(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "checks.py").write_text(
        f"import os, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\nf = len"
    )
    with pytest.raises(spec.ScorerSpecError, match="nothing of nowhere cannot be used"):
        async with made({"a": f"python:{tmp_path}/checks.py:f", "b": "python:nowhere:nothing"}):
            pass
    assert not psutil.pid_exists(int(pid_file.read_text()))
