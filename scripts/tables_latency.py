"""The tables of docs/benchmarks.md about latency and cost: against N, and compared with other systems."""

from typing import Any

from reranker.markdown import table
from scripts.markdown import with_extremes

MIB = 1 << 20
PICTURE = "../benchmarks/figures/latency.png"


def side_by_side(result: dict[str, Any]) -> str:
    """Best-of-16 by nbest and by each other way."""
    rows = []
    for name, way in result["ways"].items():
        figures = f"{way['one_request_s']:.2f} s", f"{way['requests_per_s']:.2f}", f"{way['tokens_a_request']:.0f}"
        if (ratios := result["times_as_long_as_nbest"].get(name)) is None:
            rows.append((name, *figures, "", "", ""))
            continue
        bar = result["bars"].get(name)
        bar_text = f"{bar['at_least']:.2f} ({'one' if bar['load'] == 'one' else 'several'})" if bar else ""
        rows.append((name, *figures, with_extremes(ratios["one"]), with_extremes(ratios["at once"]), bar_text))
    rounds = next(iter(result["times_as_long_as_nbest"].values()))["one"]["rounds"]
    left_out = "".join(f" Left out: {name}, {reason}." for name, reason in result["left_out"].items())
    return (
        table(
            (
                "",
                "one answer",
                f"answers/s, {result['at_once']} at once",
                "tokens an answer",
                "time relative to nbest, for one",
                f"for {result['at_once']} at once",
                "bar, at least",
            ),
            rows,
        )
        + f"\nBest of {result['best_of']}, {result['max_tokens']} new tokens after about 120; {rounds} alternating "
        f"rounds, median and extremes.{left_out}\n"
    )


def against_n(result: dict[str, Any], on_ray: dict[str, Any] | None) -> str:
    """A single request for every N."""
    ray = {case["best_of"]: case for case in on_ray["candidates"]} if on_ray else {}
    rows = [
        (
            str(case["best_of"]),
            f"{case['first_token_s']['p50']:.2f} s",
            *(f"{case['total_s'][key]:.2f} s" for key in ("p50", "p95", "p99")),
            f"{ray[case['best_of']]['total_s']['p50']:.2f} s" if case["best_of"] in ray else "",
            f"{case['tokens_per_s']:.0f}",
            f"{case['cpu_s_a_request']:.1f} s",
            f"{case['peak_rss_bytes'] / MIB:,.0f} MiB",
            f"{1000 * case['price']:.3f}",
        )
        for case in result["candidates"]
    ]
    first = result["candidates"][0]
    return (
        f"![Seconds against N and against concurrency; goodput under Poisson load]({PICTURE})\n\n"
        + table(
            ("N", "first token", "p50", "p95", "p99", "p50 on Ray", "tokens/s", "CPU", "memory", "price of a thousand"),
            rows,
        )
        + f"\n{first['requests']} requests each, one at a time, {first['max_tokens']} new tokens after about "
        f"{first['prompt_tokens']:.0f}. CPU-seconds and memory are of all processes of the server. Prices are of the "
        f"machine at {result['prices']['per_hour']:g} an hour, an assumption.\n"
    )


def scaling(result: dict[str, Any]) -> str:
    """Best of 16 with higher concurrency, longer prompts and longer candidates."""

    def rows(sweep: str, label: str) -> list[tuple[str, ...]]:
        return [
            (
                label.format(**case),
                f"{case['first_token_s']['p50']:.2f} s",
                f"{case['total_s']['p50']:.2f} s",
                f"{case['total_s']['p95']:.2f} s",
                f"{case['requests_per_s']:.2f}",
                f"{case['tokens_per_s']:.0f}",
            )
            for case in result[sweep]
        ]

    return table(
        ("best of 16", "first token", "p50", "p95", "requests/s", "tokens/s"),
        [
            *rows("concurrency", "{at_once} at a time"),
            *rows("prompt", "prompt of {prompt_tokens:.0f} tokens"),
            *rows("length", "{max_tokens} new tokens"),
        ],
    )


def goodput(result: dict[str, Any]) -> str:
    """Answers within the objective under open-loop load."""
    figures = result["goodput"]
    return (
        table(
            ("load, of capacity", "requests/s", "answered", "rejected", "p50", "p95", "in time", "goodput"),
            [
                (
                    share,
                    f"{load['requests_per_s']:.2f}",
                    str(load["answered"]),
                    str(load["turned_away"]),
                    f"{load['latency_s']['p50']:.2f} s",
                    f"{load['latency_s']['p95']:.2f} s",
                    f"{100 * load['good']['share']:.0f} %",
                    f"{load['good']['per_s']:.2f}/s",
                )
                for share, load in figures["loads"].items()
            ],
        )
        + f"\nBest of {figures['best_of']} with Poisson arrivals; in time means within {figures['objective_s']:.2f} s, "
        f"three times the median of a single request; capacity is {figures['capacity_per_s']:.2f} requests/s with "
        "eight at a time.\n"
    )
