"""The embedded vLLM engine: samples the policy in child processes of this server.

A request for N candidates becomes N engine requests of one sample each, all with the same prompt token ids:

- Each ends on its own, so a finished candidate is yielded while the others still run. vLLM's own `n=N` yields either
  every token of every child, or everything at the end.
- Each can be aborted on its own, so losers and disconnected clients stop using the engine.
- They share the prompt through the engine's prefix cache, block by block. The tail after the last full block cannot be
  shared and is computed N times, so small blocks cost less: see `Settings.block_size`.

Candidate i has seed `seed + i`, as in vLLM's own `n=N`.

The weights can change while the engine runs. Adapters are loaded and removed while requests run
(`server.generation.lora`); full weights are replaced when no request runs.

Only this module imports vllm, and it is imported only when the embedded engine is used. From vllm it takes AsyncLLM and
its arguments, inputs and outputs; sampling parameters and adapter requests; the engine's errors; the base class of stat
loggers; the output layer, which the worker extension repacks; and the supported adapter ranks.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import torch
from transformers import AutoTokenizer
from vllm import SamplingParams as VllmSamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from reranker.candidate import Candidate, FailedCandidate, Prompt
from server.errors import BadRequestError, ContextLengthError, EngineDiedError
from server.generation.adapter_shapes import Shapes, policy_shapes
from server.generation.base import Outcome, SamplingParams
from server.generation.candidate_builder import CandidateBuilder
from server.generation.engine_arguments import (
    OWNER_PID_VARIABLE,
    THREAD_BINDING_VARIABLE,
    EngineOptions,
    default_environment,
    engine_arguments,
)
from server.generation.engine_cleanup import EngineProcesses, active_children, cancel_start
from server.generation.free_memory import release_free_memory
from server.generation.lora import EngineAdapters, EngineRefusedError, LoadedAdapter
from server.generation.outcome_queue import OutcomeQueue
from server.generation.prompt_tokens import encode_prompt
from server.generation.structured_output import SchemaChecker
from server.generation.weight_store import FullWeights, WeightStore, full_weights

ENGINE_DIED = "The engine has died; try again in a few seconds."


class WorkerExtension:
    """Methods that vLLM adds to its worker; they run in the worker's process."""

    def repack_heads(self) -> None:
        """Packs the weights of the output layers again, for the CPU's matrix product.

        An output layer that shares its weights with the embedding has no weights in a checkpoint. A reload skips it,
        and it would keep using its packed copy of the previous weights.
        """
        model: torch.nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]  # of the worker
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


class EngineLoad(StatLoggerBase):
    """The engine's own count of its requests, after its last step."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.running = 0
        self.waiting = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


class VllmGenerator:
    """Samples a policy with vLLM's `AsyncLLM`; made by `create`."""

    def __init__(
        self,
        name: str,
        engine: AsyncLLM,
        tokenizer: Any,
        load: EngineLoad,
        processes: EngineProcesses,
        adapters: EngineAdapters,
        weight_store: WeightStore,
        shapes_of: Callable[[str], Shapes],
    ) -> None:
        self.model = name
        self.load = load
        self.cancelled_total = 0
        self.schemas = SchemaChecker()
        self.adapters = adapters
        self._engine = engine
        self._weight_store = weight_store
        self._shapes_of = shapes_of
        self._policy = engine.model_config.model
        self._reloaded: FullWeights | None = None
        self._reload_lock = asyncio.Lock()
        self._processes = processes
        self._tokenizer = tokenizer
        self._max_model_len: int = engine.model_config.max_model_len
        # A tokenizer must not be used from two threads at once, so one thread does all encoding.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    @classmethod
    async def create(cls, options: EngineOptions, *, name: str, weight_store: WeightStore | None = None) -> Self:
        """Loads the model and starts the engine, which takes 20 to 35 s on a CPU; `name` is the served model's name.

        The engine starts with the weights in `weight_store`, and weights that are loaded later are recorded there.
        Without a store they are lost with this engine.
        """
        environment = default_environment(options.device)
        for variable, value in environment.items():
            os.environ.setdefault(variable, value)
        os.environ[OWNER_PID_VARIABLE] = str(os.getpid())
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        arguments = engine_arguments(
            options, get_args(MaxLoRARanks), threads_are_bound=THREAD_BINDING_VARIABLE in os.environ
        )
        load = EngineLoad()
        children_before = active_children()
        start = asyncio.gather(
            asyncio.to_thread(
                AsyncLLM.from_engine_args, AsyncEngineArgs(**arguments), stat_loggers=[lambda config, index: load]
            ),
            asyncio.to_thread(
                AutoTokenizer.from_pretrained, options.model, trust_remote_code=options.trust_remote_code
            ),
        )
        try:
            engine, tokenizer = await asyncio.shield(start)
        except asyncio.CancelledError:
            await cancel_start(start, children_before)
            raise
        weight_store = weight_store or WeightStore()
        shapes_of = partial(policy_shapes, trust_remote_code=options.trust_remote_code)
        own_shapes = cache(partial(shapes_of, options.model))  # every adapter is compared with them
        adapters = EngineAdapters(_LoraCalls(engine), weight_store, own_shapes, arguments.get("max_lora_rank"))
        processes = EngineProcesses.since(children_before)
        generator = cls(name, engine, tokenizer, load, processes, adapters, weight_store, shapes_of)
        try:
            await generator._resume()
            await generator._warm_up()
            await asyncio.to_thread(release_free_memory)
        except BaseException:
            await generator.close()  # the caller has no reference to it yet
            raise
        return generator

    async def _resume(self) -> None:
        """Loads the weights that the previous engine had loaded."""
        if self._weight_store.reloaded is not None:
            await self._reload(self._weight_store.reloaded)
        await self.adapters.resume()

    async def _warm_up(self) -> None:
        """Samples two candidates of two tokens: the first request sets up threads and buffers, which takes seconds."""
        async with self.generate(Prompt(text="Hello"), SamplingParams(max_tokens=2), 2) as generation:
            async for _ in generation:
                pass

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "VllmGeneration":
        return VllmGeneration(self, prompt, sampling, n, stream_partial)

    async def check_ready(self) -> None:
        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise EngineDiedError(ENGINE_DIED) from error

    @property
    def unfinished(self) -> int:
        """The number of candidates that the engine has not finished."""
        return self._engine.get_num_unfinished_requests()

    async def load_adapter(self, path: str) -> str:
        return await self.adapters.load(path)

    async def reload_weights(self, path: str) -> str:
        if self.adapters.are_supported:  # a reload of a model that vLLM has wrapped for adapters is not tested
            raise BadRequestError("Weights are reloaded only by a server started without --adapter and --adapter-root.")
        weights = await asyncio.to_thread(full_weights, Path(path))
        if await asyncio.to_thread(self._shapes_of, path) != await asyncio.to_thread(self._shapes_of, self._policy):
            raise BadRequestError(f"{path} is a model of another shape than the policy; give weights of this one.")
        async with self._reload_lock:
            await self._reload(weights)
            self._weight_store.reloaded = weights
        return weights.version

    async def _reload(self, weights: FullWeights) -> None:
        """Replaces the weights while no request runs, and clears the prefix cache; on failure restores the previous."""
        previous = self._reloaded.path if self._reloaded else self._policy
        try:
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._read_weights(str(weights.path))
                self._reloaded = weights
            except Exception as error:
                if isinstance(error, EngineDeadError):
                    raise
                await self._read_weights(str(previous))
                raise BadRequestError(f"The engine cannot read the weights {weights.path}: {error}") from error
            finally:
                await self._engine.resume_generation()
        except EngineDeadError as error:
            raise EngineDiedError(ENGINE_DIED) from error

    async def _read_weights(self, path: str) -> None:
        """Loads the weights in every worker, and clears the prefix cache."""
        await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        await self._engine.collective_rpc("repack_heads")
        await self._engine.reset_prefix_cache()

    def weights_version(self, loaded: LoadedAdapter | None) -> str | None:
        """The version of the weights that sampled a candidate; full weights change only while no request runs."""
        if loaded is not None:
            return loaded.adapter.version
        return self._reloaded.version if self._reloaded else None

    async def close(self) -> None:
        await self.adapters.close()
        self._engine.shutdown()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self.schemas.close()
        await asyncio.to_thread(self._processes.end)

    async def encode(self, prompt: Prompt, after: Candidate | None = None) -> list[int]:
        """The token ids of the prompt, followed by those of `after`; a conversation goes through the chat template.

        Raises:
            BadRequestError: there is no chat template, it refuses the conversation, or the prompt has no tokens.
            ContextLengthError: no room is left for a single new token.
        """
        loop = asyncio.get_running_loop()
        token_ids = await loop.run_in_executor(self._encoding, encode_prompt, self._tokenizer, prompt)
        if not token_ids:
            raise BadRequestError("The prompt is empty; give at least one word.", param="prompt")
        if after is not None:
            token_ids = [*token_ids, *after.token_ids]
        if len(token_ids) >= self._max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(token_ids)} tokens and the model's context is {self._max_model_len}; "
                "shorten the prompt.",
                param="messages" if prompt.messages else "prompt",
            )
        return token_ids

    def params(
        self, sampling: SamplingParams, index: int, num_input_tokens: int, output_kind: RequestOutputKind
    ) -> VllmSamplingParams:
        """vLLM's sampling parameters for candidate `index`, whose input has `num_input_tokens` tokens."""
        structured = None
        if sampling.json_schema is not None:
            structured = (
                StructuredOutputsParams(json=sampling.json_schema)
                if sampling.json_schema
                else StructuredOutputsParams(json_object=True)
            )
        return VllmSamplingParams(
            max_tokens=sampling.max_new_tokens(self._max_model_len - num_input_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            seed=None if sampling.seed is None else sampling.seed + index,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=0 if sampling.logprobs is None and sampling.likelihood else sampling.logprobs,
            structured_outputs=structured,
            output_kind=output_kind,
        )

    def request(
        self, prompt: TokensInput, params: VllmSamplingParams, loaded: LoadedAdapter | None
    ) -> AsyncIterator[RequestOutput]:
        """Starts one engine request."""
        adapter = loaded.request if loaded else None
        return self._engine.generate(prompt, params, request_id=uuid.uuid4().hex, lora_request=adapter)


class _LoraCalls:
    """The engine's calls for adapters; its errors become nbest's."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    async def add(self, name: str, number: int, path: str) -> LoRARequest:
        request = LoRARequest(name, number, path)
        try:
            await self._engine.add_lora(request)
        except EngineDeadError as error:
            raise EngineDiedError(ENGINE_DIED) from error
        except Exception as error:
            raise EngineRefusedError(str(error).removeprefix("Call to add_lora method failed: ")) from error
        return request

    async def remove(self, number: int) -> None:
        try:
            await self._engine.remove_lora(number)
        except EngineDeadError as error:
            raise EngineDiedError(ENGINE_DIED) from error


class VllmGeneration:
    """N engine requests for one prompt, each with a task that reads its outputs."""

    def __init__(
        self, generator: VllmGenerator, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self.prompt_tokens = 0
        self._generator = generator
        self._prompt = prompt
        self._sampling = sampling
        self._output_kind = RequestOutputKind.DELTA if stream_partial else RequestOutputKind.FINAL_ONLY
        self._n = n
        self._outcomes = OutcomeQueue(n)
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._adapter: LoadedAdapter | None = None

    async def __aenter__(self) -> Self:
        await self._generator.check_ready()
        if self._sampling.json_schema:
            await self._generator.schemas.check(self._sampling.json_schema)
        token_ids = await self._generator.encode(self._prompt, self._sampling.after)
        self.prompt_tokens = len(token_ids) - self._sampling.begun_tokens
        prompt = tokens_input(token_ids)
        try:
            params_N = [
                self._generator.params(self._sampling, index, len(token_ids), self._output_kind)
                for index in range(self._n)
            ]
        except (VLLMClientError, ValueError) as error:
            raise BadRequestError(f"The engine refuses these parameters: {error}") from error
        self._adapter = self._generator.adapters.begin()
        self._readers = {
            index: asyncio.create_task(self._read(index, prompt, params)) for index, params in enumerate(params_N)
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(self.cancel(index) for index in range(self._n)))
        finally:
            self._generator.adapters.end(self._adapter)
            self._adapter = None

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        return aiter(self._outcomes)

    async def cancel(self, index: int) -> None:
        if self._outcomes.drop(index):
            self._generator.cancelled_total += 1
        reader = self._readers.pop(index, None)
        if reader is not None and not reader.done():
            reader.cancel()  # AsyncLLM.generate aborts its engine request when it is cancelled
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, index: int, prompt: TokensInput, params: VllmSamplingParams) -> None:
        builder = CandidateBuilder(index, self._sampling)
        try:
            async for output in self._generator.request(prompt, params, self._adapter):
                candidate = builder.extend(output.outputs[0], self._generator.weights_version(self._adapter))
                if output.finished and candidate.finish_reason is None:
                    self._outcomes.put(
                        FailedCandidate(index, f"the engine ended it: {output.outputs[0].finish_reason}")
                    )
                else:
                    self._outcomes.put(candidate)
        except EngineDeadError:
            self._outcomes.fail(EngineDiedError("The engine died while it was answering; try again in a few seconds."))
        except (VLLMClientError, ValueError) as error:
            self._outcomes.fail(BadRequestError(f"The engine refuses this request: {error}"))
        except Exception as error:  # noqa: BLE001 (a failed candidate is counted and does not fail the request)
            self._outcomes.put(FailedCandidate(index, str(error) or type(error).__name__))
