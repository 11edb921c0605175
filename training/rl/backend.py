"""The generator and the scorer of a run: those that `nbest serve` would start, in this process or on Ray.

The engine starts with the learner's weights and computes in the learner's precision. Its other settings come from the
environment, as for the server.

On Ray every generator replica loads the trained weights from the directory that the learner writes, so all machines
must see it under the same path. The scorer's process cannot read the learner's trunk and holds a trunk of its own.
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
class Backend:
    """The generator and the scorer of completions; the judge scores those of evaluations only."""

    generator: Generator
    scorer: Scorer
    judge: Scorer | None = None


StartBackend = Callable[[Settings, SharedTrunk | None], AbstractAsyncContextManager[Backend]]


def server_settings(settings: RLTraining, adapter: Path | None = None, *, bfloat16: bool = False) -> Settings:
    """The settings of a server of this policy, with its adapter, this reward and, after it, the judge if there is one.

    Raises:
        server.config.ConfigError: a misspelt reward or judge, or a wrong value in the environment.
    """
    return load_settings(
        {
            "model": settings.base_model,
            "reward_models": [settings.reward_model, *([settings.judge] if settings.judge else [])],
            "adapter": adapter and adapter.resolve(),  # the reader may have another working directory
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
async def local_backend(settings: Settings, shared_trunk: SharedTrunk | None) -> AsyncIterator[Backend]:
    """Runs generator and scorers in this process; a reward adapter over the learner's base reads `shared_trunk`.

    Raises:
        TrainingError: the generator or a scorer does not start.
    """
    async with _backend_of(factory.start(settings, tempered_logprobs=True, shared_trunk=shared_trunk)) as backend:
        yield backend


def ray_backend(address: str | None) -> StartBackend:
    """Runs them as replicas on the Ray cluster at `address` or, without one, on a new cluster of this machine."""

    @asynccontextmanager
    async def started(settings: Settings, _: SharedTrunk | None) -> AsyncIterator[Backend]:
        from server.distributed import cluster

        on_ray = settings.model_copy(update={"ray": True, "ray_address": address})
        async with _backend_of(cluster.started(on_ray, tempered_logprobs=True)) as backend:
            yield backend

    return started


@asynccontextmanager
async def _backend_of(starting: AbstractAsyncContextManager[BestOfN]) -> AsyncIterator[Backend]:
    async with AsyncExitStack() as stack:
        try:
            pipeline = await stack.enter_async_context(starting)
        except Exception as error:
            raise TrainingError(f"the engine or the reward model does not start: {error}") from error
        yield Backend(pipeline.generator, *pipeline.scorers.values())


def normalization_of(settings: RLTraining) -> RewardNormalization:
    """The setting or, without it, `none` for a Python function, whose scale is the user's, and else `reference`."""
    if settings.reward_normalization is not None:
        return settings.reward_normalization
    is_function = isinstance(parse(settings.reward_model.partition("=")[2]), FunctionSpec)
    return "none" if is_function else "reference"
