"""With adapters and reloaded weights the engine gives the tokens and log-probabilities of transformers and PEFT."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.candidate import Candidate, Prompt
from reranker.models.bundled import resolve
from server import factory
from server.config import Settings
from server.errors import BadRequestError, NotReadyError
from server.generation.base import Generator, SamplingParams
from server.generation.weight_store import version_at
from tests.end_to_end.served import START_TIMEOUT_S, Served, engine_behind
from tests.end_to_end.test_best_of_n import MODEL, OPENING
from tests.support.tiny_models import ENGINE_HEAD_DIM, save_tiny_adapter, save_tiny_policy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(START_TIMEOUT_S + 120),
]

PROMPT = "The film was a delight from start to finish and the cast was great. The film was dull, far too long. " * 3
"""Longer than a block of the engine's cache, so that a stale block would be used."""
NEW_TOKENS = 8

module_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass
class AdapterSetup:
    """A policy, two adapters for it, and the generator that serves them."""

    policy: Path
    first: Path
    second: Path
    generator: Generator = field(init=False)

    def expected(self, adapter: Path | None = None) -> tuple[list[int], list[float]]:
        """The greedy tokens of transformers and PEFT, and the log-probability of each."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.policy)
        model: Any = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        prompt_T = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        assert prompt_T.shape[1] > 32
        token_ids_T = prompt_T[0]
        logprobs: list[float] = []
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logprobs_V = model(token_ids_T[None]).logits[0, -1].log_softmax(-1)
                token = int(logprobs_V.argmax())
                logprobs.append(float(logprobs_V[token]))
                token_ids_T = torch.cat([token_ids_T, torch.tensor([token])])
        return token_ids_T[prompt_T.shape[1] :].tolist(), logprobs

    async def sample(self) -> Candidate:
        """The engine's greedy candidate."""
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0)
        async with self.generator.generate(Prompt(text=PROMPT), sampling, 1) as generation:
            ((candidate,),) = [outcomes async for outcomes in generation]
        assert isinstance(candidate, Candidate)
        return candidate

    async def assert_agrees(self, version: str | None, adapter: Path | None = None) -> None:
        tokens, logprobs = self.expected(adapter)
        """The engine's greedy candidate has this version, and the tokens of transformers and PEFT."""
        candidate = await self.sample()
        assert candidate.logprobs is not None
        count = len(candidate.token_ids)  # fewer where the text ended
        assert list(candidate.token_ids) == tokens[:count]
        assert [token.logprob for token in candidate.logprobs] == pytest.approx(logprobs[:count], abs=1e-4)
        assert candidate.weights_version == version


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setup(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AdapterSetup]:
    root = tmp_path_factory.mktemp("adapters")
    policy = save_tiny_policy(root / "policy", head_dim=ENGINE_HEAD_DIM)
    setup = AdapterSetup(
        policy,
        save_tiny_adapter(root / "first", policy, seed=1),
        save_tiny_adapter(root / "second", policy, seed=2, rank=2),
    )
    settings = Settings(
        model=str(policy), adapter=setup.first, max_lora_rank=8, dtype="float32", kv_cache_gib=0.25, max_num_seqs=16
    )
    async with factory.started_generator(settings) as setup.generator:
        yield setup


@module_loop
async def test_the_adapter_of_the_settings_equals_peft(setup: AdapterSetup) -> None:
    await setup.assert_agrees(version_at("load_adapter", setup.first), setup.first)
    assert setup.expected(setup.first) != setup.expected()


@module_loop
async def test_a_new_adapter_applies_to_the_next_request_and_reuses_no_cached_block(setup: AdapterSetup) -> None:
    for adapter in (setup.second, setup.first, setup.second):
        version = await setup.generator.load_adapter(str(adapter))
        for _ in range(2):  # the second time from the cache
            await setup.assert_agrees(version, adapter)


@module_loop
async def test_a_running_request_keeps_its_version(setup: AdapterSetup) -> None:
    before = await setup.generator.load_adapter(str(setup.first))
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=0, logit_bias=((0, -100.0),))
    async with setup.generator.generate(Prompt(text="The"), sampling, 4, stream_partial=True) as generation:
        groups = aiter(generation)
        await anext(groups)
        after = await setup.generator.load_adapter(str(setup.second))
        await setup.assert_agrees(after, setup.second)
        outcomes = [outcome async for group in groups for outcome in group]
    assert {outcome.weights_version for outcome in outcomes if isinstance(outcome, Candidate)} == {before}
    engine = engine_behind(setup.generator)
    await engine.adapters.removals_done()
    assert len(await engine._engine.list_loras()) == 1, "the engine has removed the version without requests"


@module_loop
async def test_a_misfitting_adapter_is_refused_and_the_previous_stays(setup: AdapterSetup, tmp_path: Path) -> None:
    version = await setup.generator.load_adapter(str(setup.first))
    other = save_tiny_policy(tmp_path / "other", head_dim=ENGINE_HEAD_DIM, num_layers=3)
    refused = {
        save_tiny_adapter(tmp_path / "rank", setup.policy, rank=16): "--max-lora-rank 16",
        save_tiny_adapter(tmp_path / "base", other): "which the policy does not have",
        save_tiny_adapter(tmp_path / "dora", setup.policy, use_dora=True): "does not yet support DoRA",
    }
    for path, message in refused.items():
        with pytest.raises(BadRequestError, match=message):
            await setup.generator.load_adapter(str(path))
    await setup.assert_agrees(version, setup.first)


@module_loop
async def test_the_engine_after_a_dead_one_has_the_newest_adapter(setup: AdapterSetup, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "newest", setup.policy, seed=7)
    version = await setup.generator.load_adapter(str(adapter))
    expected = setup.expected(adapter)
    save_tiny_adapter(adapter, setup.policy, seed=8)  # the trainer continues
    engine_behind(setup.generator)._processes._processes[0].kill()
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                candidate = await setup.sample()
            except NotReadyError:
                await asyncio.sleep(0.2)
            else:
                break
    tokens = expected[0][: len(candidate.token_ids)]
    assert (list(candidate.token_ids), candidate.weights_version) == (tokens, version)


@module_loop
async def test_a_server_with_adapters_refuses_to_reload_weights(setup: AdapterSetup) -> None:
    with pytest.raises(BadRequestError, match="without --adapter"):
        await setup.generator.reload_weights(str(setup.policy))


def test_reloaded_weights_are_sampled_and_so_are_the_original_ones_after_another_reload(
    served: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    """In the server that the other tests share; the original weights are reloaded at the end."""
    original = resolve(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(original)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1 + 0.2 * torch.sin(torch.arange(parameter.shape[1])))
    model.save_pretrained(tmp_path)
    prompt_T = tokenizer(OPENING, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(prompt_T, do_sample=False, max_new_tokens=8)[0, prompt_T.shape[1] :])

    def reload(path: str) -> None:
        change = served.generator.reload_weights(path)
        asyncio.run_coroutine_threadsafe(change, served.loops[0]).result(START_TIMEOUT_S)

    def text() -> str:
        reply = client.completions.create(
            model=MODEL, prompt=OPENING, temperature=0, max_tokens=8, extra_body={"best_of": 1}
        )
        return reply.choices[0].text

    before = text()
    try:
        reload(str(tmp_path))
        assert text() == expected != before
    finally:
        reload(original)
    assert text() == before


def test_weights_of_another_shape_are_refused(served: Served, tmp_path: Path) -> None:
    change = served.generator.reload_weights(str(save_tiny_policy(tmp_path)))
    with pytest.raises(BadRequestError, match="another shape"):
        asyncio.run_coroutine_threadsafe(change, served.loops[0]).result(START_TIMEOUT_S)
