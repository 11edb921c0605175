import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from reranker.models.prefix_sharing import PrefixSharingTrunk
from reranker.models.rendering import Rendered, Renderer, pad
from reranker.models.reward_model import RewardModel, forward_rewards
from tests.support.tiny_models import CONTEXT_LENGTH, draw_weights, tiny_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = int(TOKENIZER.eos_token_id or 0)
assert TOKENIZER.pad_token_id == EOS
WINDOW = 12

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"head_dim": 8}),
    "mistral with a window": (MistralConfig, {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def classifier(family: str, **more: Any) -> Any:
    kind, options = FAMILIES[family]
    config = kind(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        pad_token_id=EOS,
        num_labels=1,
        **(options | more),
    )
    return draw_weights(AutoModelForSequenceClassification.from_config(config), seed=0).eval()


def reward_model(model: Any) -> RewardModel:
    return RewardModel("tiny", model, Renderer(TOKENIZER, "chat", CONTEXT_LENGTH), torch.device("cpu"))


def tokens(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, len(TOKENIZER), (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def continued(prompt: Sequence[int], *candidates: Sequence[int]) -> list[Rendered]:
    return [Rendered((*prompt, *candidate), prompt_length=len(prompt)) for candidate in candidates]


LONG = tokens(30, seed=1)
MIXED = [
    *continued(LONG, tokens(9, 2), tokens(1, 3), (EOS,), tokens(40, 4), (5, EOS, 7), ()),
    *continued(tokens(3, 5), tokens(20, 6), tokens(1, 7)),
    *continued((), tokens(8, 8), (9,)),
    *continued(tokens(CONTEXT_LENGTH - 1, 9), (10,), (11,)),
    *continued((EOS, EOS), (EOS,), tokens(5, 10)),
]
"""Prompts that are long, short, empty and almost as long as the context; candidates of no token, of one, of padding."""


def padded_rewards(model: Any, batch: Sequence[Rendered], *, left: bool) -> list[float]:
    input_ids, mask = pad(batch, pad_id=EOS)
    if left:
        for row, rendered in enumerate(batch):
            shift = input_ids.shape[1] - len(rendered.token_ids)
            input_ids[row], mask[row] = input_ids[row].roll(shift), mask[row].roll(shift)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        trunk_states = model.base_model(input_ids=input_ids, attention_mask=mask, position_ids=positions)
        indices = torch.arange(input_ids.shape[1])
        last = (mask * indices).argmax(1)
        return list(model.score(trunk_states.last_hidden_state[torch.arange(len(batch)), last])[:, 0].tolist())


def reward_alone(model: Any, rendered: Rendered) -> float:
    token_ids = torch.tensor([rendered.token_ids])
    return float(forward_rewards(model, token_ids, torch.ones_like(token_ids))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_same_alone_in_a_padded_batch_and_with_its_prompt_shared(family: str) -> None:
    model = classifier(family)
    with torch.inference_mode():
        alone = [reward_alone(model, rendered) for rendered in MIXED]
    padded = {left: padded_rewards(model, MIXED, left=left) for left in (False, True)}
    sharing = reward_model(model)
    assert sharing.shares_prompts
    assert len({round(reward, 2) for reward in alone}) > len(MIXED) // 2  # every token moves the score
    assert sharing.score(MIXED) == pytest.approx(alone, abs=1e-4)
    assert sharing.score(MIXED) == pytest.approx(alone, abs=1e-4), "now that the prompts are cached"
    assert [sharing.score([rendered])[0] for rendered in MIXED] == pytest.approx(alone, abs=1e-4)
    assert padded[False] == pytest.approx(alone, abs=1e-4)
    assert padded[True] == pytest.approx(alone, abs=1e-4)


def test_a_prompt_is_computed_once_and_then_cached() -> None:
    model = reward_model(classifier("llama"))
    batch = continued(LONG, tokens(9, 2), tokens(4, 3))
    other = continued(tokens(7, 4), tokens(2, 5))
    computed = [[result.computed_tokens for result in model.compute(items)] for items in (batch, batch[:1] + other)]
    assert computed == [[30 + 9, 4], [9, 7 + 2]]


def grown(prompt: Sequence[int], *lengths: int, seed: int = 0) -> list[Rendered]:
    """One candidate at each of these lengths, rendered with EOS at the end. All but the last are beginnings."""
    text = tokens(max(lengths), seed)
    ids = [(*prompt, *text[:length], EOS) for length in lengths]
    return [Rendered(token_ids, len(prompt), is_beginning=token_ids is not ids[-1]) for token_ids in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rest_of_a_continued_beginning_is_computed(family: str) -> None:
    model = classifier(family)
    growing = [grown(LONG, 6, 14, 20, seed=seed) for seed in (2, 3)]
    with torch.inference_mode():
        alone = [[reward_alone(model, rendered)] for steps in growing for rendered in steps]
    sharing = reward_model(model)
    results = [sharing.compute(list(step)) for step in zip(*growing, strict=True)]
    assert [[result.computed_tokens for result in step] for step in results] == [[37, 7], [9, 9], [7, 7]]
    rewards = [[step[candidate].reward] for candidate in (0, 1) for step in results]
    assert rewards == [pytest.approx(reward, abs=1e-4) for reward in alone]


def test_several_candidates_continue_one_beginning_and_share_its_computation() -> None:
    model = reward_model(classifier("llama"))
    (beginning, _) = grown(LONG, 16, 17)
    model.compute([beginning])
    chosen = beginning.token_ids[:-1]
    continued_once = [Rendered((*chosen, *tokens(8, seed), EOS), len(LONG), is_beginning=True) for seed in (4, 5, 6)]
    assert [result.computed_tokens for result in model.compute(continued_once)] == [9, 9, 9]
    continued_twice = [Rendered((*parent.token_ids[:-1], 7, EOS), len(LONG)) for parent in continued_once]
    assert [result.computed_tokens for result in model.compute(continued_twice)] == [2, 2, 2]
    unrelated = [Rendered((*LONG, *tokens(8, 9), EOS), len(LONG))]
    assert [result.computed_tokens for result in model.compute(unrelated)] == [9]


def test_states_do_not_depend_on_what_is_cached_and_evicted() -> None:
    """Three prompts with four candidates each, which grow at random; the cache holds only a part of them."""
    model = classifier("llama")
    cpu = torch.device("cpu")
    assert PrefixSharingTrunk.if_supported(model, cpu) is not None
    trunk, dice, saved = PrefixSharingTrunk(model.base_model, cpu, cache_tokens=70), random.Random(0), 0
    lengths = {(prompt, candidate): 0 for prompt in range(3) for candidate in range(4)}
    with torch.inference_mode():
        for _ in range(40):
            chosen = dice.sample(sorted(lengths), dice.randint(1, 5))
            batch = []
            for prompt, candidate in chosen:
                lengths[prompt, candidate] = dice.randint(1, 6) + lengths[prompt, candidate] % 30
                text = tokens(40, 10 * prompt + candidate)[: lengths[prompt, candidate]]
                ids = (*tokens(6 + prompt, prompt), *text, EOS)
                batch.append(Rendered(ids, 6 + prompt, is_beginning=dice.random() < 0.8))
            states_N_D, computed_N = trunk.scored_states(batch)
            alone_N_D = torch.cat(
                [PrefixSharingTrunk(model.base_model, cpu, 0).scored_states([rendered])[0] for rendered in batch]
            )
            torch.testing.assert_close(states_N_D, alone_N_D, atol=1e-4, rtol=0)
            saved += sum(len(rendered.token_ids) for rendered in batch) - sum(computed_N)
    assert saved > 300


def test_the_least_recently_used_prompts_are_evicted() -> None:
    model = classifier("llama")
    checked = PrefixSharingTrunk.if_supported(model, torch.device("cpu"))
    assert checked is not None
    trunk = PrefixSharingTrunk(model.base_model, torch.device("cpu"), cache_tokens=20)
    first, second, third = (continued(tokens(8, seed), (5,)) for seed in (1, 2, 3))

    def computed(batch: Sequence[Rendered]) -> int:
        with torch.inference_mode():
            return sum(trunk.scored_states(batch)[1])

    assert [computed(batch) for batch in (first, second, first, third)] == [
        9,
        9,
        1,
        9,
    ]  # 24 > 20: the second is evicted
    assert [computed(batch) for batch in (first, third, second)] == [1, 1, 9]


def test_prompts_that_do_not_fit_the_cache_are_scored_and_not_cached() -> None:
    """The first prompt of a batch is cached; the second would evict it, and the third is longer than the cache."""
    model = classifier("llama")
    assert PrefixSharingTrunk.if_supported(model, torch.device("cpu")) is not None
    trunk = PrefixSharingTrunk(model.base_model, torch.device("cpu"), cache_tokens=12)
    batch = [rendered for length in (8, 6, 20) for rendered in continued(tokens(length, length), (5,), (6, 7))]
    with torch.inference_mode():
        alone_N_D = torch.cat(
            [
                PrefixSharingTrunk(model.base_model, torch.device("cpu")).scored_states([rendered])[0]
                for rendered in batch
            ]
        )
        for expected in ([9, 2, 7, 2, 21, 2], [1, 2, 7, 2, 21, 2]):
            states_N_D, computed_N = trunk.scored_states(batch)
            assert computed_N == expected
            torch.testing.assert_close(states_N_D, alone_N_D, atol=1e-4, rtol=0)


def test_a_failed_batch_leaves_no_incomplete_cache_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama")
    sharing = reward_model(model)
    batch = continued(LONG, tokens(9, 2))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model.base_model.layers[1], "forward", fail)
        with pytest.raises(RuntimeError):
            sharing.score(batch)
    assert sharing.compute(batch)[0].computed_tokens == 39
    first, second, _ = grown(LONG, 8, 16, 17)
    sharing.compute([first])
    with monkeypatch.context() as patched:
        patched.setattr(model.base_model.layers[1], "forward", fail)
        with pytest.raises(RuntimeError):
            sharing.score([second])
    assert sharing.compute([second])[0].computed_tokens == 9


class RunningSum(torch.nn.Module):
    """A layer with a state that runs along the row, as in a recurrent trunk."""

    def forward(self, states_N_T_D: torch.Tensor) -> torch.Tensor:
        return states_N_T_D.cumsum(dim=1)


def encoder() -> Any:
    config = tiny_config("bert", TOKENIZER, num_labels=1)
    return draw_weights(AutoModelForSequenceClassification.from_config(config), seed=0)


def custom_attention() -> Any:
    config = BloomConfig(vocab_size=len(TOKENIZER), hidden_size=32, n_layer=2, n_head=4, pad_token_id=EOS, num_labels=1)
    return draw_weights(AutoModelForSequenceClassification.from_config(config), seed=0)


def eager_attention() -> Any:
    model = classifier("llama")
    model.set_attn_implementation("eager")
    return model


def recurrent() -> Any:
    model = classifier("llama")
    model.model.layers[0].mlp = RunningSum()
    return model


@pytest.mark.parametrize("make", [encoder, custom_attention, eager_attention, recurrent])
def test_a_model_that_cannot_share_prompts_uses_padded_batches(make: Callable[[], Any]) -> None:
    padded = reward_model(make().eval())
    batch = continued(LONG, tokens(9, 2), tokens(4, 3))
    assert not padded.shares_prompts
    alone = [padded.score([rendered])[0] for rendered in batch]
    assert abs(alone[0] - alone[1]) > 0.01
    assert padded.score(batch) == pytest.approx(alone, abs=1e-4)
    assert [result.computed_tokens for result in padded.compute(batch)] == [39, 34]
