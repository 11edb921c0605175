"""How large a run of the example is."""

from dataclasses import dataclass

N = (1, 2, 4, 8, 16)
"""Best-of-n of the start, from one pool of the largest."""


@dataclass(frozen=True, slots=True)
class Size:
    """What decides how long a run takes.

    `demonstrations`, `pairs` and `test_pairs` are made of human ratings; `training_prompts` and `held_out_prompts` are
    first words of a film review. Of a training prompt `candidates` are drawn to choose from, of a held-out one `pool`
    from the start and `samples` from each trained policy. A step of PPO or REINFORCE learns from `completions`.
    """

    demonstrations: int
    pairs: int
    test_pairs: int
    training_prompts: int
    held_out_prompts: int
    candidates: int
    max_tokens: int
    ppo_steps: int
    reinforce_steps: int
    completions: int
    pool: int = max(N)
    samples: int = 4


FULL = Size(
    demonstrations=800,
    pairs=2000,
    test_pairs=300,
    training_prompts=48,
    held_out_prompts=30,
    candidates=8,
    max_tokens=32,
    ppo_steps=20,
    reinforce_steps=30,
    completions=32,
)
SMALL = Size(
    demonstrations=16,
    pairs=32,
    test_pairs=16,
    training_prompts=4,
    held_out_prompts=3,
    candidates=4,
    max_tokens=8,
    ppo_steps=2,
    reinforce_steps=2,
    completions=8,
)
"""Enough to see every stage work, and to learn nothing."""
