import random

import torch

from reranker.models.prefix_cache import PrefixCache

CPU = torch.device("cpu")


def is_kept(kept: PrefixCache, prompt: tuple[int, ...]) -> bool:
    """Looks at it, too, so that it is the one used last."""
    return kept.longest_match(prompt, (*prompt, 0)).slots_T is not None


def of(prompt: tuple[int, ...], layer: int) -> torch.Tensor:
    """(1 head, T, 2 dimensions) that tells prompt, place and layer."""
    rows = [[1000.0 * layer + token, place] for place, token in enumerate(prompt)]
    return torch.tensor(rows).reshape(1, len(prompt), 2)


def test_places_are_given_up_by_the_prompt_used_longest_ago() -> None:
    kept = PrefixCache(5, CPU)
    first, second, third = (1, 1), (2, 2), (3, 3)
    assert kept.add(first, [first]) is not None
    assert kept.add(second, [second]) is not None
    assert is_kept(kept, first)
    assert kept.add(third, [third]) is not None
    assert not is_kept(kept, second)
    assert is_kept(kept, first)


def test_none_is_driven_out_that_the_batch_needs_and_none_for_what_never_fits() -> None:
    kept = PrefixCache(5, CPU)
    first, second, longest = (1, 1, 1), (2, 2, 2), (3,) * 6
    assert kept.add(first, [first]) is not None
    assert kept.add(second, [first, second]) is None
    assert kept.add(longest, [longest]) is None
    assert is_kept(kept, first)


def test_what_is_read_is_what_was_written_whatever_came_and_went() -> None:
    """Prompts of random lengths, some forgotten in between; there is always room for as many tokens as at first."""
    dice = random.Random(0)
    kept = PrefixCache(40, CPU)
    known: list[tuple[int, ...]] = []
    for number in range(300):
        prompt = (number,) * dice.randint(0, 12)
        if (places := kept.add(prompt, [prompt])) is None:
            continue
        for layer in (0, 1):
            kept.write(layer, places, of(prompt, layer), -of(prompt, layer))
        known.append(prompt)
        if dice.random() < 0.2:
            kept.evict(known.pop())
        known = [one for one in known if is_kept(kept, one)]
        for one in known:
            found = kept.longest_match(one, (*one, 0)).slots_T
            assert found is not None
            for layer in (0, 1):
                keys, values = kept.read(layer, found)
                assert torch.equal(keys, of(one, layer))
                assert torch.equal(values, -of(one, layer))
    assert kept.add((7,) * 40, [(7,) * 40]) is not None


def test_a_beginning_holds_places_for_its_own_tokens_and_goes_before_what_it_goes_on_from() -> None:
    kept = PrefixCache(8, CPU)
    prompt, first, second = (1, 1), (1, 1, 2, 2, 2, 2), (1, 1, 2, 2, 2, 2, 3)

    def found(*token_ids: int) -> tuple[tuple[int, ...], int]:
        return kept.longest_match(prompt, token_ids)[:2]

    prompt_places = kept.add(prompt, [prompt])
    places = kept.add(first, [prompt], prompt_ids=prompt, after=kept.longest_match(prompt, first))
    assert prompt_places is not None
    assert places is not None
    path = kept.longest_match(prompt, (*first, 0))
    assert path.slots_T is not None
    assert path.slots_T.tolist() == [*prompt_places.tolist(), *places.tolist()]
    assert len(places) == 4
    assert kept.add(second, [prompt], prompt_ids=prompt, after=path) is not None
    assert kept.add(second, [prompt], prompt_ids=prompt, after=path) is None, "it is kept already"
    assert found(*second, 4) == (second, 7)
    assert found(*first[:6], 9, 9) == (first, 6)
    assert found(*first[:5], 9) == (prompt, 2)  # three in common are as soon computed
    assert kept.longest_match((5,), (5, 2, 2, 2, 2, 3)) == ((5,), 1, None)
    other = (7, 7)
    assert kept.add(other, [other]) is not None  # one place was free, and the last to go on gives up another
    assert second not in kept
    assert first in kept
    assert prompt in kept


def test_the_last_token_is_never_among_those_in_common() -> None:
    kept = PrefixCache(8, CPU)
    prompt, beginning = (1,), (1, 2, 2, 2, 2, 3)
    assert kept.add(prompt, [prompt]) is not None
    assert kept.add(beginning, [prompt], prompt_ids=prompt, after=kept.longest_match(prompt, beginning)) is not None
    assert kept.longest_match(prompt, beginning)[:2] == (beginning, 5)
    assert kept.longest_match(prompt, beginning[:5])[:2] == (prompt, 1)
