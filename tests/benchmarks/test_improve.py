"""The figures, table and plot of `benchmarks.improve`, from samples with known rewards and log-probabilities."""

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
    """Samples with rewards 0, 1, 2, ... for each prompt.

    Each has ten tokens, a log-probability of -20 nats under the base and of `nats` under the policy.
    """
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


def test_best_of_n_and_trained_policies_have_the_same_measures(result: dict[str, Any]) -> None:
    best, policies = result["best_of_n_of_the_base"], result["policies_at_best_of_1"]
    assert best["1"]["reward"]["mean"] == pytest.approx(15.5)
    assert best["32"]["reward"]["mean"] == pytest.approx(31.0)
    assert best["2"]["kl"] == {"mean": pytest.approx(math.log(2) - 0.5)}
    assert policies["round 1"]["reward"]["mean"] == pytest.approx(1.5)
    kl = {name: figures["kl"]["mean"] for name, figures in policies.items()}
    assert kl == {"round 1": 2.0, "round 2": 4.0, "dpo": 5.0}
    assert policies["dpo"]["perplexity_under_base"]["mean"] == pytest.approx(math.exp(2))
    assert result["demonstrations"] == [6, 5]
    assert result["pairs"] == 7
    assert result["distinct_first_words"]["dpo"] == 1.0


def test_the_table_and_the_plot_show_the_result(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    assert plot.improve(result).stat().st_size > 0
    monkeypatch.setattr(doc_tables, "read_result", lambda name: result)
    table = doc_tables.improve()
    assert "| base, best of 32 | 31.00 (31.00 … 31.00) |" in table
    assert "| round 2, best of 1 | 1.50 (1.50 … 1.50) |" in table
    assert "6 and 5 winners in the rounds, 7 pairs for DPO" in table
