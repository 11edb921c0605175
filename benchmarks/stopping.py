"""What stopping policies save, on recorded pools: tokens against the mean reward of the winner.

Every policy runs by the code that serves (`reranker.stopping`) over pools of 32 candidates a prompt, in orders drawn at
random; plain best-of-n is the expectation over all orders (`reranker.estimators`). A candidate that is given up costs
the tokens until then.

A policy has settings, and picking the best of them on the prompts it is measured on would flatter it. So the prompts
are halved: what is known beforehand (the prior) and the cheapest setting that is good enough come from one half, the
figures from the other, and then the other way round. Good enough is, both are told,

    equal     a mean reward of at least plain best-of-16's
    within    one whose difference to it, prompt by prompt, has a 95 % interval that reaches 0

    python -m benchmarks.stopping [--orders 6]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.provenance import RESULTS, provenance
from benchmarks.stats import hand_in
from reranker.estimators import bootstrap_mean, expected_max
from reranker.reward_posterior import UNKNOWN, Prior
from reranker.stopping import WAVE, AdaptiveN, SpeculativeRejection, Stopping
from reranker.stopping_replay import Pool, spend

PLAIN_N = 16
BARS = {"adaptive": 0.70, "speculative_rejection": 0.55}
"""Most of plain best-of-16's tokens, at its mean reward."""
PRICES = tuple(round(0.02 * 2 ** (step / 5), 4) for step in range(16))
"""In deviations of a prompt's rewards, from a fiftieth to a sixth."""
WAVES = (1, 2, 4, 8)
SHARES = (0.25, 0.5, 0.75)
REJECTING_N = (16, 24, 32)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """One setting of a policy, told in `told`; the prior is known only when the prompts are."""

    told: dict[str, Any]
    stopping: Callable[[Prior], Stopping]
    best_of: int


def tried(pools: Sequence[Pool], setting: PolicySetting, prior: Prior, orders: int) -> Floats:
    """Reward and tokens a prompt (P, 2), each the mean over the orders, which are the same for every setting."""
    stopping = setting.stopping(prior)
    found = []
    for place, pool in enumerate(pools):
        random = Random(place)
        indices = range(len(pool.rewards_N))
        runs = [
            spend(pool.of(random.sample(indices, setting.best_of)), stopping, setting.best_of) for _ in range(orders)
        ]
        found.append(np.mean(runs, axis=0))
    return np.array(found)


def plain(pools: Sequence[Pool], n: int) -> Floats:
    """Reward and tokens a prompt of plain best-of-n, in expectation."""
    return np.array([(expected_max(pool.rewards_N, n), n * fmean(pool.tokens_N)) for pool in pools])


def adaptive(prior: Prior, price: float, wave: int, most: int, *, knows: bool = True) -> Stopping:
    """The price is told in deviations, so that one list fits every reward model."""
    known = prior if knows else UNKNOWN
    return Stopping("adaptive", waves=AdaptiveN(most, price=price * prior.sd, wave=wave, prior=known))


def adaptive_settings(most: int, wave: int, *, knows: bool = True) -> list[PolicySetting]:
    return [
        PolicySetting(
            {"price_in_sd": price, "wave": wave},
            partial(adaptive, price=price, wave=wave, most=most, knows=knows),
            most,
        )
        for price in PRICES
    ]


def rejections(lengths: Sequence[int]) -> list[SpeculativeRejection]:
    """At one length, or at two, of which the second is at least twice the first."""
    chains = [(one,) for one in lengths] + [(one, two) for one in lengths for two in lengths if two >= 2 * one]
    return [SpeculativeRejection(chain, share) for chain in chains for share in SHARES]


def rejection_settings(lengths: Sequence[int]) -> list[PolicySetting]:
    def stopping(_: Prior, rejection: SpeculativeRejection) -> Stopping:
        return Stopping("speculative_rejection", rejection=rejection)

    return [
        PolicySetting(
            {"best_of": best_of, "checkpoints": list(one.checkpoints), "reject_share": one.share},
            partial(stopping, rejection=one),
            best_of,
        )
        for best_of, one in product(REJECTING_N, rejections(lengths))
    ]


def both_settings(lengths: Sequence[int], most: int) -> list[PolicySetting]:
    def stopping(prior: Prior, price: float, wave: int, rejection: SpeculativeRejection) -> Stopping:
        waves = adaptive(prior, price, wave, most).waves
        return Stopping("adaptive_rejection", waves=waves, rejection=rejection)

    chosen = [one for one in rejections(lengths) if len(one.checkpoints) == 1]
    return [
        PolicySetting(
            {"price_in_sd": price, "wave": wave, "checkpoints": list(one.checkpoints), "reject_share": one.share},
            partial(stopping, price=price, wave=wave, rejection=one),
            most,
        )
        for price, wave, one in product(PRICES[::3], (WAVE, 2 * WAVE), chosen)
    ]


def compare(pools: Sequence[Pool], settings: Sequence[PolicySetting], orders: int) -> dict[str, Any]:
    """The policy against plain best-of-16, its setting chosen on the other half of the prompts."""
    halves = (range(0, len(pools), 2), range(1, len(pools), 2))
    goal = plain(pools, PLAIN_N)
    tested: dict[str, dict[int, Floats]] = {"equal": {}, "within": {}}
    chosen: dict[str, list[dict[str, Any]]] = {"equal": [], "within": []}
    curve = np.zeros((len(settings), 2))
    for fit, test in (halves, halves[::-1]):
        prior = Prior.of([pools[place].rewards_N for place in fit])
        on_fit, on_test = (
            [tried([pools[place] for place in half], setting, prior, orders) for setting in settings]
            for half in (fit, test)
        )
        curve += [one.sum(axis=0) for one in on_test]
        for criterion, best in _cheapest(on_fit, goal[list(fit), 0]).items():
            tested[criterion] |= dict(zip(test, on_test[best], strict=True))
            chosen[criterion].append(settings[best].told)
    return {
        criterion: {
            "chosen": chosen[criterion],
            "reward": fmean(found[:, 0]),
            "reward_minus_plain": asdict(bootstrap_mean(list(found[:, 0] - goal[:, 0]))),
            "token_share": ratio_with_interval(found[:, 1], goal[:, 1]),
        }
        for criterion, by_place in tested.items()
        for found in [np.array([by_place[place] for place in range(len(pools))])]
    } | {
        "curve": [
            {**setting.told, "reward": reward, "tokens": tokens}
            for setting, (reward, tokens) in zip(settings, curve / len(pools), strict=True)
        ]
    }


def _cheapest(found: Sequence[Floats], goal_P: Floats) -> dict[str, int]:
    """Of the settings that are good enough the one with the fewest tokens; the best one where none is."""
    rewards, tokens = np.array([one.mean(axis=0) for one in found]).T
    reach = np.array([bootstrap_mean(list(one[:, 0] - goal_P), resamples=500).high for one in found])
    good = {"equal": rewards >= goal_P.mean(), "within": reach >= 0}
    return {
        criterion: int(np.where(enough, tokens, np.inf).argmin() if enough.any() else rewards.argmax())
        for criterion, enough in good.items()
    }


def frontier(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that no other beats in both tokens and reward, cheapest first."""
    best: list[dict[str, Any]] = []
    for one in sorted(curve, key=lambda one: (one["tokens"], -one["reward"])):
        if not best or one["reward"] > best[-1]["reward"]:
            best.append(one)
    return best


def ratio_with_interval(above_P: Floats, below_P: Floats, resamples: int = 5000) -> dict[str, float]:
    """The ratio of two means over prompts, and its 95 % bootstrap interval over them."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(above_P), size=(resamples, len(above_P)))
    low, high = np.quantile(above_P[drawn].mean(axis=1) / below_P[drawn].mean(axis=1), [0.025, 0.975])
    return {"mean": float(above_P.mean() / below_P.mean()), "low": float(low), "high": float(high)}


def plain_curve(pools: Sequence[Pool]) -> dict[str, dict[str, float]]:
    curve = {}
    for n in range(1, len(pools[0].rewards_N) + 1):
        found = plain(pools, n)
        interval = bootstrap_mean(list(found[:, 0]), resamples=2000)
        curve[str(n)] = {
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "tokens": float(found[:, 1].mean()),
        }
    return curve


def film_reviews() -> tuple[list[Pool], tuple[int, ...]]:
    recorded = json.loads((RESULTS / "reward_pools.json").read_text())
    lengths = tuple(recorded["lengths"])
    pools = [
        Pool(one["rewards"], one["tokens"], {length: one["beginnings"][str(length)] for length in lengths})
        for one in recorded["samples"]
    ]
    return pools, lengths


def arithmetic() -> list[Pool]:
    """Answers to word problems by the reward that was trained on others; a candidate costs one."""
    recorded = json.loads((RESULTS / "arithmetic.json").read_text())
    return [Pool(one["rewards"]["reward-0"], [1] * recorded["pool"]) for one in recorded["samples"]]


def measure(orders: int) -> dict[str, Any]:
    reviews, lengths = film_reviews()
    pools = {"film reviews": reviews, "arithmetic": arithmetic()}
    most = len(reviews[0].rewards_N)
    known, unknown = adaptive_settings(most, WAVE), adaptive_settings(most, WAVE, knows=False)
    tried_on: dict[str, dict[str, list[PolicySetting]]] = {
        "film reviews": {
            "adaptive": known,
            "adaptive without a prior": unknown,
            "speculative_rejection": rejection_settings(lengths),
            "adaptive_rejection": both_settings(lengths, most),
        },
        "arithmetic": {"adaptive": known, "adaptive without a prior": unknown},
    }
    return {
        "provenance": provenance(),
        "prompts": {name: len(some) for name, some in pools.items()},
        "unit": {"film reviews": "tokens", "arithmetic": "candidates"},
        "pool": most,
        "orders": orders,
        "plain_n": PLAIN_N,
        "bars": BARS,
        "prior": {name: asdict(Prior.of([one.rewards_N for one in some])) for name, some in pools.items()},
        "plain": {name: plain_curve(some) for name, some in pools.items()},
        "policies": {
            name: {policy: compare(pools[name], settings, orders) for policy, settings in by_policy.items()}
            for name, by_policy in tried_on.items()
        },
        "share_by_wave": {
            name: {
                str(wave): compare(some, adaptive_settings(most, wave), orders)["equal"]["token_share"]
                for wave in WAVES
            }
            for name, some in pools.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=6, help="random orders of each pool")
    hand_in("stopping", measure(parser.parse_args().orders))


if __name__ == "__main__":
    main()
