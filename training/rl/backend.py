"""The generator and the scorer of a run: those that `nbest serve` would start, in this process or on Ray.

The engine begins with the weights that the learner has, and is told to compute in the same precision. What else there
is to set comes from the environment, as for the server.

On Ray every generator replica loads what was learnt, from the directory that the learner writes: all machines must see
it under the same path. The scorer's process cannot read the learner's trunk and holds one of its own.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from reranker.models.shared_trunk import SharedTrunk
from reranker.scorers.base import Scorer
from reranker.scorers.spec import FunctionSpec, parse
from server import factory
from server.config import Settings, load_settings
from server.generation.base import Generator
from server.pipeline.best_of_n import BestOfN
from training.errors import TrainingError
from training.rl.config import RewardNormalization, RLTraining


@dataclass(frozen=True, slots=True)
class Actors:
    """What completions are drawn and scored by; the judge looks at those of evaluations alone."""

    generator: Generator
    scorer: Scorer
    judge: Scorer | None = None


Start = Callable[[Settings, SharedTrunk | None], AbstractAsyncContextManager[Actors]]


def server_settings(settings: RLTraining, adapter: Path | None = None, *, bfloat16: bool = False) -> Settings:
    """Those of a server of this policy, with its adapter, and this reward; the judge, if there is one, comes after it.

    Raises:
        server.config.ConfigError: reward or judge are misspelt, or something in the environment is.
    """
    return load_settings(
        {
            "model": settings.base_model,
            "reward_models": [settings.reward_model, *([settings.judge] if settings.judge else [])],
            "adapter": adapter and adapter.resolve(),  # whoever reads it may stand elsewhere
            "adapter_root": None,
            "max_lora_rank": None,
            "dtype": "bfloat16" if bfloat16 else "float32",
            "generator": "vllm",
            "base_url": None,
            "ray": False,
            "ray_address": None,
        }
    )


@asynccontextmanager
async def started_actors(settings: Settings, held: SharedTrunk | None) -> AsyncIterator[Actors]:
    """All of them, until the block is left; a reward adapter over the trunk that the learner holds reads that one.

    Raises:
        TrainingError: one of them does not start.
    """
    async with _actors_of(factory.start(settings, tempered_logprobs=True, held=held)) as actors:
        yield actors


def on_ray(address: str | None) -> Start:
    """As replicas on the Ray cluster at that address or, without one, on a cluster of this machine."""

    @asynccontextmanager
    async def started(settings: Settings, _: SharedTrunk | None) -> AsyncIterator[Actors]:
        from server.distributed import cluster

        there = settings.model_copy(update={"ray": True, "ray_address": address})
        async with _actors_of(cluster.started(there, tempered_logprobs=True)) as actors:
            yield actors

    return started


@asynccontextmanager
async def _actors_of(starting: AbstractAsyncContextManager[BestOfN]) -> AsyncIterator[Actors]:
    async with AsyncExitStack() as stack:
        try:
            pipeline = await stack.enter_async_context(starting)
        except Exception as error:
            raise TrainingError(f"the engine or the reward model does not start: {error}") from error
        yield Actors(pipeline.generator, *pipeline.scorers.values())


def normalization_of(settings: RLTraining) -> RewardNormalization:
    """What is asked for or, without that, what suits the reward: a function's numbers mean what they say."""
    if settings.reward_normalization is not None:
        return settings.reward_normalization
    is_function = isinstance(parse(settings.reward_model.partition("=")[2]), FunctionSpec)
    return "none" if is_function else "reference"
