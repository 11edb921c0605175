"""The promises that both modes keep, one process and replicas on Ray, and what is true of replicas alone."""

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
from server.distributed.clients import OutcomeGroup, RemoteGenerator, gone_is
from server.distributed.weights_registry import Loaded, Record
from server.errors import BadRequestError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from server.generation.weight_store import CONFIG, WEIGHTS, version_at
from server.http import api_keys
from tests.support.doubles import ScriptedGenerator
from tests.support.modes import MODES, PATIENCE_S, Server, generator_handle
from tests.support.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module", params=list(MODES))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with MODES[request.param]() as running:
        until_ready(running)
        yield running


def until_ready(server: Server) -> None:
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(transport=transport, base_url=server.url, timeout=PATIENCE_S) as client:
        assert eventually(lambda: client.get("/ready").is_success, PATIENCE_S)


def text_of(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def events(reply: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_the_best_comes_back(server: Server) -> None:
    reply = server.chat("films")
    assert text_of(reply) == "great fun"
    assert reply.json()["choices"][0]["reward"] == 2.5
    account = reply.json()["nbest"]
    assert (account["completed"], account["failed"], account["cancelled"]) == (3, 0, 0)
    assert (account["generated_tokens"], account["scored_tokens"], account["reward_model"]) == (6, 6, "taste")
    assert reply.json()["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


def test_a_failed_candidate_is_counted(server: Server) -> None:
    account = server.chat("one fails").json()["nbest"]
    assert (account["completed"], account["failed"]) == (2, 1)


def test_the_winner_is_streamed(server: Server) -> None:
    reply = server.chat("films", stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "".join(one["choices"][0]["delta"].get("content") or "" for one in events(reply)) == "great fun"
    assert reply.text.rstrip().endswith("data: [DONE]")


def test_tokens_arrive_while_the_rest_is_written(server: Server) -> None:
    body = {"model": "scripted", "prompt": "grows", "best_of": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as reply:
        first = next(line for line in reply.iter_lines() if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "first"
    assert server.witness.hear("cancelled", "grows", 1) == [0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_what_has_not_finished(server: Server, stream: bool) -> None:
    body = {"model": "scripted", "prompt": "endless", "best_of": 3, "stream": stream}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=body))
        assert await asyncio.to_thread(server.witness.hear, "started", "endless", 1) == [3]
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    assert await asyncio.to_thread(server.witness.hear, "cancelled", "endless", 3) == [0, 1, 2]


def test_a_deadline_answers_with_the_best_so_far_and_cancels_the_rest(server: Server) -> None:
    reply = server.chat("slow", nbest={"deadline_s": 4})
    assert text_of(reply) == "dull"
    assert (reply.json()["nbest"]["stopped_by"], reply.json()["nbest"]["cancelled"]) == ("deadline", 2)
    assert server.witness.hear("cancelled", "slow", 2) == [1, 2]


def test_a_deadline_with_nothing_finished_is_a_504(server: Server) -> None:
    reply = server.chat("slow to start", best_of=1, nbest={"deadline_s": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert server.witness.hear("cancelled", "slow to start", 1) == [0]


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
def test_a_generators_refusal_keeps_its_status_and_its_fields(
    server: Server, script: str, status: int, error: dict[str, Any]
) -> None:
    reply = server.chat(script)
    assert (reply.status_code, reply.json()) == (status, {"error": error})
    assert reply.headers.get("retry-after") == {"overloaded": "7", "down": "5"}.get(script)


def test_a_bad_body_is_a_400_that_names_the_field(server: Server) -> None:
    reply = server.chat("films", best_of=0)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "best_of")


def test_an_unknown_path_is_a_404_in_the_same_envelope(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v2/nothing", timeout=PATIENCE_S)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_a_reward_failure_is_an_error_by_default(server: Server) -> None:
    reply = server.chat("films", nbest={"reward_model": "broken"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "reward_failed")
    assert "the scripted scorer fails" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("policy", "text"), [("first", "dull"), ("logprob", "dull")])
def test_a_reward_failure_falls_back_as_asked_and_says_so(server: Server, policy: str, text: str) -> None:
    reply = server.chat("films", nbest={"reward_model": "broken", "on_reward_failure": policy})
    assert (text_of(reply), reply.json()["nbest"]["ranked_by"]) == (text, policy)


def test_given_candidates_are_scored(server: Server) -> None:
    body = {"prompt": "x", "candidates": ["dull", "great fun"]}
    reply = httpx.post(f"{server.url}/v1/score", json=body, timeout=PATIENCE_S)
    assert [one["score"] for one in reply.json()["data"]] == [-2.0, 2.5]


def test_what_is_served_is_told(server: Server) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert (model["id"], model["reward_models"]) == ("scripted", ["taste", "broken", "dying"])


on_ray_alone = pytest.mark.parametrize("server", ["on Ray"], indirect=True)


@on_ray_alone
async def test_one_candidate_is_cancelled_in_the_replica_that_has_it(server: Server) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    async with generator.generate(Prompt(text="slow"), SamplingParams(), 3) as generation:
        await generation.cancel(2)
        assert server.witness.hear("cancelled", "slow", 1) == [2]
    assert server.witness.hear("cancelled", "slow", 1) == [1]


@on_ray_alone
async def test_growth_travels_in_groups(server: Server) -> None:
    """500 tokens come in far fewer messages, of which each tells the whole text so far."""
    generator = await RemoteGenerator.connect(generator_handle())
    async with generator.generate(Prompt(text="chatters"), SamplingParams(), 1, stream_partial=True) as generation:
        groups = [group async for group in generation]
    assert len(groups) < 250
    (last,) = groups[-1]
    assert isinstance(last, Candidate)
    assert (last.num_tokens, last.finish_reason) == (500, "stop")


@on_ray_alone
def test_one_scrape_tells_of_all_replicas(server: Server) -> None:
    def counted() -> dict[str, float]:
        exposition = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
        pattern = r'^nbest_requests_total{endpoint="/v1/score",replica="(router-\w+)",status="400"} (\S+)'
        return {replica: float(count) for replica, count in re.findall(pattern, exposition, re.MULTILINE)}

    for _ in range(20):  # Serve spreads them over both routers
        httpx.post(f"{server.url}/v1/score", json={}, timeout=PATIENCE_S)
    assert sum(counted().values()) == 20
    assert len(counted()) == 2


@on_ray_alone
def test_a_second_application_of_the_name_is_refused(server: Server) -> None:
    settings = Settings(ray=True)
    with (
        pytest.raises(ConfigError, match="already serves an application named nbest"),
        deployments.deployed(deployments.application(settings), settings, 0),
    ):
        pass
    assert text_of(server.chat("films")) == "great fun"


@on_ray_alone
def test_a_request_that_kills_two_generator_replicas_is_told_to_come_back(server: Server) -> None:
    reply = server.chat("dies")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert reply.headers["retry-after"] == "5"
    until_ready(server)
    assert text_of(server.chat("films")) == "great fun"


@on_ray_alone
def test_candidates_that_kill_two_scorer_replicas_are_a_reward_failure(server: Server) -> None:
    reply = server.chat("films", nbest={"reward_model": "dying", "on_reward_failure": "first"})
    assert (text_of(reply), reply.json()["nbest"]["ranked_by"]) == ("dull", "first")
    until_ready(server)
    assert text_of(server.chat("films")) == "great fun"


def adapter_files(path: Path, content: str) -> str:
    """A directory with the files of an adapter; what is in them matters to nobody here."""
    path.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (path / name).write_text(content)
    return str(path)


@on_ray_alone
async def test_an_adapter_is_loaded_by_every_replica_once(server: Server, tmp_path: Path) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    path = adapter_files(tmp_path / "v1", "one")
    version = await generator.load_adapter(path)
    assert version == version_at("load_adapter", Path(path))
    assert server.witness.hear("loaded", path, 2) == [0, 0]


@on_ray_alone
async def test_a_refusal_of_an_adapter_comes_from_the_replica(server: Server, tmp_path: Path) -> None:
    generator = await RemoteGenerator.connect(generator_handle())
    with pytest.raises(BadRequestError, match="does not fit"):
        await generator.load_adapter(adapter_files(tmp_path / "unfit", "x"))
    with pytest.raises(BadRequestError, match="cannot be read"):
        await generator.load_adapter(str(tmp_path / "nowhere"))


class DictRecord:
    """`WeightsRecord` in this process."""

    def __init__(self, record: Record | None = None) -> None:
        self.record = record or {}

    def read(self) -> Record:
        return dict(self.record)

    def write(self, record: Record) -> None:
        self.record = record


class UnservedReplica(deployments.GeneratorReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the other one; here it would be a coroutine that nobody awaits."""


async def replica_of(generator: ScriptedGenerator, record: DictRecord | None = None) -> deployments.GeneratorReplica:
    """The replica's class as Serve makes it, without Serve."""

    @asynccontextmanager
    async def start(_: Settings) -> AsyncIterator[ScriptedGenerator]:
        yield generator

    replica = object.__new__(UnservedReplica)
    await replica.__init__(Settings(), start, record or DictRecord())  # type: ignore[misc]
    return replica


async def test_serve_hears_of_an_engine_that_has_died() -> None:
    generator = ScriptedGenerator(["a"])
    replica = await replica_of(generator)
    await replica.check_health()
    generator.ready = False
    with pytest.raises(NotReadyError):
        await replica.check_health()


async def test_a_replica_that_comes_later_loads_what_the_others_serve() -> None:
    generator = ScriptedGenerator(["a"])
    await replica_of(generator, DictRecord({"load_adapter": Loaded("/shared/v2", "version-1")}))
    assert generator.adapters == ["/shared/v2"]


async def test_a_replica_that_missed_a_change_makes_up_for_it_at_the_next_health_check() -> None:
    generator, record = ScriptedGenerator(["a"]), DictRecord()
    replica = await replica_of(generator, record)
    await replica.check_health()
    assert generator.adapters == []
    before = await replica.record_change("load_adapter", Loaded("/shared/v1", "version-1"))
    for _ in range(2):
        await replica.check_health()
    assert generator.adapters == ["/shared/v1"]
    assert before == {}


async def test_an_adapter_that_changed_under_a_new_replica_is_not_loaded_again_and_again() -> None:
    generator = ScriptedGenerator(["a"])
    replica = await replica_of(generator, DictRecord({"load_adapter": Loaded("/shared/v1", "as it was")}))
    await replica.check_health()
    assert generator.adapters == ["/shared/v1"]


async def test_the_first_group_is_empty_and_tells_that_generation_has_started() -> None:
    replica = await replica_of(ScriptedGenerator(["a"]))
    groups = [one async for one in replica.generate("id", Prompt(text="x"), SamplingParams(), 1, False)]
    assert isinstance(groups[0], OutcomeGroup)
    assert (groups[0].outcomes, groups[0].prompt_tokens) == ([], 7)


def test_only_the_last_look_at_a_growing_candidate_is_told() -> None:
    looks: list[Outcome] = [Candidate(0, "a", 1), FailedCandidate(1, "x"), Candidate(0, "a b", 2), Candidate(2, "c", 1)]
    assert deployments.latest(looks) == [FailedCandidate(1, "x"), Candidate(0, "a b", 2), Candidate(2, "c", 1)]


def test_a_split_engine_reserves_a_bundle_for_itself_and_one_for_each_device() -> None:
    settings = Settings(ray=True, tensor_parallel_size=2, generator_cpus=3, generator_gpus=1)
    assert deployments.generator_resources(settings) == {
        "ray_actor_options": {"num_cpus": 3, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": 3}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}],
    }


def test_of_a_failed_start_the_error_is_told_and_no_traceback() -> None:
    told = """The deployment failed to start 1 times in a row. Error:
ray::ServeReplica:nbest:generator.initialize_and_get_metadata() (pid=1)
  File "replica.py", line 9, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "engine.py", line 3, in create
server.errors.NotReadyError: There is no model in /x; correct --model.
"""
    waiting = {"scorer": "Waiting for 1 replicas.", "generator": told}
    assert deployments.reason_of_failed_start(waiting) == "generator: There is no model in /x; correct --model."
    assert deployments.reason_of_failed_start({"scorer": "Waiting for 1 replicas."}) is None


def test_budgets_that_several_routers_would_each_grant_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    api_keys.new_key(file, "alice")
    deployments.application(Settings(ray=True, router_replicas="1-2", keys_file=file))
    api_keys.new_key(file, "bob", tokens_per_day=1000)
    deployments.application(Settings(ray=True, keys_file=file))
    with pytest.raises(ConfigError, match=r"The key bob .* each of 2 routers would grant it in full; set --router"):
        deployments.application(Settings(ray=True, router_replicas="1-2", keys_file=file))


def test_all_replicas_together_reserve_what_they_need_at_most() -> None:
    """Up to three engines of 2 + 2 shards, two scorers of half a core; routers only wait."""
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


def test_a_bug_in_a_replica_is_not_told_as_its_absence() -> None:
    bug = RayTaskError("generate", "a traceback", ValueError("a bug"))
    with pytest.raises(RayTaskError), gone_is(NotReadyError("gone")):
        raise bug
    with pytest.raises(NotReadyError, match="gone"), gone_is(NotReadyError("gone")):
        raise ActorUnavailableError("it does not answer", None)


@on_ray_alone
def test_a_reply_has_one_request_id_and_it_is_the_clients(server: Server) -> None:
    reply = httpx.get(f"{server.url}/ready", headers={"X-Request-ID": "mine"}, timeout=PATIENCE_S)
    assert reply.headers.get_list("x-request-id") == ["mine"]
