"""Compares the trained policies and best-of-n of the start in a table, a plot and verdicts.

Every policy has answered the held-out prompts at best_of=1; the start has a pool, from which its best-of-n is
estimated. Measures and intervals are those of `benchmarks.policy_evaluation`: KL(policy || start) is the mean of
log pi - log pi_start over the policy's own samples, and for best-of-n its upper bound.

A measure rose if the 95 % bootstrap interval of its differences to the start, prompt by prompt, is above 0.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.plot import against_kl
from benchmarks.policy_evaluation import MEASURES, JudgedSample, Pools, best_of, best_of_n, distinct, measured, read
from benchmarks.provenance import provenance
from examples.rlhf_pipeline.size import N, Size
from examples.rlhf_pipeline.stages import POLICIES
from reranker.estimators import Interval, bootstrap_mean
from reranker.markdown import table
from scripts.doc_tables import against_base, with_interval

START = "start"
BEST_OF_N = f"{START}, best of {max(N)}"

HARMS: dict[str, Callable[[JudgedSample], float]] = {
    "VADER, which no policy was trained on, fell by": lambda sample: -sample.vader,
    "nats a token under the start rose by": MEASURES["base_nats_a_token"],
    "the share of repeated words rose by": lambda sample: repetition(sample.text),
}
"""Phrase of the verdict -> a measure whose rise means that the text got worse."""


def repetition(text: str) -> float:
    """The share of words that occur earlier in the text."""
    words = text.casefold().split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def rise(start: Pools, pools: Pools, value: Callable[[JudgedSample], float], n: int = 1) -> Interval:
    """The rise of `value` from one sample of the start to the best of n of `pools`: the mean over common prompts."""
    after = {pool[0].prompt: best_of(pool, n, value) for pool in pools}
    before = {pool[0].prompt: best_of(pool, 1, value) for pool in start}
    return bootstrap_mean([after[prompt] - before[prompt] for prompt in before if prompt in after])


def verdict(name: str, start: Pools, pools: Pools, n: int = 1) -> str:
    """Whether the reward rose and, if so, by which measures the text got worse."""
    reward = rise(start, pools, MEASURES["reward"], n)
    if reward.low <= 0:
        return f"{name}: the reward did not rise, or not by more than chance: {_format(reward)}."
    rises = {phrase: rise(start, pools, value, n) for phrase, value in HARMS.items()}
    harms = [f"{phrase} {_format(interval)}" for phrase, interval in rises.items() if interval.low > 0]
    worse = f"and the text got worse: {'; '.join(harms)}" if harms else "and by no measure did the text get worse"
    return f"{name}: the reward rose by {_format(reward)}, {worse}."


def compare(out: Path, size: Size, *, dtype: str, seed: int) -> str:
    """Writes comparison.json, comparison.png and comparison.md, and returns the text of comparison.md."""
    start = str(out / "sft" / "model")
    of_start = read(out, "start", start, out / "pool", start)
    pools = {name: read(out, name, str(out / name / "model"), out / name / "samples", start) for name in POLICIES}
    all_pools = {START: of_start, **pools}
    result = {
        "provenance": provenance(flags=asdict(size) | {"dtype": dtype, "seed": seed}),
        "policy": "smollm2-135m-instruct after SFT",
        "reward_model": "film, trained here",
        "prompts": {"train": size.training_prompts, "held_out": len(of_start)},
        "max_tokens": size.max_tokens,
        "reward_test": json.loads((out / "reward" / "evaluation" / "evaluation.json").read_text())["overall"],
        "best_of_n_of_the_base": best_of_n(of_start, N),
        "policies_at_best_of_1": {name: measured(of_policy, 1) for name, of_policy in pools.items()},
        "distinct_first_words": {name: distinct(of_policy) for name, of_policy in all_pools.items()},
        "verdicts": [
            verdict(BEST_OF_N, of_start, of_start, max(N)),
            *(verdict(name, of_start, of_policy) for name, of_policy in pools.items()),
        ],
        "samples": {name: [asdict(pool[0]) for pool in of_policy] for name, of_policy in all_pools.items()},
        "highest_rewarded": {name: asdict(_highest(of_policy)) for name, of_policy in all_pools.items()},
    }
    (out / "comparison.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    against_kl(result, out / "comparison.png", START)
    page = report(result)
    (out / "comparison.md").write_text(page)
    return page


def report(result: Mapping[str, Any]) -> str:
    """The result as a Markdown page."""
    rows = {f"{START}, best of {n}": figures for n, figures in result["best_of_n_of_the_base"].items()}
    rows |= {f"{name}, best of 1": figures for name, figures in result["policies_at_best_of_1"].items()}
    diversity = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["distinct_first_words"].items())
    test = result["reward_test"]
    return (
        f"# From the same start: best-of-n, {', '.join(POLICIES)}\n\n"
        + against_base(rows, START)
        + f"\n{result['prompts']['held_out']} held-out openings of film reviews, {result['max_tokens']} new tokens, "
        f"95 % bootstrap intervals over openings. The reward model orders {100 * test['accuracy']:.0f} % "
        f"({100 * test['low']:.0f} … {100 * test['high']:.0f}) of {test['comparisons']} held-out pairs as people did. "
        f"Distinct first four words among the samples of an opening: {diversity}.\n\n"
        "![Reward, independent judge and perplexity against KL to the start](comparison.png)\n\n"
        "## Where the reward rose and the text got worse\n\n"
        + "".join(f"- {verdict}\n" for verdict in result["verdicts"])
        + "\nThe measures do not judge the content. These are the samples with the highest reward:\n\n"
        + table(
            ("", "reward", "VADER", "sample"),
            (
                (
                    name,
                    f"{sample['reward']:.2f}",
                    f"{sample['vader']:.2f}",
                    f"**{sample['prompt']}**{_single_line(sample['text'])}",
                )
                for name, sample in result["highest_rewarded"].items()
            ),
        )
    )


def _highest(pools: Pools) -> JudgedSample:
    return max((sample for pool in pools for sample in pool), key=lambda sample: sample.reward)


def _single_line(text: str) -> str:
    return text.replace("\n", " ")


def _format(interval: Interval) -> str:
    return with_interval(asdict(interval))
