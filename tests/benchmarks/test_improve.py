"""From samples whose rewards and likelihoods are known to the figures of `benchmarks.improve`, its table and plot."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import improve, plot
from benchmarks.policy_evaluation import JudgedSample
from scripts import doc_tables

PROMPTS = ("This film", "The plot")


def samples(count: int, nats: float) -> list[dict[str, Any]]:
    """Rewards 0, 1, 2, ... for each prompt; ten tokens of two nats each under the base, `nats` in all by the policy."""
    return [
        asdict(JudgedSample(prompt, f" is {reward}", float(reward), 0.5, 10, -20.0, nats))
        for prompt in PROMPTS
        for reward in range(count)
    ]


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "judged").mkdir()
    (tmp_path / "rejection").mkdir()
    pools = {"base": (32, -20.0), "round 1": (4, -18.0), "round 2": (4, -16.0), "dpo": (4, -15.0)}
    for name, (count, nats) in pools.items():
        (tmp_path / "judged" / f"{name}.json").write_text(json.dumps(samples(count, nats)))
    table = [{"round": 0}, {"round": 1, "demonstrations": 6}, {"round": 2, "demonstrations": 5}]
    (tmp_path / "rejection" / "summary.json").write_text(json.dumps(table))
    (tmp_path / "pairs.jsonl").write_text("{}\n" * 7)
    return improve.evaluate(tmp_path, dict.fromkeys(pools, ("a model", tmp_path)))


def test_best_of_n_and_what_was_taught_stand_on_the_same_axes(result: dict[str, Any]) -> None:
    best, policies = result["best_of_n_of_the_base"], result["policies_at_best_of_1"]
    assert best["1"]["reward"]["mean"] == pytest.approx(15.5)
    assert best["32"]["reward"]["mean"] == pytest.approx(31.0)
    assert best["2"]["kl"] == {"mean": pytest.approx(math.log(2) - 0.5)}
    assert policies["round 1"]["reward"]["mean"] == pytest.approx(1.5)
    assert {name: one["kl"]["mean"] for name, one in policies.items()} == {"round 1": 2.0, "round 2": 4.0, "dpo": 5.0}
    assert policies["dpo"]["perplexity_under_base"]["mean"] == pytest.approx(math.exp(2))
    assert result["demonstrations"] == [6, 5]
    assert result["pairs"] == 7
    assert result["distinct_first_words"]["dpo"] == 1.0


def test_the_table_and_the_plot_are_made_of_the_results(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    assert plot.improve(result).stat().st_size > 0
    monkeypatch.setattr(doc_tables, "result", lambda name: result)
    table = doc_tables.improve()
    assert "| base, best of 32 | 31.00 (31.00 … 31.00) |" in table
    assert "| round 2, best of 1 | 1.50 (1.50 … 1.50) |" in table
    assert "6 and 5 winners in the rounds, 7 pairs for DPO" in table
