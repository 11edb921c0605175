import random

import torch

from reranker.models.prefix_cache import PrefixCache

CPU = torch.device("cpu")


def is_cached(cache: PrefixCache, prompt: tuple[int, ...]) -> bool:
    """Looks the prompt up, which also makes it the most recently used."""
    return cache.longest_match(prompt, (*prompt, 0)).slots_T is not None


def keys_of(prompt: tuple[int, ...], layer: int) -> torch.Tensor:
    """(1 head, T, 2 dimensions), different for each prompt, index and layer."""
    rows = [[1000.0 * layer + token, index] for index, token in enumerate(prompt)]
    return torch.tensor(rows).reshape(1, len(prompt), 2)


def test_the_least_recently_used_prompt_is_evicted() -> None:
    cache = PrefixCache(5, CPU)
    first, second, third = (1, 1), (2, 2), (3, 3)
    assert cache.add(first, [first]) is not None
    assert cache.add(second, [second]) is not None
    assert is_cached(cache, first)
    assert cache.add(third, [third]) is not None
    assert not is_cached(cache, second)
    assert is_cached(cache, first)


def test_nothing_is_evicted_that_the_batch_needs_or_for_a_prompt_that_never_fits() -> None:
    cache = PrefixCache(5, CPU)
    first, second, longest = (1, 1, 1), (2, 2, 2), (3,) * 6
    assert cache.add(first, [first]) is not None
    assert cache.add(second, [first, second]) is None
    assert cache.add(longest, [longest]) is None
    assert is_cached(cache, first)


def test_what_is_read_is_what_was_written() -> None:
    """Prompts of random lengths, some evicted in between; the number of slots stays the same."""
    dice = random.Random(0)
    cache = PrefixCache(40, CPU)
    cached: list[tuple[int, ...]] = []
    for number in range(300):
        prompt = (number,) * dice.randint(0, 12)
        if (slots := cache.add(prompt, [prompt])) is None:
            continue
        for layer in (0, 1):
            cache.write(layer, slots, keys_of(prompt, layer), -keys_of(prompt, layer))
        cached.append(prompt)
        if dice.random() < 0.2:
            cache.evict(cached.pop())
        cached = [prompt for prompt in cached if is_cached(cache, prompt)]
        for prompt in cached:
            slots = cache.longest_match(prompt, (*prompt, 0)).slots_T
            assert slots is not None
            for layer in (0, 1):
                keys, values = cache.read(layer, slots)
                assert torch.equal(keys, keys_of(prompt, layer))
                assert torch.equal(values, -keys_of(prompt, layer))
    assert cache.add((7,) * 40, [(7,) * 40]) is not None


def test_a_beginning_occupies_slots_for_its_own_tokens_and_is_evicted_before_its_parent() -> None:
    cache = PrefixCache(8, CPU)
    prompt, first, second = (1, 1), (1, 1, 2, 2, 2, 2), (1, 1, 2, 2, 2, 2, 3)

    def match(*token_ids: int) -> tuple[tuple[int, ...], int]:
        return cache.longest_match(prompt, token_ids)[:2]

    prompt_slots = cache.add(prompt, [prompt])
    own_slots = cache.add(first, [prompt], prompt_ids=prompt, after=cache.longest_match(prompt, first))
    assert prompt_slots is not None
    assert own_slots is not None
    first_match = cache.longest_match(prompt, (*first, 0))
    assert first_match.slots_T is not None
    assert first_match.slots_T.tolist() == [*prompt_slots.tolist(), *own_slots.tolist()]
    assert len(own_slots) == 4
    assert cache.add(second, [prompt], prompt_ids=prompt, after=first_match) is not None
    assert cache.add(second, [prompt], prompt_ids=prompt, after=first_match) is None, "it is cached already"
    assert match(*second, 4) == (second, 7)
    assert match(*first[:6], 9, 9) == (first, 6)
    assert match(*first[:5], 9) == (prompt, 2)  # three shared tokens are as fast to compute
    assert cache.longest_match((5,), (5, 2, 2, 2, 2, 3)) == ((5,), 1, None)
    other = (7, 7)
    assert cache.add(other, [other]) is not None  # one slot was free, and the last continuation is evicted for another
    assert second not in cache
    assert first in cache
    assert prompt in cache


def test_the_last_token_is_never_part_of_a_match() -> None:
    cache = PrefixCache(8, CPU)
    prompt, beginning = (1,), (1, 2, 2, 2, 2, 3)
    assert cache.add(prompt, [prompt]) is not None
    after = cache.longest_match(prompt, beginning)
    assert cache.add(beginning, [prompt], prompt_ids=prompt, after=after) is not None
    assert cache.longest_match(prompt, beginning)[:2] == (beginning, 5)
    assert cache.longest_match(prompt, beginning[:5])[:2] == (prompt, 1)
