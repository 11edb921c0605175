"""Puts a server together from its settings: the generator, the scorers, and the pipeline over both."""

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from reranker.scorers.base import Scorer
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
"""PEFT's examples have 8 or 16."""


@asynccontextmanager
async def start(
    settings: Settings,
    on_batch: Callable[[int, int], None] | None = None,
    on_restart: Callable[[float], None] | None = None,
    on_lookup: Callable[[int, int], None] | None = None,
    *,
    tempered_logprobs: bool = False,
    held: "SharedTrunk | None" = None,
) -> AsyncIterator[BestOfN]:
    """Loads every model, yields the running pipeline, and frees everything on the way out.

    `on_batch` hears the number of sequences and of padded tokens of every scoring batch, `on_restart` the seconds
    without an engine whenever one has died and the next is ready, `on_lookup` how many candidates of a scorer call the
    score cache knew and did not know. For training are `tempered_logprobs` (see `EngineOptions`) and the trunk
    that is `held` (see `reranker.models.shared_trunk`). torch, transformers and vllm are imported here and not
    before, so that the command line answers at once.
    """
    own_policy: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()
    # The scorers first: a misspelt reward model is told in seconds, an engine takes half a minute.
    async with (
        started_scorers(settings, own_policy, on_batch, on_lookup, held) as scorers,
        started_generator(settings, on_restart, tempered_logprobs=tempered_logprobs) as generator,
    ):
        own_policy.set_result(generator)
        yield BestOfN(generator, scorers)


@asynccontextmanager
async def started_generator(
    settings: Settings, on_restart: Callable[[float], None] | None = None, *, tempered_logprobs: bool = False
) -> AsyncIterator[Generator]:
    """The generator alone, until the block is left."""
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
    held: "SharedTrunk | None" = None,
) -> AsyncIterator[dict[str, Scorer]]:
    """The scorers alone, by name, until the block is left; `own_policy` is there before the first judge asks it."""
    if any(isinstance(spec, RewardModelSpec) for spec in parse_all(settings.reward_models).values()):
        await asyncio.to_thread(_import_library, "reranker.scorers.reward_model")
    async with AsyncExitStack() as stack:
        surroundings = ScorerContext(
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
            shared_trunk=held,
        )
        yield await make_scorers(settings.reward_models, surroundings, stack)


def _import_library(module: str) -> None:
    """Imports a module of ours that brings torch, transformers or vllm: for seconds, in which the loop must answer."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else vLLM's memory binding is told at every start
    importlib.import_module(module)


def _judge(
    settings: Settings, model: str, own_policy: Generator | Awaitable[Generator], stack: AsyncExitStack
) -> JudgeClient:
    """The way to ask a judge; the served policy itself answers once it is there."""
    if model == OWN_POLICY:
        return JudgeClient(own_policy)
    from server.generation.openai_upstream import OpenAIGenerator

    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else None
    upstream = OpenAIGenerator.connect(str(settings.judge_base_url), key, model=model, upstream_model=model)
    stack.push_async_callback(upstream.close)
    return JudgeClient(upstream)


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
    if settings.ray:  # there Serve replaces the whole replica of an engine that has died
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
    """None where no adapter can come: what makes room for them costs every step of the engine something."""
    if settings.adapter is None and settings.adapter_root is None:
        return None
    if settings.max_lora_rank is not None:
        return settings.max_lora_rank
    return DEFAULT_LORA_RANK if weight_store.adapter is None else weight_store.adapter.rank
