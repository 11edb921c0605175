"""The figures of the latency and cost benchmarks, checked by hand, and their tables and plots."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot
from benchmarks.latency import Answers, good, summary
from benchmarks.prices import Prices
from benchmarks.stats import knee, percentiles
from benchmarks.stopping import frontier
from scripts import tables_latency

PRICES = Prices(per_hour=36.0, per_million=(1.0, 2.0, 0.5))


def test_percentiles_are_interpolated_between_values() -> None:
    assert percentiles([float(value) for value in range(101)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([1.0, 2.0])["p50"] == 1.5


def test_a_price_is_the_sum_of_the_machines_and_the_tokens() -> None:
    assert PRICES.of(10.0, 1000, 500, 2000) == pytest.approx(0.1 + (1000 * 1 + 500 * 2 + 2000 * 0.5) / 1e6)


def test_goodput_counts_answers_within_the_objective() -> None:
    assert good([0.5, 1.0, 1.1, 9.0], objective_s=1.0, seconds=4.0) == {"per_s": 0.5, "share": 0.5}
    assert good([], objective_s=1.0, seconds=4.0) == {"per_s": 0.0, "share": 0.0}


def test_two_concurrent_requests_share_the_price_of_the_machine() -> None:
    answers = Answers([0.1, 0.3], [2.0, 2.0], [10, 20], [40, 60], [100, 100])
    figures = summary(answers, 2.0, PRICES)
    assert figures["requests_per_s"] == 1.0
    assert figures["tokens_per_s"] == 50.0
    assert figures["price"] == pytest.approx(1.0 * 0.01 + (15 * 1 + 50 * 2 + 100 * 0.5) / 1e6)


def test_the_knee_is_the_point_furthest_above_the_line_between_the_ends() -> None:
    assert knee([1, 2, 4, 8], [0.0, 5.0, 6.0, 7.0]) == 1
    assert knee([0, 1, 2, 10], [0.0, 1.0, 9.0, 10.0]) == 2


def case(**fields: Any) -> dict[str, Any]:
    spread = {"p50": 1.0, "p95": 1.5, "p99": 1.6}
    return {
        "best_of": 16,
        "max_tokens": 64,
        "at_once": 1,
        "requests": 10,
        "first_token_s": spread,
        "total_s": spread,
        "requests_per_s": 1.0,
        "tokens_per_s": 900.0,
        "prompt_tokens": 118.0,
        "generated_tokens": 1024.0,
        "scored_tokens": 1100.0,
        "price": 3e-5,
        "cpu_s_a_request": 2.0,
        "peak_rss_bytes": 2 << 30,
    } | fields


LATENCY: dict[str, Any] = {
    "prices": {"per_hour": 0.1, "per_million": [0, 0, 0]},
    "candidates": [case(best_of=n, price=n * 1e-5, total_s={"p50": n / 2, "p95": 1.5, "p99": 1.6}) for n in (1, 2, 4)],
    "concurrency": [case(at_once=count) for count in (1, 2)],
    "prompt": [case()],
    "length": [case(max_tokens=16)],
    "goodput": {
        "best_of": 4,
        "objective_s": 2.0,
        "capacity_per_s": 3.0,
        "loads": {
            "0.5": {
                "requests_per_s": 1.5,
                "answered": 90,
                "turned_away": 1,
                "latency_s": {"p50": 0.7, "p95": 1.9},
                "good": {"per_s": 1.4, "share": 0.93},
            }
        },
    },
}


def test_the_tables_and_plots_show_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY))
    (tmp_path / "latency_ray.json").write_text(json.dumps(LATENCY))
    row = "| 2 | 1.00 s | 1.00 s | 1.50 s | 1.60 s | 1.00 s | 900 | 2.0 s | 2,048 MiB | 0.020 |"
    assert row in tables_latency.against_n(LATENCY, LATENCY)
    assert "| 1.60 s |  | 900 |" in tables_latency.against_n(LATENCY, None)
    assert "prompt of 118 tokens" in tables_latency.scaling(LATENCY)
    assert "| 0.5 | 1.50 | 90 | 1 | 0.70 s | 1.90 s | 93 % | 1.40/s |" in tables_latency.goodput(LATENCY)
    assert plot.latency(LATENCY).stat().st_size > 0


def test_reward_is_plotted_against_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "FIGURES", tmp_path)

    def point(n: int) -> dict[str, Any]:
        reward = {"mean": 1.0 + n, "low": 0.5, "high": 9.0}
        return {"best_of": n, "reward": reward, "tokens": 64.0 * n, "total_s": 0.5 * n, "price": 1e-5 * n}

    result = {
        "policy": "tiny",
        "prompts": 3,
        "max_tokens": 64,
        "curves": {"plain": [point(n) for n in (1, 2, 4)], "adaptive": [point(3)]},
    }
    assert plot.cost(result).stat().st_size > 0


def test_the_frontier_holds_the_settings_that_no_other_setting_beats() -> None:
    settings = [{"tokens": tokens, "reward": reward} for tokens, reward in ((3, 2.0), (1, 1.0), (2, 0.5), (2, 1.5))]
    assert [setting["tokens"] for setting in frontier(settings)] == [1, 2, 3]


def test_the_side_by_side_table_compares_each_way_with_nbest() -> None:
    ratio = {"median": 2.5, "low": 2.0, "high": 3.0, "rounds": 3}
    measured = {"one_request_s": 1.5, "requests_per_s": 0.8, "tokens_a_request": 1024.0}
    result = {
        "best_of": 16,
        "max_tokens": 64,
        "at_once": 4,
        "left_out": {"optillm": "pip install: no"},
        "ways": {"nbest": measured, "script": measured},
        "times_as_long_as_nbest": {"script": {"one": ratio, "at once": ratio}},
        "bars": {"script": {"load": "at once", "at_least": 2.0}},
    }
    table = tables_latency.side_by_side(result)
    line = "| script | 1.50 s | 0.80 | 1024 | 2.50 (2.00 … 3.00) | 2.50 (2.00 … 3.00) | 2.00 (several) |"
    assert line in table
    assert "Left out: optillm, pip install: no." in table
