"""What a server does in both modes, in one process and on Ray, and what replicas on Ray do in addition."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from reranker.candidate import Candidate, FailedCandidate, Prompt
from server.config import ConfigError, Settings
from server.distributed import deployments
from server.distributed.clients import OutcomeGroup, RemoteGenerator, replica_death_as
from server.distributed.weights_registry import LoadedWeights, ServedWeights
from server.errors import BadRequestError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from server.generation.weight_store import CONFIG, WEIGHTS, version_at
from server.http import api_keys
from tests.support.doubles import ScriptedGenerator
from tests.support.scripted_servers import MODES, TIMEOUT_S, Server, generator_handle
from tests.support.waiting import eventually

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # warnings of Ray


@pytest.fixture(scope="module", params=list(MODES))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with MODES[request.param]() as server:
        until_ready(server)
        yield server


def until_ready(server: Server) -> None:
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(transport=transport, base_url=server.url, timeout=TIMEOUT_S) as client:
        assert eventually(lambda: client.get("/ready").is_success, TIMEOUT_S)


def text_of(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def events(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_the_winner_is_returned(server: Server) -> None:
    reply = server.chat("films")
    assert text_of(reply) == "great fun"
    assert reply.json()["choices"][0]["reward"] == 2.5
    nbest = reply.json()["nbest"]
    assert (nbest["completed"], nbest["failed"], nbest["cancelled"]) == (3, 0, 0)
    assert (nbest["generated_tokens"], nbest["scored_tokens"], nbest["reward_model"]) == (6, 6, "taste")
    assert reply.json()["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


def test_a_failed_candidate_is_counted(server: Server) -> None:
    nbest = server.chat("one fails").json()["nbest"]
    assert (nbest["completed"], nbest["failed"]) == (2, 1)


def test_the_winner_is_streamed(server: Server) -> None:
    reply = server.chat("films", stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events(reply)) == "great fun"
    assert reply.text.rstrip().endswith("data: [DONE]")


def test_tokens_arrive_while_later_ones_are_sampled(server: Server) -> None:
    body = {"model": "scripted", "prompt": "partial text", "best_of": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S) as reply:
        first = next(line for line in reply.iter_lines() if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "first"
    assert server.events.wait_for("cancelled", "partial text", 1) == [0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_cancels_unfinished_candidates(server: Server, stream: bool) -> None:
    body = {"model": "scripted", "prompt": "endless", "best_of": 3, "stream": stream}
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=body))
        assert await asyncio.to_thread(server.events.wait_for, "started", "endless", 1) == [3]
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    assert await asyncio.to_thread(server.events.wait_for, "cancelled", "endless", 3) == [0, 1, 2]


def test_a_deadline_answers_with_the_best_so_far_and_cancels_the_rest(server: Server) -> None:
    reply = server.chat("slow", nbest={"deadline_s": 4})
    assert text_of(reply) == "dull"
    assert (reply.json()["nbest"]["stopped_by"], reply.json()["nbest"]["cancelled"]) == ("deadline", 2)
    assert server.events.wait_for("cancelled", "slow", 2) == [1, 2]


def test_a_deadline_with_nothing_finished_is_a_504(server: Server) -> None:
    reply = server.chat("slow to start", best_of=1, nbest={"deadline_s": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert server.events.wait_for("cancelled", "slow to start", 1) == [0]


@pytest.mark.parametrize(
    ("script", "status", "error"),
    [
        ("refused", 400, {"type": "invalid_request_error", "message": "No.", "param": "messages", "code": None}),
        (
            "too long",
            400,
            {
                "type": "invalid_request_error",
                "message": "Too long.",
                "param": "messages",
                "code": "context_length_exceeded",
            },
        ),
        ("overloaded", 429, {"type": "rate_limit_error", "message": "Full.", "param": None, "code": "overloaded"}),
        ("down", 503, {"type": "service_unavailable", "message": "Gone.", "param": None, "code": "not_ready"}),
    ],
)
def test_an_error_of_the_generator_keeps_its_status_and_its_fields(
    server: Server, script: str, status: int, error: dict[str, Any]
) -> None:
    reply = server.chat(script)
    assert (reply.status_code, reply.json()) == (status, {"error": error})
    assert reply.headers.get("retry-after") == {"overloaded": "7", "down": "5"}.get(script)


def test_a_bad_body_is_a_400_that_names_the_field(server: Server) -> None:
    reply = server.chat("films", best_of=0)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "best_of")


def test_an_unknown_path_is_a_404_in_openais_envelope(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v2/nothing", timeout=TIMEOUT_S)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_a_reward_failure_is_an_error_by_default(server: Server) -> None:
    reply = server.chat("films", nbest={"reward_model": "broken"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "reward_failed")
    assert "the scripted scorer fails" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("policy", "text"), [("first", "dull"), ("logprob", "dull")])
def test_a_reward_failure_falls_back_as_requested_and_is_labelled(server: Server, policy: str, text: str) -> None:
    reply = server.chat("films", nbest={"reward_model": "broken", "on_reward_failure": policy})
    assert (text_of(reply), reply.json()["nbest"]["ranked_by"]) == (text, policy)


def test_a_prompt_that_the_reward_model_cannot_read_is_a_400_before_anything_is_drawn(server: Server) -> None:
    reply = server.chat("unreadable", nbest={"reward_model": "refusing"})  # there is no such script to draw from
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    assert "no system role" in reply.json()["error"]["message"]


def test_given_candidates_are_scored(server: Server) -> None:
    body = {"prompt": "x", "candidates": ["dull", "great fun"]}
    reply = httpx.post(f"{server.url}/v1/score", json=body, timeout=TIMEOUT_S)
    assert [score["score"] for score in reply.json()["data"]] == [-2.0, 2.5]


def test_the_models_endpoint_lists_policy_and_reward_models(server: Server) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
    assert (model["id"], model["reward_models"]) == ("scripted", ["taste", "broken", "refusing", "crashing"])


only_on_ray = pytest.mark.parametrize("server", ["on Ray"], indirect=True)


@only_on_ray
async def test_one_candidate_is_cancelled_in_the_replica_that_has_it(server: Server) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    async with generator.generate(Prompt(text="slow"), SamplingParams(), 3) as generation:
        await generation.cancel(2)
        assert server.events.wait_for("cancelled", "slow", 1) == [2]
    assert server.events.wait_for("cancelled", "slow", 1) == [1]


@only_on_ray
async def test_partial_candidates_arrive_in_groups(server: Server) -> None:
    """500 tokens need far fewer messages, each with the whole text so far."""
    generator = await RemoteGenerator.connect(generator_handle())
    async with generator.generate(Prompt(text="many tokens"), SamplingParams(), 1, stream_partial=True) as generation:
        groups = [group async for group in generation]
    assert len(groups) < 250
    (last,) = groups[-1]
    assert isinstance(last, Candidate)
    assert (last.num_tokens, last.finish_reason) == (500, "stop")


@only_on_ray
def test_one_scrape_has_the_metrics_of_all_replicas(server: Server) -> None:
    def counts_by_replica() -> dict[str, float]:
        exposition = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
        pattern = r'^nbest_requests_total{endpoint="/v1/score",replica="(router-\w+)",status="400"} (\S+)'
        return {replica: float(count) for replica, count in re.findall(pattern, exposition, re.MULTILINE)}

    for _ in range(20):  # Serve distributes them over both routers
        httpx.post(f"{server.url}/v1/score", json={}, timeout=TIMEOUT_S)
    assert sum(counts_by_replica().values()) == 20
    assert len(counts_by_replica()) == 2


@only_on_ray
def test_a_second_application_of_the_name_is_refused(server: Server) -> None:
    settings = Settings(ray=True)
    with (
        pytest.raises(ConfigError, match="already serves an application named nbest"),
        deployments.deployed(deployments.application(settings), settings, 0),
    ):
        pass
    assert text_of(server.chat("films")) == "great fun"


@only_on_ray
def test_a_request_that_crashes_two_generator_replicas_is_a_503_with_retry_after(server: Server) -> None:
    reply = server.chat("crashes")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert reply.headers["retry-after"] == "5"
    until_ready(server)
    assert text_of(server.chat("films")) == "great fun"


@only_on_ray
def test_candidates_that_crash_two_scorer_replicas_are_a_reward_failure(server: Server) -> None:
    reply = server.chat("films", nbest={"reward_model": "crashing", "on_reward_failure": "first"})
    assert (text_of(reply), reply.json()["nbest"]["ranked_by"]) == ("dull", "first")
    until_ready(server)
    assert text_of(server.chat("films")) == "great fun"


def adapter_files(path: Path, content: str) -> str:
    """Writes a directory with the two files of an adapter; the replicas of this test do not read the content."""
    path.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (path / name).write_text(content)
    return str(path)


@only_on_ray
async def test_an_adapter_is_loaded_by_every_replica_once(server: Server, tmp_path: Path) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    path = adapter_files(tmp_path / "v1", "one")
    version = await generator.load_adapter(path)
    assert version == version_at("load_adapter", Path(path))
    assert server.events.wait_for("loaded", path, 2) == [0, 0]


@only_on_ray
async def test_the_replicas_refusal_of_an_adapter_reaches_the_caller(server: Server, tmp_path: Path) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    with pytest.raises(BadRequestError, match="does not fit"):
        await generator.load_adapter(adapter_files(tmp_path / "misfit", "x"))
    with pytest.raises(BadRequestError, match="cannot be read"):
        await generator.load_adapter(str(tmp_path / "nowhere"))


class DictRegistry:
    """A `WeightsRegistry` in this process."""

    def __init__(self, served: ServedWeights | None = None) -> None:
        self.served = served or {}

    def read(self) -> ServedWeights:
        return dict(self.served)

    def write(self, served: ServedWeights) -> None:
        self.served = served


class ReplicaWithoutServe(deployments.GeneratorReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Replaces an async `__del__`, which Serve awaits and Python does not."""


async def replica_of(
    generator: ScriptedGenerator, registry: DictRegistry | None = None
) -> deployments.GeneratorReplica:
    """A replica that is constructed as Serve does it, without Serve."""

    @asynccontextmanager
    async def start(_: Settings) -> AsyncIterator[ScriptedGenerator]:
        yield generator

    replica = object.__new__(ReplicaWithoutServe)
    await replica.__init__(Settings(), start, registry or DictRegistry())  # type: ignore[misc]
    return replica


async def test_the_health_check_fails_when_the_engine_has_died() -> None:
    generator = ScriptedGenerator(["a"])
    replica = await replica_of(generator)
    await replica.check_health()
    generator.ready = False
    with pytest.raises(NotReadyError):
        await replica.check_health()


async def test_a_new_replica_loads_the_registered_weights() -> None:
    generator = ScriptedGenerator(["a"])
    await replica_of(generator, DictRegistry({"load_adapter": LoadedWeights("/shared/v2", "version-1")}))
    assert generator.adapters == ["/shared/v2"]


async def test_a_replica_that_missed_a_change_loads_it_at_the_next_health_check() -> None:
    generator, registry = ScriptedGenerator(["a"]), DictRegistry()
    replica = await replica_of(generator, registry)
    await replica.check_health()
    assert generator.adapters == []
    previous = await replica.register_weights("load_adapter", LoadedWeights("/shared/v1", "version-1"))
    for _ in range(2):
        await replica.check_health()
    assert generator.adapters == ["/shared/v1"]
    assert previous == {}


async def test_an_adapter_that_was_overwritten_since_is_loaded_only_once() -> None:
    generator = ScriptedGenerator(["a"])
    replica = await replica_of(
        generator, DictRegistry({"load_adapter": LoadedWeights("/shared/v1", "another version")})
    )
    await replica.check_health()
    assert generator.adapters == ["/shared/v1"]


async def test_the_first_group_is_empty_and_means_that_the_generation_has_started() -> None:
    replica = await replica_of(ScriptedGenerator(["a"]))
    groups = [group async for group in replica.generate("id", Prompt(text="x"), SamplingParams(), 1, False)]
    assert isinstance(groups[0], OutcomeGroup)
    assert (groups[0].outcomes, groups[0].prompt_tokens) == ([], 7)


def test_only_the_latest_outcome_of_each_candidate_is_sent() -> None:
    failed, other = FailedCandidate(1, "x"), Candidate(2, "c", 1)
    outcomes: list[Outcome] = [Candidate(0, "a", 1), failed, Candidate(0, "a b", 2), other]
    assert deployments.latest_outcomes(outcomes) == [failed, Candidate(0, "a b", 2), other]


def test_a_tensor_parallel_engine_reserves_a_bundle_for_the_replica_and_one_per_device() -> None:
    settings = Settings(ray=True, tensor_parallel_size=2, generator_cpus=3, generator_gpus=1)
    assert deployments.generator_resources(settings) == {
        "ray_actor_options": {"num_cpus": 3, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": 3}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}],
    }


def test_a_failed_start_is_reported_by_its_error_without_the_traceback() -> None:
    message = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:nbest:generator.initialize_and_get_metadata() (pid=1)
  File "replica.py", line 9, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "engine.py", line 3, in create
server.errors.NotReadyError: There is no model in /x; correct --model.
"""
    messages = {"scorer": "Waiting for 1 replicas.", "generator": message}
    assert deployments.reason_of_failed_start(messages) == "generator: There is no model in /x; correct --model."
    assert deployments.reason_of_failed_start({"scorer": "Waiting for 1 replicas."}) is None


def test_budgets_are_refused_with_several_routers(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    api_keys.new_key(path, "alice")
    deployments.application(Settings(ray=True, router_replicas="1-2", keys_file=path))
    api_keys.new_key(path, "bob", tokens_per_day=1000)
    deployments.application(Settings(ray=True, keys_file=path))
    with pytest.raises(ConfigError, match=r"The key bob .* each of 2 routers would grant it in full; set --router"):
        deployments.application(Settings(ray=True, router_replicas="1-2", keys_file=path))


def test_the_reserved_cpus_are_those_of_the_largest_number_of_replicas() -> None:
    """Up to three engines of 2 cores and 2 shards, two scorers of half a core; routers reserve none."""
    settings = Settings(
        ray=True,
        tensor_parallel_size=2,
        generator_replicas="1-3",
        generator_cpus=2,
        scorer_replicas="2",
        scorer_cpus=0.5,
        router_replicas="9",
    )
    assert deployments.reserved_cpus(settings) == 3 * (2 + 2) + 2 * 0.5


def test_a_bug_in_a_replica_is_not_reported_as_its_death() -> None:
    bug = RayTaskError("generate", "a traceback", ValueError("a bug"))
    with pytest.raises(RayTaskError), replica_death_as(NotReadyError("gone")):
        raise bug
    with pytest.raises(NotReadyError, match="gone"), replica_death_as(NotReadyError("gone")):
        raise ActorUnavailableError("it does not answer", None)


@only_on_ray
def test_a_reply_has_a_single_request_id_which_is_the_clients(server: Server) -> None:
    reply = httpx.get(f"{server.url}/ready", headers={"X-Request-ID": "mine"}, timeout=TIMEOUT_S)
    assert reply.headers.get_list("x-request-id") == ["mine"]
