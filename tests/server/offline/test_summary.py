"""The summary of a run: the reward at every n, intervals, the reward prior and the plot."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from reranker.reward_posterior import Prior
from server.offline.plot import plot_summary
from server.offline.records import Result
from server.offline.summary import BOOTSTRAP_PROMPTS, RunningMean, summarise
from tests.server.offline.test_export import result


def results(*pools: list[float | None]) -> list[Result]:
    return [Result.model_validate(result(line, pool)) for line, pool in enumerate(pools, start=1)]


def test_the_mean_reward_at_every_n_comes_from_the_pools() -> None:
    """The expected best of n of 0, 1, 2, 3 is 1.5, 2.3333, 2.75 and 3; the other pool is ten higher."""
    summary = summarise(results([0, 1, 2, 3], [13, 10, 12, 11]))
    means = {n: point["mean"] for n, point in summary["reward_at_n"].items()}
    assert means == pytest.approx({"1": 6.5, "2": 7 + 1 / 3, "3": 7.75, "4": 8})
    assert summary["winner_reward"]["mean"] == 8
    assert summary["reward_at_n"]["4"]["low"] == 3
    assert summary["reward_at_n"]["4"]["high"] == 13
    assert summary["reward_at_n"]["4"]["kl_upper_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert (summary["prompts"], summary["generated_tokens"]) == (2, 2)


def test_a_candidate_without_a_reward_is_left_out_of_its_pool() -> None:
    curve = summarise(results([1, None], [3, 5]))["reward_at_n"]
    assert (curve["1"]["mean"], curve["1"]["prompts"]) == (2.5, 2)
    assert (curve["2"]["mean"], curve["2"]["prompts"]) == (5, 1)


def test_a_pool_that_a_stopping_policy_shortened_is_left_out_of_the_curve() -> None:
    complete, shortened = results([1, 2], [8, 9])
    summary = summarise([complete, shortened.model_copy(update={"stopped_by": "adaptive"})])
    assert summary["winner_reward"]["mean"] == 5.5
    assert {n: (point["mean"], point["prompts"]) for n, point in summary["reward_at_n"].items()} == {
        "1": (1.5, 1),
        "2": (2, 1),
    }
    assert summary["reward_prior"] is None  # it needs two prompts


def test_the_summary_has_the_prior_for_adaptive_stopping() -> None:
    summary = summarise(results([0.0, 2.0], [10.0, 14.0]))
    assert summary["reward_prior"] == asdict(Prior.of([[0.0, 2.0], [10.0, 14.0]]))


def test_a_run_without_rewards_or_without_results_has_no_curve() -> None:
    assert summarise([])["reward_at_n"] == {}
    assert summarise(results([None]))["winner_reward"] is None


def test_many_prompts_have_a_normal_interval_and_their_values_are_not_kept() -> None:
    """Half zeros and half twos: mean 1, standard deviation s, 1 ± 1.96 s/√P."""
    mean = RunningMean()
    prompts = 2 * BOOTSTRAP_PROMPTS
    for number in range(prompts):
        mean.add(2 * (number % 2))
    half = 1.96 * math.sqrt(prompts / (prompts - 1)) / math.sqrt(prompts)
    assert len(mean.first) == BOOTSTRAP_PROMPTS
    assert mean.interval() == {
        "mean": pytest.approx(1),
        "low": pytest.approx(1 - half),
        "high": pytest.approx(1 + half),
        "prompts": prompts,
    }


def test_the_summary_is_json_and_can_be_plotted(tmp_path: Path) -> None:
    summary: dict[str, Any] = json.loads(json.dumps(summarise(results([0, 1, 2, 3])), allow_nan=False))
    assert plot_summary(summary, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
