"""Adapters and reloaded weights in the real engine: the tokens and log-probabilities of transformers and PEFT."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.candidate import Candidate, Prompt
from server import assembly
from server.config import Settings
from server.errors import BadRequestError, NotReadyError
from server.generation.base import Generator, Sampling
from server.generation.supervised import SupervisedGenerator
from server.generation.vllm_engine import VllmGenerator
from server.generation.weights import full_weights, version_at
from tests.end_to_end.served import START_TIMEOUT_S
from tests.tiny_models import save_tiny_adapter, save_tiny_policy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(START_TIMEOUT_S + 120),
]

PROMPT = "The film was a delight from start to finish and the cast was great. The film was dull, far too long. " * 3
"""Longer than a block of the engine's cache, so that a stale one would be met."""
NEW_TOKENS = 8


@dataclass
class World:
    """A policy, two adapters over it, other weights for it, and the generator that is to serve all of them."""

    policy: Path
    first: Path
    second: Path
    other_weights: Path
    generator: Generator = field(init=False)

    def expected(self, adapter: Path | None = None, policy: Path | None = None) -> tuple[list[int], list[float]]:
        """What transformers and PEFT draw greedily, and the log-probability of each token."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.policy)
        model: Any = AutoModelForCausalLM.from_pretrained(policy or self.policy, dtype=torch.float32)
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
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0)
        async with self.generator.generate(Prompt(text=PROMPT), sampling, 1) as generation:
            ((candidate,),) = [outcomes async for outcomes in generation]
        assert isinstance(candidate, Candidate)
        return candidate

    async def agrees(self, version: str | None, adapter: Path | None = None, policy: Path | None = None) -> None:
        tokens, logprobs = self.expected(adapter, policy)
        drawn = await self.draw()
        assert drawn.logprobs is not None
        count = len(drawn.token_ids)  # fewer where the text ended
        assert list(drawn.token_ids) == tokens[:count]
        assert [one.logprob for one in drawn.logprobs] == pytest.approx(logprobs[:count], abs=1e-4)
        assert drawn.weights_version == version


def engine_of(world: World) -> VllmGenerator:
    return cast(VllmGenerator, cast(SupervisedGenerator, world.generator).engine)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    root = tmp_path_factory.mktemp("world")
    policy = save_tiny_policy(root / "policy", head_dim=32)
    world = World(
        policy,
        save_tiny_adapter(root / "first", policy, seed=1),
        save_tiny_adapter(root / "second", policy, seed=2, rank=2),
        save_tiny_policy(root / "other", head_dim=32, seed=3),
    )
    settings = Settings(
        model=str(policy), adapter=world.first, max_lora_rank=8, dtype="float32", kv_cache_gib=0.25, max_num_seqs=16
    )
    async with assembly.started_generator(settings) as world.generator:
        yield world


async def test_the_adapter_of_the_settings_equals_peft(world: World) -> None:
    await world.agrees(version_at("load_adapter", world.first), world.first)
    assert world.expected(world.first) != world.expected()


async def test_a_swap_changes_the_next_request_and_reuses_nothing_of_the_one_before(world: World) -> None:
    for adapter in (world.second, world.first, world.second):
        version = await world.generator.load_adapter(str(adapter))
        for _ in range(2):  # the second time from the cache
            await world.agrees(version, adapter)


async def test_a_request_under_way_keeps_its_version(world: World) -> None:
    before = await world.generator.load_adapter(str(world.first))
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=0, logit_bias=((0, -100.0),))
    async with world.generator.generate(Prompt(text="The"), sampling, 4, snapshots=True) as generation:
        looks = aiter(generation)
        await anext(looks)
        after = await world.generator.load_adapter(str(world.second))
        await world.agrees(after, world.second)
        ended = [one async for outcomes in looks for one in outcomes if isinstance(one, Candidate)]
    assert {one.weights_version for one in ended} == {before}
    engine = engine_of(world)
    await engine.adapters.settled()
    assert len(await engine._engine.list_loras()) == 1, "the version that nobody uses has left the engine"


async def test_what_does_not_fit_is_refused_and_what_was_served_goes_on(world: World, tmp_path: Path) -> None:
    version = await world.generator.load_adapter(str(world.first))
    other = save_tiny_policy(tmp_path / "other", head_dim=32, num_layers=3)
    refused = {
        save_tiny_adapter(tmp_path / "rank", world.policy, rank=16): "--max-lora-rank 16",
        save_tiny_adapter(tmp_path / "base", other): "which the policy does not have",
        save_tiny_adapter(tmp_path / "dora", world.policy, use_dora=True): "does not yet support DoRA",
    }
    for path, told in refused.items():
        with pytest.raises(BadRequestError, match=told):
            await world.generator.load_adapter(str(path))
    with pytest.raises(BadRequestError, match="another shape"):
        await world.generator.reload_weights(str(other))
    await world.agrees(version, world.first)


async def test_reloaded_weights_are_drawn_with_and_an_engine_that_dies_is_followed_by_one_with_the_same(
    world: World,
) -> None:
    adapter = await world.generator.load_adapter(str(world.second))
    reloaded = await world.generator.reload_weights(str(world.other_weights))
    assert reloaded == full_weights(world.other_weights).version
    await world.agrees(f"{reloaded}+{adapter}", world.second, world.other_weights)

    engine_of(world)._processes._processes[0].kill()
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            try:
                await world.agrees(f"{reloaded}+{adapter}", world.second, world.other_weights)
            except NotReadyError:
                await asyncio.sleep(0.2)
            else:
                break
