"""The three deployments of nbest on Ray Serve: generator, scorer and router.

    client -> Serve's proxy -> router (the HTTP application) -> generator (an engine)
                                                             -> scorer (all scorers; a judge asks the generator)

Each replica builds the same plain class that a server of one process uses, and forwards its methods;
`server.distributed.clients` is the other end of each call. The plain classes do all batching and cancelling, so both
modes batch and cancel in the same way.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError, UnscorableError
from reranker.scorers.spec import OWN_POLICY
from server import factory
from server.app import create_app
from server.config import ConfigError, Settings, load_settings, replica_range
from server.distributed.clients import OutcomeGroup, RemoteGenerator, connect_scorers
from server.distributed.failover import FailoverGenerator, ReplicatedBestOfN
from server.distributed.weights_registry import LoadedWeights, RayWeightsRegistry, ServedWeights, WeightsRegistry
from server.errors import NbestError, NotReadyError
from server.generation.base import Generation, Generator, Outcome, SamplingParams
from server.generation.weight_store import WeightChange, version_at
from server.http.api_keys import read_keys
from server.http.request_log import without_request_id
from server.launch import StartError, tracing_of
from server.observability import logs
from server.observability.metrics import Metrics, merge_expositions
from server.pipeline.best_of_n import BestOfN

APP_NAME = "nbest"
GENERATOR, SCORER, ROUTER = "generator", "scorer", "router"
SNAPSHOT_INTERVAL_S = 0.02
"""Shortest time between two messages with partial candidates, however many tokens were sampled in between."""
MAX_ONGOING_REQUESTS = 4096
"""More calls than the router ever admits: the router limits the load, because it can give the client a reason."""
ROUTER_ONGOING_REQUESTS = 100
"""Target number of connections per router replica, when the number of replicas follows the load."""
SCORER_ONGOING_CALLS = 16
"""Target number of calls per scorer replica: one half is being scored, the other waits for the next batch."""
HEALTH_CHECK_PERIOD_S = 2
"""Serve replaces a replica after three failed checks in a row."""
DRAIN_POLL_S = 0.5
CLOSING_S = 5
"""Longest time for a replica to free its models after the last request."""
ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*: (.+)", re.MULTILINE)
"""The last line of a traceback; the group is the error message."""
METRICS_TIMEOUT_S = 8
"""Less than the ten seconds that Prometheus waits for a scrape by default."""

log = logging.getLogger("nbest")

StartGenerator = Callable[[Settings], AbstractAsyncContextManager[Generator]]
CountCallback = Callable[[int, int], None]
"""`on_batch` or `on_lookup` of `server.factory.start`."""
StartScorers = Callable[
    [Settings, Generator, CountCallback, CountCallback], AbstractAsyncContextManager[Mapping[str, Scorer]]
]


class GeneratorReplica:
    """One generator, for instance an engine with the actors of its tensor-parallel shards."""

    async def __init__(self, settings: Settings, start: StartGenerator, registry: WeightsRegistry) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log_level, settings.log_format)
        self._resources = AsyncExitStack()
        self._generator = await self._resources.enter_async_context(start(settings))
        self._running: dict[str, Generation] = {}
        self._registry = registry
        self._versions: dict[WeightChange, str] = {}
        if settings.adapter is not None:
            self._versions["load_adapter"] = version_at("load_adapter", settings.adapter)
        await self._load_registered_weights()

    async def model(self) -> str:
        return self._generator.model

    async def generate(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> AsyncIterator[OutcomeGroup | NbestError]:
        """Yields groups of outcomes, the first of them empty; closing the stream cancels what still runs."""
        try:
            async with self._generator.generate(prompt, sampling, n, stream_partial=stream_partial) as generation:
                self._running[request_id] = generation
                yield OutcomeGroup([], generation.prompt_tokens)
                async for outcomes in generation:
                    yield OutcomeGroup(latest_outcomes(outcomes), generation.prompt_tokens)
                    if stream_partial:
                        await asyncio.sleep(SNAPSHOT_INTERVAL_S)
        except NbestError as error:
            yield error
        finally:
            self._running.pop(request_id, None)

    async def cancel(self, request_id: str, index: int) -> None:
        """Stops one candidate; does nothing in a replica that does not run the request."""
        if request_id in self._running:
            await self._running[request_id].cancel(index)

    async def check_ready(self) -> NbestError | None:
        try:
            await self._generator.check_ready()
        except NbestError as error:
            return error
        return None

    async def check_health(self) -> None:
        """Raises if the engine has died; Serve calls this periodically and then replaces the replica."""
        await self._generator.check_ready()
        await self._load_registered_weights()

    async def weights_version_at(self, change: WeightChange, path: str) -> str | NbestError:
        """The version of the weights that the change would load from this path on this machine."""
        try:
            return await asyncio.to_thread(version_at, change, Path(path))
        except NbestError as error:
            return error

    async def change_weights(self, change: WeightChange, path: str) -> str | NbestError:
        """Loads the weights, and returns their version."""
        try:
            self._versions[change] = await getattr(self._generator, change)(path)
        except NbestError as error:
            return error
        return self._versions[change]

    async def register_weights(self, change: WeightChange, loaded: LoadedWeights) -> ServedWeights:
        """Registers weights that all replicas must serve; returns the registry's previous content."""
        previous = self._registry.read()
        self._registry.write(previous | {change: loaded})
        return previous

    async def restore_registry(self, served: ServedWeights) -> None:
        self._registry.write(served)

    async def _load_registered_weights(self) -> None:
        """Loads registered weights that this replica does not serve yet."""
        for change, loaded in self._registry.read().items():
            if self._versions.get(change) == loaded.version:
                continue
            version = await self.change_weights(change, loaded.path)
            if isinstance(version, NotReadyError):
                continue  # the next health check tries again
            if isinstance(version, NbestError):
                log.error("This replica cannot load the weights that the other replicas serve: %s", version)
            elif version != loaded.version:
                log.error(
                    "%s has changed since it was loaded; load it again, so that all replicas serve the same weights.",
                    loaded.path,
                )
            self._versions[change] = loaded.version  # so that the error is logged once

    async def __del__(self) -> None:
        await self._resources.aclose()


class ScorerReplica:
    """All scorers of the settings; each batches the groups of all requests that this replica receives."""

    async def __init__(self, settings: Settings, generator: DeploymentHandle, start: StartScorers) -> None:  # type: ignore[misc]
        logs.configure(settings.log_level, settings.log_format)
        self._metrics = Metrics()
        self._resources = AsyncExitStack()
        own_policy = FailoverGenerator(RemoteGenerator(generator, OWN_POLICY))
        self._scorers = await self._resources.enter_async_context(
            start(settings, own_policy, self._metrics.observe_batch, self._metrics.observe_lookup)
        )

    async def needs(self) -> dict[str, Needs]:
        return {name: scorer.needs for name, scorer in self._scorers.items()}

    async def check(self, name: str, prompt: Prompt) -> UnscorableError | None:
        """The reason if no candidate of this prompt can be scored."""
        try:
            await self._scorers[name].check(prompt)
        except UnscorableError as error:
            return error
        return None

    async def score(
        self, name: str, prompt: Prompt, candidates: Sequence[Candidate]
    ) -> AsyncIterator[Scores | ScoringError | None]:
        """Yields None to accept the call, and then the scores; closing the stream cancels the scoring."""
        yield None
        try:
            yield await self._scorers[name].score(prompt, candidates)
        except ScoringError as error:
            yield error

    async def metrics(self) -> tuple[str, bytes]:
        return _replica_id(), self._metrics.render()

    async def __del__(self) -> None:
        await self._resources.aclose()


@serve.ingress()
class RouterReplica:
    """The HTTP application; it calls the other two deployments."""

    def __init__(self, settings: Settings, generator: DeploymentHandle, scorer: DeploymentHandle) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._tracing = tracing_of(settings)
        self._generator = generator
        self._scorer = scorer
        self._metrics = Metrics()

    def __serve_build_asgi_app__(self) -> Any:
        app = create_app(
            self._pipeline,
            self._settings,
            self._metrics,
            exposition=self._exposition,
            tracing=self._tracing,
        )
        return without_request_id(app)

    async def metrics(self) -> tuple[str, bytes]:
        return _replica_id(), self._metrics.render()

    def _pipeline(self) -> AbstractAsyncContextManager[BestOfN]:
        return self._connected() if self._tracing is None else self._tracing.instrument(self._connected())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[BestOfN]:
        yield await connected(self._generator, self._scorer)

    async def _exposition(self) -> bytes:
        """The metrics of all router and scorer replicas, so that any router can be scraped."""
        routers = serve.get_deployment_handle(ROUTER, serve.get_replica_context().app_name)
        responses = await asyncio.gather(
            *(
                handle.broadcast("metrics").results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
                for handle in (routers, self._scorer)
            ),
            return_exceptions=True,
        )
        answers = [answer for response in responses if isinstance(response, list) for answer in response]
        metrics = [answer for answer in answers if not isinstance(answer, BaseException)]
        return merge_expositions(dict([await self.metrics(), *metrics]))


async def connected(generator: DeploymentHandle, scorer: DeploymentHandle) -> BestOfN:
    """The pipeline over both deployments; waits until a replica of each answers."""
    scorers = await connect_scorers(scorer)
    failover = FailoverGenerator(await RemoteGenerator.connect(generator))
    return ReplicatedBestOfN(failover, scorers, scorer.needs.remote)


def handles(name: str) -> tuple[DeploymentHandle, DeploymentHandle]:
    """The handles of generator and scorer in the application of that name."""
    generator, scorer = (serve.get_deployment_handle(deployment, name) for deployment in (GENERATOR, SCORER))
    return generator, scorer


def application(
    settings: Settings,
    start_generator: StartGenerator = factory.started_generator,
    start_scorers: StartScorers = factory.started_scorers,
) -> Any:
    """The Serve application of these settings.

    Raises:
        ConfigError: API keys have budgets, and there may be several routers.
    """
    _check_budgets(settings)
    return _deployment(
        RouterReplica,
        ROUTER,
        settings,
        settings.router_replicas,
        target_ongoing=ROUTER_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},  # it only waits
    ).bind(settings, *_models(settings, start_generator, start_scorers))


def application_without_router(settings: Settings, start_generator: StartGenerator, start_scorers: StartScorers) -> Any:
    """Generators and scorers without a router, for a pipeline in the process that deploys them."""
    _, scorer = _models(settings, start_generator, start_scorers)
    return scorer  # it is bound to the generator, which its judges may call


def _models(settings: Settings, start_generator: StartGenerator, start_scorers: StartScorers) -> tuple[Any, Any]:
    """The deployments of generator and scorer."""
    generator = _deployment(
        GeneratorReplica,
        GENERATOR,
        settings,
        settings.generator_replicas,
        # This number of requests of the default size fills the engine's batch.
        target_ongoing=max(1, settings.max_num_seqs // settings.default_best_of),
        **generator_resources(settings),
    ).bind(settings, start_generator, RayWeightsRegistry())
    scorer = _deployment(
        ScorerReplica,
        SCORER,
        settings,
        settings.scorer_replicas,
        target_ongoing=SCORER_ONGOING_CALLS,
        ray_actor_options={"num_cpus": settings.scorer_cpus, "num_gpus": settings.scorer_gpus},
    ).bind(settings, generator, start_scorers)
    return generator, scorer


def _check_budgets(settings: Settings) -> None:
    """Refuses budgets with several routers: each router counts on its own, so each would grant the full budget."""
    routers = replica_range(settings.router_replicas)[1]
    if routers == 1 or settings.keys_file is None:
        return
    for name, key in read_keys(settings.keys_file).items():
        if key.has_budgets:
            raise ConfigError(
                f"The key {name} in {settings.keys_file} has a budget, and each of {routers} routers would grant it in "
                "full; set --router-replicas 1, or take the budgets out."
            )


def from_config(values: Mapping[str, Any]) -> Any:
    """The application for the settings under `args` of a Serve config file, and those in the environment."""
    return application(load_settings({**values, "ray": True}))


@contextmanager
def deployed(app: Any, settings: Settings, port: int | None, *, name: str = APP_NAME) -> Iterator[None]:
    """Runs the application on the cluster of this process until the block is left, with HTTP on `port` if not None.

    Raises:
        ConfigError: the cluster already runs an application of that name.
        StartError: a replica did not start.
    """
    before = serve.status()
    if name in before.applications:
        raise ConfigError(
            f"The Ray cluster already serves an application named {name}; stop that one, or join another cluster "
            "with --ray-address."
        )
    logging.getLogger("ray.serve").setLevel(settings.log_level.upper())
    try:
        if port is None:
            serve.start(proxy_location="Disabled")
        else:
            serve.start(
                proxy_location="HeadOnly" if settings.ray_address is None else "EveryNode",
                http_options={"host": settings.host, "port": port},
            )
        try:
            serve.run(app, name=name, route_prefix=None if port is None else "/")
        except RuntimeError as error:
            statuses = serve.status().applications[name].deployments.items()
            messages = {name: status.message for name, status in statuses if status.status != "HEALTHY"}
            raise StartError(f"The server did not start: {reason_of_failed_start(messages) or error}") from error
        yield
    finally:
        with suppress(TimeoutError):  # running requests have had their time
            serve.delete(name)
        if not before.proxies and not serve.status().applications:
            serve.shutdown()


def reason_of_failed_start(messages: Mapping[str, str]) -> str | None:
    """The error at the end of the first traceback in Serve's messages; deployment name -> message."""
    for name, message in messages.items():
        if errors := ERROR_LINE.findall(message):
            return f"{name}: {errors[-1]}"
    return None


def reserved_cpus(settings: Settings) -> float:
    """The cores that all replicas reserve together at their largest number in the settings."""
    engine = settings.generator_cpus + (settings.tensor_parallel_size if settings.tensor_parallel_size > 1 else 0)
    return (
        replica_range(settings.generator_replicas)[1] * engine
        + replica_range(settings.scorer_replicas)[1] * settings.scorer_cpus
    )


def _deployment(
    replica: type, name: str, settings: Settings, replicas: str, *, target_ongoing: int, **resources: Any
) -> Any:
    fewest, most = replica_range(replicas)
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": target_ongoing}
    return serve.deployment(
        name=name,
        **({"num_replicas": fewest} if fewest == most else {"autoscaling_config": scaling}),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_s + CLOSING_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        max_constructor_retry_count=1,  # a failed load is reported at once, not after three tries
        **resources,
    )(replica)


def generator_resources(settings: Settings) -> dict[str, Any]:
    """The resources of one engine: its replica's process and, with tensor parallelism, a bundle per shard's actor."""
    replica = {"num_cpus": settings.generator_cpus, "num_gpus": settings.generator_gpus}
    if settings.tensor_parallel_size == 1:
        return {"ray_actor_options": replica}
    shard = {"CPU": 1, "GPU": settings.generator_gpus}
    return {
        "ray_actor_options": replica | {"num_gpus": 0},
        "placement_group_bundles": [{"CPU": settings.generator_cpus}, *[shard] * settings.tensor_parallel_size],
    }


def _replica_id() -> str:
    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}-{replica.unique_id}"


def latest_outcomes(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The last outcome of each candidate, which contains its earlier partial ones; in the order they happened."""
    by_index: dict[int, Outcome] = {}
    for outcome in outcomes:
        by_index.pop(outcome.index, None)
        by_index[outcome.index] = outcome
    return list(by_index.values())
