"""A generator that samples a tiny policy with transformers, and loads adapters as the engine does, in milliseconds.

It caches each prompt's keys and values until the weights change, as vLLM does. `fault` breaks one step:

    stale           a new adapter gets a version and is not loaded
    wrong scale     an adapter is loaded at twice its scale
    stale prefix    the cache of an earlier version is used again
"""

import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.candidate import Candidate, Prompt, TokenLogprob
from server.generation.base import Outcome, SamplingParams
from server.generation.prompt_tokens import encode_prompt
from server.generation.weight_store import full_weights, version_at

Fault = Literal["stale", "wrong scale", "stale prefix"]


class TorchGenerator:
    """Samples from softmax(logits / temperature), with one uniform number per token from the request's seed."""

    model = "torch"

    def __init__(self, policy: Path, adapter: Path | None = None) -> None:
        self.fault: Fault | None = None
        self.versions: list[str] = []
        self.prompts: list[Prompt] = []
        self.tokenizer: Any = AutoTokenizer.from_pretrained(policy)
        self.policy: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        if adapter is not None:
            self.policy = get_peft_model(self.policy, LoraConfig.from_pretrained(adapter)).eval()
        self._prefixes: dict[str, Any] = {}

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "TorchGeneration":
        self.prompts.append(prompt)
        return TorchGeneration(self, prompt, sampling, n)

    async def check_ready(self) -> None:
        """Always ready."""

    async def load_adapter(self, path: str) -> str:
        version = version_at("load_adapter", Path(path))
        self.versions.append(version)
        if self.fault != "stale":
            weights = load_file(Path(path) / "adapter_model.safetensors")
            scale = 2.0 if self.fault == "wrong scale" else 1.0
            scaled = {name: weight * (scale if "lora_B" in name else 1.0) for name, weight in weights.items()}
            set_peft_model_state_dict(self.policy, scaled)
        if self.fault != "stale prefix":
            self._prefixes.clear()
        return version

    async def reload_weights(self, path: str) -> str:
        self.versions.append(full_weights(Path(path)).version)
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._prefixes.clear()
        return self.versions[-1]

    async def close(self) -> None:
        """Nothing to free."""

    @torch.inference_mode()
    def sample(self, prompt_ids: list[int], sampling: SamplingParams, n: int) -> list[Candidate]:
        assert sampling.max_tokens is not None
        uniform_N_T = torch.rand(
            n, sampling.max_tokens, generator=torch.Generator().manual_seed(sampling.seed or 0), dtype=torch.float64
        )
        cache = copy.deepcopy(self._prefix(prompt_ids[:-1]))
        cache.batch_repeat_interleave(n)
        input_ids = torch.full((n, 1), prompt_ids[-1])
        ids: list[list[int]] = [[] for _ in range(n)]
        logprobs: list[list[float]] = [[] for _ in range(n)]
        ended = [False] * n
        for position in range(sampling.max_tokens):
            logits = self.policy(input_ids=input_ids, past_key_values=cache).logits[:, -1]
            logprobs_N_V = (logits.double() / sampling.temperature).log_softmax(-1)
            below_N_V = logprobs_N_V.exp().cumsum(-1) < uniform_N_T[:, position, None]
            tokens_N_1 = below_N_V.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
            logprobs_N_1 = logprobs_N_V.gather(-1, tokens_N_1)
            steps = zip(tokens_N_1[:, 0].tolist(), logprobs_N_1[:, 0].tolist(), strict=True)
            for row, (token, logprob) in enumerate(steps):
                if not ended[row]:
                    ids[row].append(token)
                    logprobs[row].append(logprob)
                    ended[row] = token == self.tokenizer.eos_token_id
            input_ids = tokens_N_1
        return [self._candidate(row, ids[row], logprobs[row], ended[row]) for row in range(n)]

    def _prefix(self, token_ids: list[int]) -> Any:
        key = json.dumps(token_ids)
        if key not in self._prefixes:
            self._prefixes[key] = self.policy(input_ids=torch.tensor([token_ids]), use_cache=True).past_key_values
        return self._prefixes[key]

    def _candidate(self, index: int, token_ids: list[int], logprobs: list[float], ended: bool) -> Candidate:
        return Candidate(
            index=index,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            num_tokens=len(token_ids),
            token_ids=tuple(token_ids),
            cumulative_logprob=sum(logprobs),
            finish_reason="stop" if ended else "length",
            logprobs=tuple(TokenLogprob("", logprob) for logprob in logprobs),
            weights_version=self.versions[-1] if self.versions else None,
        )


class TorchGeneration:
    """N candidates that are sampled together."""

    def __init__(self, generator: TorchGenerator, prompt: Prompt, sampling: SamplingParams, n: int) -> None:
        self._generator = generator
        self._sampling = sampling
        self._n = n
        self._prompt_ids = encode_prompt(generator.tokenizer, prompt)
        self.prompt_tokens = len(self._prompt_ids)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to cancel."""

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        yield [*self._generator.sample(self._prompt_ids, self._sampling, self._n)]

    async def cancel(self, index: int) -> None:
        """Nothing to cancel."""
