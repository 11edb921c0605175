"""Adapters and reloaded weights in the real engine: the tokens and log-probabilities of transformers and PEFT."""

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
"""Longer than a block of the engine's cache, so that a stale one would be met."""
NEW_TOKENS = 8

module_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass
class World:
    """A policy, two adapters over it, and the generator that is to serve them."""

    policy: Path
    first: Path
    second: Path
    generator: Generator = field(init=False)

    def expected(self, adapter: Path | None = None) -> tuple[list[int], list[float]]:
        """What transformers and PEFT draw greedily, and the log-probability of each token."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.policy)
        model: Any = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        prompt_T = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        assert prompt_T.shape[1] > 32
        whole_T = prompt_T[0]
        logprobs: list[float] = []
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logprobs_V = model(whole_T[None]).logits[0, -1].log_softmax(-1)
                token = int(logprobs_V.argmax())
                logprobs.append(float(logprobs_V[token]))
                whole_T = torch.cat([whole_T, torch.tensor([token])])
        return whole_T[prompt_T.shape[1] :].tolist(), logprobs

    async def draw(self) -> Candidate:
        """The engine's greedy candidate."""
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0)
        async with self.generator.generate(Prompt(text=PROMPT), sampling, 1) as generation:
            ((candidate,),) = [outcomes async for outcomes in generation]
        assert isinstance(candidate, Candidate)
        return candidate

    async def agrees(self, version: str | None, adapter: Path | None = None) -> None:
        tokens, logprobs = self.expected(adapter)
        drawn = await self.draw()
        assert drawn.logprobs is not None
        count = len(drawn.token_ids)  # fewer where the text ended
        assert list(drawn.token_ids) == tokens[:count]
        assert [one.logprob for one in drawn.logprobs] == pytest.approx(logprobs[:count], abs=1e-4)
        assert drawn.weights_version == version


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    root = tmp_path_factory.mktemp("world")
    policy = save_tiny_policy(root / "policy", head_dim=ENGINE_HEAD_DIM)
    world = World(
        policy,
        save_tiny_adapter(root / "first", policy, seed=1),
        save_tiny_adapter(root / "second", policy, seed=2, rank=2),
    )
    settings = Settings(
        model=str(policy), adapter=world.first, max_lora_rank=8, dtype="float32", kv_cache_gib=0.25, max_num_seqs=16
    )
    async with factory.started_generator(settings) as world.generator:
        yield world


@module_loop
async def test_the_adapter_of_the_settings_equals_peft(world: World) -> None:
    await world.agrees(version_at("load_adapter", world.first), world.first)
    assert world.expected(world.first) != world.expected()


@module_loop
async def test_a_swap_changes_the_next_request_and_reuses_nothing_of_the_one_before(world: World) -> None:
    for adapter in (world.second, world.first, world.second):
        version = await world.generator.load_adapter(str(adapter))
        for _ in range(2):  # the second time from the cache
            await world.agrees(version, adapter)


@module_loop
async def test_a_request_under_way_keeps_its_version(world: World) -> None:
    before = await world.generator.load_adapter(str(world.first))
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=0, logit_bias=((0, -100.0),))
    async with world.generator.generate(Prompt(text="The"), sampling, 4, stream_partial=True) as generation:
        looks = aiter(generation)
        await anext(looks)
        after = await world.generator.load_adapter(str(world.second))
        await world.agrees(after, world.second)
        ended = [one async for outcomes in looks for one in outcomes if isinstance(one, Candidate)]
    assert {one.weights_version for one in ended} == {before}
    engine = engine_behind(world.generator)
    await engine.adapters.removals_done()
    assert len(await engine._engine.list_loras()) == 1, "the version that nobody uses has left the engine"


@module_loop
async def test_what_does_not_fit_is_refused_and_what_was_served_goes_on(world: World, tmp_path: Path) -> None:
    version = await world.generator.load_adapter(str(world.first))
    other = save_tiny_policy(tmp_path / "other", head_dim=ENGINE_HEAD_DIM, num_layers=3)
    refused = {
        save_tiny_adapter(tmp_path / "rank", world.policy, rank=16): "--max-lora-rank 16",
        save_tiny_adapter(tmp_path / "base", other): "which the policy does not have",
        save_tiny_adapter(tmp_path / "dora", world.policy, use_dora=True): "does not yet support DoRA",
    }
    for path, told in refused.items():
        with pytest.raises(BadRequestError, match=told):
            await world.generator.load_adapter(str(path))
    await world.agrees(version, world.first)


@module_loop
async def test_an_engine_that_dies_is_followed_by_one_with_the_newest_adapter(world: World, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "newest", world.policy, seed=7)
    version = await world.generator.load_adapter(str(adapter))
    expected = world.expected(adapter)
    save_tiny_adapter(adapter, world.policy, seed=8)  # whoever trains goes on
    engine_behind(world.generator)._processes._processes[0].kill()
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                drawn = await world.draw()
            except NotReadyError:
                await asyncio.sleep(0.2)
            else:
                break
    assert (list(drawn.token_ids), drawn.weights_version) == (expected[0][: len(drawn.token_ids)], version)


@module_loop
async def test_with_adapters_weights_are_not_reloaded(world: World) -> None:
    with pytest.raises(BadRequestError, match="without --adapter"):
        await world.generator.reload_weights(str(world.policy))


def test_reloaded_weights_draw_and_so_do_the_first_ones_again(
    served: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    """In the server of the other tests, which has its own weights back at the end."""
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
