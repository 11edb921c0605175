"""Builds the generator, the scorers and the pipeline from the settings."""

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from reranker.scorers.base import Scorer
from reranker.scorers.judge import JudgeModel
from reranker.scorers.judge_endpoint import JudgeEndpoint
from reranker.scorers.registry import ScorerContext, make_scorers
from reranker.scorers.spec import OWN_POLICY, RewardModelSpec, parse_all
from server.config import Settings
from server.generation.base import Generator
from server.generation.judge_client import JudgeClient
from server.generation.supervisor import SupervisedGenerator
from server.generation.weight_store import WeightStore
from server.pipeline.best_of_n import BestOfN

if TYPE_CHECKING:
    from reranker.models.shared_trunk import SharedTrunk

DEFAULT_LORA_RANK = 16
"""PEFT's examples use 8 or 16."""


@asynccontextmanager
async def start(
    settings: Settings,
    on_batch: Callable[[int, int], None] | None = None,
    on_restart: Callable[[float], None] | None = None,
    on_lookup: Callable[[int, int], None] | None = None,
    *,
    tempered_logprobs: bool = False,
    shared_trunk: "SharedTrunk | None" = None,
) -> AsyncIterator[BestOfN]:
    """Loads all models and yields the running pipeline; frees everything on leaving.

    `on_batch` is called with the number of sequences and of tokens, including padding, of each scoring batch;
    `on_restart` with the seconds without an engine, each time a new engine has replaced one that died; `on_lookup` with
    the number of hits and of misses of each call of the score cache. `tempered_logprobs` (see `EngineOptions`) and
    `shared_trunk`, an already loaded trunk (see `reranker.models.shared_trunk`), are for training. torch, transformers
    and vllm are imported here and not earlier, so that the command line responds at once.
    """
    own_policy: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()
    # Scorers start first: a misspelt reward model is reported within seconds, while an engine takes half a minute.
    async with (
        started_scorers(settings, own_policy, on_batch, on_lookup, shared_trunk) as scorers,
        started_generator(settings, on_restart, tempered_logprobs=tempered_logprobs) as generator,
    ):
        own_policy.set_result(generator)
        yield BestOfN(generator, scorers)


@asynccontextmanager
async def started_generator(
    settings: Settings, on_restart: Callable[[float], None] | None = None, *, tempered_logprobs: bool = False
) -> AsyncIterator[Generator]:
    """The generator without scorers; closed when the block is left."""
    if settings.generator == "vllm":
        await asyncio.to_thread(_import_library, "server.generation.vllm_engine")
    generator = await _generator(settings, on_restart, tempered_logprobs)
    try:
        yield generator
    finally:
        await generator.close()


@asynccontextmanager
async def started_scorers(
    settings: Settings,
    own_policy: Generator | Awaitable[Generator],
    on_batch: Callable[[int, int], None] | None = None,
    on_lookup: Callable[[int, int], None] | None = None,
    shared_trunk: "SharedTrunk | None" = None,
) -> AsyncIterator[dict[str, Scorer]]:
    """The scorers by name; closed when the block is left.

    `own_policy` is the generator of judges that use the served policy; a future of it must be set before their first
    call.
    """
    if any(isinstance(spec, RewardModelSpec) for spec in parse_all(settings.reward_models).values()):
        await asyncio.to_thread(_import_library, "reranker.scorers.reward_model")
    async with AsyncExitStack() as stack:
        context = ScorerContext(
            judge_model=lambda model: _judge(settings, model, own_policy, stack),
            device=settings.device,
            reward_dtype=settings.reward_dtype,
            trust_remote_code=settings.trust_remote_code,
            max_batch_tokens=settings.score_batch_tokens,
            max_wait_ms=settings.score_max_wait_ms,
            cache_entries=settings.score_cache_entries,
            verifier_timeout_s=settings.verifier_timeout_s,
            on_batch=on_batch,
            on_lookup=on_lookup,
            shared_trunk=shared_trunk,
        )
        yield await make_scorers(settings.reward_models, context, stack)


def _import_library(module: str) -> None:
    """Imports a module that imports torch, transformers or vllm; runs in a thread, since this takes seconds."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise vLLM prints its memory binding at every start
    importlib.import_module(module)


def _judge(
    settings: Settings, model: str, own_policy: Generator | Awaitable[Generator], stack: AsyncExitStack
) -> JudgeModel:
    """The client of a judge model: of the served policy, or of a model at `judge_base_url`."""
    if model == OWN_POLICY:
        return JudgeClient(own_policy)
    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else None
    endpoint = JudgeEndpoint.connect(str(settings.judge_base_url), key, model=model)
    stack.push_async_callback(endpoint.close)
    return endpoint


async def _generator(
    settings: Settings, on_restart: Callable[[float], None] | None, tempered_logprobs: bool
) -> Generator:
    name = settings.served_model_name or settings.model
    if settings.generator == "openai":
        from server.generation.openai_upstream import OpenAIGenerator

        key = settings.api_key.get_secret_value() if settings.api_key else None
        return OpenAIGenerator.connect(str(settings.base_url), key, model=name, upstream_model=settings.model)
    weight_store = WeightStore()
    if settings.adapter is not None:
        weight_store.adapter = await asyncio.to_thread(weight_store.copy_adapter, settings.adapter)
    start = partial(_engine, settings, name, weight_store, _max_lora_rank(settings, weight_store), tempered_logprobs)
    if settings.ray:  # on Ray, Serve replaces the whole replica of an engine that died
        return await start()
    return await SupervisedGenerator.create(start, on_restart=on_restart)


async def _engine(
    settings: Settings, name: str, weight_store: WeightStore, max_lora_rank: int | None, tempered_logprobs: bool
) -> Generator:
    from reranker.models.bundled import resolve
    from reranker.models.device import pick_device
    from server.generation.engine_arguments import EngineOptions
    from server.generation.vllm_engine import VllmGenerator

    options = EngineOptions(
        model=resolve(settings.model),
        device=pick_device(settings.device),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        kv_cache_gib=settings.kv_cache_gib,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.tensor_parallel_size,
        on_ray=settings.ray,
        trust_remote_code=settings.trust_remote_code,
        max_lora_rank=max_lora_rank,
        tempered_logprobs=tempered_logprobs,
    )
    return await VllmGenerator.create(options, name=name, weight_store=weight_store)


def _max_lora_rank(settings: Settings, weight_store: WeightStore) -> int | None:
    """The maximum rank; None where no adapter can be loaded, since support for adapters slows every engine step."""
    if settings.adapter is None and settings.adapter_root is None:
        return None
    if settings.max_lora_rank is not None:
        return settings.max_lora_rank
    return DEFAULT_LORA_RANK if weight_store.adapter is None else weight_store.adapter.rank
