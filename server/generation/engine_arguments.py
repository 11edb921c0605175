"""The arguments and environment variables with which vLLM's engine starts: pure functions that do not import vllm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reranker.models.device import computes_bfloat16
from server.generation.lora import MAX_VERSIONS
from server.generation.structured_output import BACKEND

GIB = 1 << 30
OWNER_PID_VARIABLE = "ENGINE_OWNER_PID"
"""Environment variable of an engine's processes: the id of the process that they must not outlive."""
WORKER_EXTENSION = "server.generation.vllm_engine.WorkerExtension"
"""The class that vLLM mixes into workers that are Ray actors, by its import path."""
WATCHED_WORKER_EXTENSION = "server.generation.worker_watchdog.WatchedWorkerExtension"
"""The class that vLLM mixes into all other workers: they end with the process that started the engine."""
THREAD_BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's environment variable that binds the threads of a CPU worker to cores."""
IN_CORE_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the worker in the engine's core process.

vLLM gives a CPU worker a process of its own, to bind its threads to cores. Core and worker then wait for each other in
loops that never sleep, beside as many threads as there are cores, and they keep looping for a second after the last
token, while a reward model needs those cores (benchmarks/LOG.md). The full name is needed: on a CPU vLLM takes the
short name, uni, for mp. With VLLM_CPU_OMP_THREADS_BIND set, the worker keeps its own process.
"""
VERSIONS_PER_STEP = 2
"""Adapters in one step of the engine: the newest, and the previous one while its requests end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the settings decide about an engine.

    `model` is a directory or hub id. `block_size` and `kv_cache_gib` apply to a CPU only. `tensor_parallel_size`
    devices hold a part of the model each. `on_ray` says that this process is a Ray actor. With `max_lora_rank` adapters
    up to that rank can be loaded. With `tempered_logprobs` the returned log-probabilities are those of the sampled
    distribution, softmax(logits / temperature); OpenAI's are softmax(logits).
    """

    model: str
    device: str
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_cache_gib: float = 2.0
    block_size: int | None = None
    max_num_seqs: int = 128
    tensor_parallel_size: int = 1
    on_ray: bool = False
    trust_remote_code: bool = False
    max_lora_rank: int | None = None
    tempered_logprobs: bool = False


def engine_arguments(
    options: EngineOptions, supported_lora_ranks: Sequence[int], *, threads_are_bound: bool
) -> dict[str, Any]:
    """The fields of vLLM's AsyncEngineArgs, by name.

    `supported_lora_ranks` are the sizes of vLLM's adapter buffers. `threads_are_bound` says whether
    `THREAD_BINDING_VARIABLE` is set.
    """
    on_cpu = options.device == "cpu"
    shards_are_actors = options.on_ray and options.tensor_parallel_size > 1
    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": pick_dtype(options.device) if options.dtype == "auto" else options.dtype,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size if on_cpu else None,
        "kv_cache_memory_bytes": int(options.kv_cache_gib * GIB) if on_cpu else None,
        "max_num_seqs": options.max_num_seqs,
        "tensor_parallel_size": options.tensor_parallel_size,
        "distributed_executor_backend": _executor(options, threads_are_bound),
        "worker_extension_cls": WORKER_EXTENSION if shards_are_actors else WATCHED_WORKER_EXTENSION,
        "enable_prefix_caching": True,
        # On a CPU a seeded prompt that is read in chunks ends the engine ("CPU Generator does not use offset"). There
        # a prompt waits until all of it fits a step, and a step is at least as large as the context.
        "enable_chunked_prefill": False if on_cpu else None,
        "enforce_eager": on_cpu,
        "trust_remote_code": options.trust_remote_code,
        "disable_log_stats": True,
        "structured_outputs_config": {"backend": BACKEND},
        "logprobs_mode": "processed_logprobs" if options.tempered_logprobs else "raw_logprobs",
    }
    if options.max_lora_rank is not None:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": pick_max_lora_rank(options.max_lora_rank, supported_lora_ranks),
            "max_loras": VERSIONS_PER_STEP,
            "max_cpu_loras": MAX_VERSIONS,
        }
    return arguments


def default_environment(device: str) -> dict[str, str]:
    """The environment variables of vLLM and torch that are set where the user has not set them."""
    variables = {
        # The engine logs about a hundred lines at each start; VLLM_LOGGING_LEVEL=INFO brings them back.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        # A worker that is closing has nothing to save. vLLM's default waits 5 s for each, one after the other.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, so it must not fork
    }
    if device == "cpu":
        # On a CPU only the ranking of log-probabilities would be compiled: 20 s of g++ in the first request, or a
        # failing engine where there is no compiler, for an operation of half a millisecond.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    return variables


def pick_dtype(device: str) -> str:
    """The precision that this device computes fastest.

    Every CUDA device that vLLM supports has half-precision units. A CPU without AVX512-BF16 or AMX emulates bfloat16:
    float32 then gives three times the tokens a second at N=32.
    """
    if device == "cuda":
        return "auto"
    return "bfloat16" if computes_bfloat16(device) else "float32"


def pick_max_lora_rank(rank: int, supported_ranks: Sequence[int]) -> int:
    """The smallest of the supported ranks that holds an adapter of this rank; the largest where none does."""
    ranks = sorted(supported_ranks)
    return next((supported for supported in ranks if supported >= rank), ranks[-1])


def _executor(options: EngineOptions, threads_are_bound: bool) -> str | None:
    """What runs the engine's workers; None leaves the choice to vLLM.

    On Ray the shards are actors in the bundles that belong to this process's replica. Ray ends them with their owner,
    on whichever machine they run.
    """
    if options.tensor_parallel_size > 1:
        return "ray" if options.on_ray else None
    return IN_CORE_EXECUTOR if options.device == "cpu" and not threads_are_bound else None
