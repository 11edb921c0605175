"""The sizes of a run: full, and small as a trial."""

from dataclasses import dataclass

N = (1, 2, 4, 8, 16)
"""Sizes of best-of-n of the start, all estimated from one pool of the largest."""


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of rows, prompts, samples and steps.

    `demonstrations`, `pairs` and `test_pairs` come from human ratings; `training_prompts` and `held_out_prompts` are
    openings of film reviews. For each training prompt `candidates` are sampled to choose from; for each held-out prompt
    `pool` samples from the start and `samples` from each trained policy. A step of PPO or REINFORCE trains on
    `completions` completions.
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
"""Runs every stage, but is too small to improve a policy."""
