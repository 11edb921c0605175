"""The engine's arguments follow from the options, the device and the thread binding."""

from typing import Any

import pytest

from server.generation import engine_arguments as module
from server.generation.engine_arguments import (
    GIB,
    IN_CORE_EXECUTOR,
    WATCHED_WORKER_EXTENSION,
    WORKER_EXTENSION,
    EngineOptions,
    default_environment,
    engine_arguments,
    pick_dtype,
    pick_max_lora_rank,
)
from server.generation.lora import MAX_VERSIONS

LORA_RANKS = (8, 16, 1, 512)


def arguments(*, device: str = "cpu", threads_are_bound: bool = False, **options: Any) -> dict[str, Any]:
    return engine_arguments(
        EngineOptions(model="policy", device=device, **options), LORA_RANKS, threads_are_bound=threads_are_bound
    )


def test_a_cpu_gets_the_cache_size_the_block_size_and_no_chunked_prefill() -> None:
    result = arguments(kv_cache_gib=1.5, block_size=16)
    assert (result["kv_cache_memory_bytes"], result["block_size"]) == (1.5 * GIB, 16)
    assert (result["enable_chunked_prefill"], result["enforce_eager"]) == (False, True)


def test_on_cuda_vllm_chooses_cache_block_size_chunked_prefill_and_executor() -> None:
    result = arguments(device="cuda", kv_cache_gib=1.5, block_size=16)
    chosen_by_vllm = ("kv_cache_memory_bytes", "block_size", "enable_chunked_prefill", "distributed_executor_backend")
    assert [result[name] for name in chosen_by_vllm] == [None] * 4
    assert (result["dtype"], result["enforce_eager"]) == ("auto", False)


def test_options_that_every_device_has_are_passed_on() -> None:
    result = arguments(dtype="float32", max_model_len=512, max_num_seqs=7, trust_remote_code=True)
    names = ("model", "dtype", "max_model_len", "max_num_seqs", "trust_remote_code", "enable_prefix_caching")
    assert [result[name] for name in names] == ["policy", "float32", 512, 7, True, True]


@pytest.mark.parametrize(
    ("options", "executor", "extension"),
    [
        ({}, IN_CORE_EXECUTOR, WATCHED_WORKER_EXTENSION),
        ({"threads_are_bound": True}, None, WATCHED_WORKER_EXTENSION),
        ({"tensor_parallel_size": 2}, None, WATCHED_WORKER_EXTENSION),
        ({"on_ray": True}, IN_CORE_EXECUTOR, WATCHED_WORKER_EXTENSION),
        ({"on_ray": True, "tensor_parallel_size": 2}, "ray", WORKER_EXTENSION),
        ({"on_ray": True, "tensor_parallel_size": 2, "device": "cuda"}, "ray", WORKER_EXTENSION),
    ],
)
def test_the_executor_follows_from_device_shards_and_ray(
    options: dict[str, Any], executor: str | None, extension: str
) -> None:
    result = arguments(**options)
    assert (result["distributed_executor_backend"], result["worker_extension_cls"]) == (executor, extension)


def test_logprobs_are_those_of_the_logits_unless_tempered() -> None:
    assert arguments()["logprobs_mode"] == "raw_logprobs"
    assert arguments(tempered_logprobs=True)["logprobs_mode"] == "processed_logprobs"


def test_adapters_are_enabled_only_with_a_rank() -> None:
    assert "enable_lora" not in arguments()
    result = arguments(max_lora_rank=9)
    assert (result["enable_lora"], result["max_lora_rank"], result["max_cpu_loras"]) == (True, 16, MAX_VERSIONS)


@pytest.mark.parametrize(("rank", "supported"), [(1, 1), (2, 8), (8, 8), (17, 512), (1000, 512)])
def test_the_smallest_supported_lora_rank_that_fits_is_picked(rank: int, supported: int) -> None:
    assert pick_max_lora_rank(rank, LORA_RANKS) == supported


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "dtype"),
    [("cuda", False, "auto"), ("cpu", True, "bfloat16"), ("cpu", False, "float32")],
)
def test_the_dtype_is_the_fastest_of_the_device(
    device: str, has_bfloat16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "computes_bfloat16", lambda _: has_bfloat16)
    assert pick_dtype(device) == dtype


def test_only_a_cpu_turns_compilation_off() -> None:
    assert default_environment("cpu") == default_environment("cuda") | {"TORCH_COMPILE_DISABLE": "1"}
    assert "TORCH_COMPILE_DISABLE" not in default_environment("cuda")


def test_structured_output_has_one_backend_from_the_start() -> None:
    assert arguments()["structured_outputs_config"] == {"backend": "guidance"}
