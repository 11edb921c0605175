"""The embedded vLLM engine: the policy inside the server's own process tree.

A request for N candidates becomes N engine requests of one sample each, all with the same prompt token ids:

- each ends on its own, so a finished candidate is handed on while the others are still being written (vLLM's own
  `n=N` hands on either every token of every child, or everything at the end);
- each can be aborted on its own, which is how losers and disconnected clients stop costing anything;
- they share the prompt through the engine's prefix cache, block by block. The tail after the last full block cannot
  be shared and is computed N times, so small blocks are the cheap ones: see `Settings.block_size`.

Candidate i has seed `seed + i`, as vLLM's own children have.

Its weights can change while it runs: adapters come and go beside requests under way (`engine_adapters`), full weights
are exchanged when none is.

This is the only module that imports vllm, and it is imported only when the engine is wanted.
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
from reranker.models.device import computes_bfloat16
from server.errors import BadRequestError, ContextLengthError, EngineDiedError
from server.generation.base import Outcome, SamplingParams
from server.generation.candidate_builder import CandidateBuilder
from server.generation.engine_cleanup import (
    ENDS_WITH_ITS_OWNER,
    OWNER_VARIABLE,
    EngineProcesses,
    give_back_free_memory,
    give_up,
    started,
)
from server.generation.lora import (
    MAX_VERSIONS,
    EngineAdapters,
    EngineRefusedError,
    LoadedAdapter,
    Shapes,
    policy_shapes,
)
from server.generation.outcome_queue import OutcomeQueue
from server.generation.prompt_tokens import encode_prompt
from server.generation.weight_store import FullWeights, WeightStore, full_weights

GIB = 1 << 30
IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker in the core's own process. vLLM gives a CPU's worker one of its own, to bind its threads to cores; core
and worker then wait for each other in loops that never sleep, beside as many threads as there are cores, and go on for
a second after the last token, while a reward model wants those cores (benchmarks/LOG.md). By its full name: the short
one, uni, is taken for mp on a CPU. Who binds threads with VLLM_CPU_OMP_THREADS_BIND gets the process."""
MIXED_VERSIONS = 2
"""Adapters in one step of the engine: the newest, and the one before it while its requests end."""


def pick_dtype(device: str) -> str:
    """The precision this device computes fastest.

    Every CUDA device vLLM supports has half precision units. A CPU without AVX512-BF16 or AMX emulates bfloat16:
    float32 then gives three times the tokens a second at N=32.
    """
    if device == "cuda":
        return "auto"
    return "bfloat16" if computes_bfloat16(device) else "float32"


def _executor(on_cpu: bool, tensor_parallel_size: int, shards_are_actors: bool) -> str | None:
    """What runs the engine's workers; None is vLLM's own choice.

    On Ray the shards are actors, placed in the bundles that the replica of this process was given. Ray ends those with
    their owner, wherever they run.
    """
    if shards_are_actors:
        return "ray"
    threads_are_bound = "VLLM_CPU_OMP_THREADS_BIND" in os.environ
    return IN_CORE if on_cpu and tensor_parallel_size == 1 and not threads_are_bound else None


def pick_max_rank(rank: int) -> int:
    """The smallest of vLLM's buffers for adapters that takes this rank."""
    ranks = sorted(get_args(MaxLoRARanks))
    return next((allowed for allowed in ranks if allowed >= rank), ranks[-1])


class WorkerExtension:
    """What vLLM's worker, in its own process, can do besides."""

    def repack_heads(self) -> None:
        """Packs the output layers anew, for the CPU's matrix product.

        One that shares its weights with the embedding has no weights in a checkpoint, so that a reload passes over it
        and it would go on with a packed copy of those before.
        """
        model: torch.nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]  # of the worker
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"


class EngineLoad(StatLoggerBase):
    """The engine's own count of its requests, as of its last step."""

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
        """Nothing to say."""


class VllmGenerator:
    """Samples a policy with vLLM's `AsyncLLM`; made by `create`."""

    def __init__(
        self,
        model: str,
        engine: AsyncLLM,
        tokenizer: Any,
        load: EngineLoad,
        processes: EngineProcesses,
        adapters: EngineAdapters,
        shelf: WeightStore,
        shapes_of: Callable[[str], Shapes],
    ) -> None:
        self.model = model
        self.load = load
        self.cancelled_total = 0
        self.adapters = adapters
        self._engine = engine
        self._shelf = shelf
        self._shapes_of = shapes_of
        self._policy = engine.model_config.model
        self._reloaded: FullWeights | None = None
        self._reloading = asyncio.Lock()
        self._processes = processes
        self._tokenizer = tokenizer
        self._max_model_len: int = engine.model_config.max_model_len
        # A tokenizer must not be used from two threads at once, so encoding has exactly one.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    @classmethod
    async def create(
        cls,
        path: str,
        *,
        name: str,
        device: str,
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_cache_gib: float = 2.0,
        block_size: int | None = None,
        max_num_seqs: int = 128,
        tensor_parallel_size: int = 1,
        on_ray: bool = False,
        trust_remote_code: bool = False,
        max_lora_rank: int | None = None,
        shelf: WeightStore | None = None,
        tempered_logprobs: bool = False,
    ) -> Self:
        """Loads the model at `path` (a directory or hub id) and starts the engine; 20 to 35 s on a CPU.

        `tensor_parallel_size` devices hold a part of the model each; `on_ray` says that this process is a Ray actor.
        With `max_lora_rank` adapters up to that rank can be loaded. What is on the shelf is served from the beginning,
        and what is loaded later is put there; without one nothing outlives this engine. With `tempered_logprobs` the
        log-probabilities told are those that were drawn from, of the logits by the temperature; OpenAI's are of the
        logits alone.
        """
        on_cpu = device == "cpu"
        # The engine's own log is some hundred lines a start; VLLM_LOGGING_LEVEL=INFO brings them back.
        logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        # A worker of one that is closing has nothing to save; by default each is waited for 5 s, one after the other.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads: it must not fork
        if on_cpu:
            # Counting the ranks of log-probabilities is all that would be compiled here: 20 s of g++ in the first
            # request, or an engine that fails where there is no compiler, for an operation of half a millisecond.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        load = EngineLoad()
        lora: dict[str, Any] = {}
        if max_lora_rank is not None:
            max_lora_rank = pick_max_rank(max_lora_rank)
            lora = {
                "enable_lora": True,
                "max_lora_rank": max_lora_rank,
                "max_loras": MIXED_VERSIONS,
                "max_cpu_loras": MAX_VERSIONS,
            }
        shards_are_actors = on_ray and tensor_parallel_size > 1
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        arguments = AsyncEngineArgs(
            model=path,
            dtype=pick_dtype(device) if dtype == "auto" else dtype,
            max_model_len=max_model_len,
            block_size=block_size if on_cpu else None,
            kv_cache_memory_bytes=int(kv_cache_gib * GIB) if on_cpu else None,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend=_executor(on_cpu, tensor_parallel_size, shards_are_actors),
            worker_extension_cls=EXTENSION if shards_are_actors else ENDS_WITH_ITS_OWNER,
            enable_prefix_caching=True,
            # A seeded prompt that is read in pieces ends the engine on a CPU ("CPU Generator does not use offset"), so
            # there it waits until all of it fits a step. A step is then at least as large as the context.
            enable_chunked_prefill=False if on_cpu else None,
            enforce_eager=on_cpu,
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            logprobs_mode="processed_logprobs" if tempered_logprobs else "raw_logprobs",
            **lora,
        )
        before = started()
        starting = asyncio.gather(
            asyncio.to_thread(AsyncLLM.from_engine_args, arguments, stat_loggers=[lambda config, index: load]),
            asyncio.to_thread(AutoTokenizer.from_pretrained, path, trust_remote_code=trust_remote_code),
        )
        try:
            engine, tokenizer = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await give_up(starting, before)  # a thread cannot be cancelled
            raise
        shelf = shelf or WeightStore()
        shapes_of = partial(policy_shapes, trust_remote_code=trust_remote_code)
        own_shapes = cache(partial(shapes_of, path))  # every adapter is compared with them
        adapters = EngineAdapters(_LoraCalls(engine), shelf, own_shapes, max_lora_rank)
        generator = cls(name, engine, tokenizer, load, EngineProcesses.since(before), adapters, shelf, shapes_of)
        try:
            await generator._resume()
            await generator._warm_up()
            await asyncio.to_thread(give_back_free_memory)
        except BaseException:
            await generator.close()  # nobody else has it yet
            raise
        return generator

    async def _resume(self) -> None:
        """Serves the weights that the engine before this one served."""
        if self._shelf.reloaded is not None:
            await self._reload(self._shelf.reloaded)
        await self.adapters.resume()

    async def _warm_up(self) -> None:
        """Draws two tokens twice: the first of all requests sets up threads and buffers, for up to seconds."""
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
            raise EngineDiedError("The engine has died; try again in a few seconds.") from error

    @property
    def unfinished(self) -> int:
        """Candidates the engine has not finished."""
        return self._engine.get_num_unfinished_requests()

    async def load_adapter(self, path: str) -> str:
        return await self.adapters.load(path)

    async def reload_weights(self, path: str) -> str:
        if self.adapters.are_possible:  # a model that is wrapped for adapters has not been shown to come out right
            raise BadRequestError("Weights are reloaded only by a server started without --adapter and --adapter-root.")
        weights = await asyncio.to_thread(full_weights, Path(path))
        if await asyncio.to_thread(self._shapes_of, path) != await asyncio.to_thread(self._shapes_of, self._policy):
            raise BadRequestError(f"{path} is a model of another shape than the policy; give weights of this one.")
        async with self._reloading:
            await self._reload(weights)
            self._shelf.reloaded = weights
        return weights.version

    async def _reload(self, weights: FullWeights) -> None:
        """Exchanges the weights while nothing runs; the engine forgets all it has computed with the ones before."""
        before = self._reloaded.path if self._reloaded else self._policy
        try:
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._read_weights(str(weights.path))
                self._reloaded = weights
            except Exception as error:
                if isinstance(error, EngineDeadError):
                    raise
                await self._read_weights(str(before))
                raise BadRequestError(f"The engine cannot read the weights {weights.path}: {error}") from error
            finally:
                await self._engine.resume_generation()
        except EngineDeadError as error:
            raise EngineDiedError("The engine has died; try again in a few seconds.") from error

    async def _read_weights(self, path: str) -> None:
        await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        await self._engine.collective_rpc("repack_heads")
        await self._engine.reset_prefix_cache()

    def weights_version(self, loaded: LoadedAdapter | None) -> str | None:
        """What a candidate that ends now was drawn with; full weights change only while none is drawn."""
        if loaded is not None:
            return loaded.adapter.version
        return self._reloaded.version if self._reloaded else None

    async def close(self) -> None:
        await self.adapters.close()
        self._engine.shutdown()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._processes.end)

    async def encode(self, prompt: Prompt, after: Candidate | None = None) -> list[int]:
        """The ids of the prompt's tokens, through the model's own chat template for a conversation, and those `after`.

        Raises:
            BadRequestError: there is no chat template, it refuses the conversation, or nothing is left to continue.
            ContextLengthError: no room is left for a single new token.
        """
        loop = asyncio.get_running_loop()
        token_ids = await loop.run_in_executor(self._encoding, encode_prompt, self._tokenizer, prompt)
        if not token_ids:
            raise BadRequestError("The prompt is empty; say at least one word.", param="prompt")
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
        self, sampling: SamplingParams, index: int, given_tokens: int, kind: RequestOutputKind
    ) -> VllmSamplingParams:
        """vLLM's parameters for candidate `index`."""
        structured = None
        if sampling.json_schema is not None:
            structured = (
                StructuredOutputsParams(json=sampling.json_schema)
                if sampling.json_schema
                else StructuredOutputsParams(json_object=True)
            )
        return VllmSamplingParams(
            max_tokens=sampling.most_new_tokens(self._max_model_len - given_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            seed=None if sampling.seed is None else sampling.seed + index,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=0 if sampling.logprobs is None and sampling.likelihood else sampling.logprobs,
            structured_outputs=structured,
            output_kind=kind,
        )

    def request(
        self, prompt: TokensInput, params: VllmSamplingParams, loaded: LoadedAdapter | None
    ) -> AsyncIterator[RequestOutput]:
        adapter = loaded.request if loaded else None
        return self._engine.generate(prompt, params, request_id=uuid.uuid4().hex, lora_request=adapter)


class _LoraCalls:
    """The engine's calls for adapters, with its errors in our words."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    async def add(self, name: str, number: int, path: str) -> LoRARequest:
        request = LoRARequest(name, number, path)
        try:
            await self._engine.add_lora(request)
        except EngineDeadError as error:
            raise EngineDiedError("The engine has died; try again in a few seconds.") from error
        except Exception as error:
            raise EngineRefusedError(str(error).removeprefix("Call to add_lora method failed: ")) from error
        return request

    async def remove(self, number: int) -> None:
        try:
            await self._engine.remove_lora(number)
        except EngineDeadError as error:
            raise EngineDiedError("The engine has died; try again in a few seconds.") from error


class VllmGeneration:
    """N engine requests for one prompt; each has a task that reads its outputs."""

    def __init__(
        self, generator: VllmGenerator, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self.prompt_tokens = 0
        self._generator = generator
        self._prompt = prompt
        self._sampling = sampling
        self._kind = RequestOutputKind.DELTA if stream_partial else RequestOutputKind.FINAL_ONLY
        self._n = n
        self._outcomes = OutcomeQueue(n)
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._adapter: LoadedAdapter | None = None

    async def __aenter__(self) -> Self:
        await self._generator.check_ready()
        token_ids = await self._generator.encode(self._prompt, self._sampling.after)
        self.prompt_tokens = len(token_ids) - self._sampling.begun_tokens
        prompt = tokens_input(token_ids)
        try:
            params_N = [
                self._generator.params(self._sampling, index, len(token_ids), self._kind) for index in range(self._n)
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
        growing = CandidateBuilder(index, self._sampling)
        try:
            async for output in self._generator.request(prompt, params, self._adapter):
                candidate = growing.extend(output.outputs[0], self._generator.weights_version(self._adapter))
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
        except Exception as error:  # noqa: BLE001 (one candidate's failure is the reply's to count, not the request's end)
            self._outcomes.put(FailedCandidate(index, str(error) or type(error).__name__))
