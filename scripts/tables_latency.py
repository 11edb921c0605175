"""The tables of docs/benchmarks.md about latency and cost: against N, and beside others."""

from typing import Any

from scripts.markdown import table, with_extremes

MIB = 1 << 20
PICTURE = "../benchmarks/figures/latency.png"


def side_by_side(found: dict[str, Any]) -> str:
    """Best-of-16 by nbest and by everything else."""
    rows = []
    for name, one in found["ways"].items():
        measured = f"{one['one_request_s']:.2f} s", f"{one['requests_per_s']:.2f}", f"{one['tokens_a_request']:.0f}"
        if (ratios := found["times_as_long_as_nbest"].get(name)) is None:
            rows.append((name, *measured, "", "", ""))
            continue
        bar = found["bars"].get(name)
        told = f"{bar['at_least']:.2f} ({'one' if bar['load'] == 'one' else 'several'})" if bar else ""
        rows.append((name, *measured, with_extremes(ratios["one"]), with_extremes(ratios["at once"]), told))
    rounds = next(iter(found["times_as_long_as_nbest"].values()))["one"]["rounds"]
    left_out = "".join(f" Left out: {name}, {why}." for name, why in found["left_out"].items())
    return (
        table(
            (
                "",
                "one answer",
                f"answers/s, {found['at_once']} at once",
                "tokens an answer",
                "time, of nbest's, for one",
                f"for {found['at_once']} at once",
                "bar, at least",
            ),
            rows,
        )
        + f"\nBest of {found['best_of']}, {found['max_tokens']} new tokens after about 120; {rounds} rounds in turn, "
        f"median and extremes.{left_out}\n"
    )


def against_n(found: dict[str, Any], on_ray: dict[str, Any] | None) -> str:
    """A request alone, for every N."""
    ray = {one["best_of"]: one for one in on_ray["candidates"]} if on_ray else {}
    rows = [
        (
            str(one["best_of"]),
            f"{one['first_token_s']['p50']:.2f} s",
            *(f"{one['total_s'][key]:.2f} s" for key in ("p50", "p95", "p99")),
            f"{ray[one['best_of']]['total_s']['p50']:.2f} s" if one["best_of"] in ray else "",
            f"{one['tokens_per_s']:.0f}",
            f"{one['cpu_s_a_request']:.1f} s",
            f"{one['peak_rss_bytes'] / MIB:,.0f} MiB",
            f"{1000 * one['price']:.3f}",
        )
        for one in found["candidates"]
    ]
    first = found["candidates"][0]
    return (
        f"![Seconds against N and requests at a time; answers in time under Poisson load]({PICTURE})\n\n"
        + table(
            ("N", "first token", "p50", "p95", "p99", "p50 on Ray", "tokens/s", "CPU", "memory", "price of a thousand"),
            rows,
        )
        + f"\n{first['requests']} requests each, one at a time, {first['max_tokens']} new tokens after about "
        f"{first['prompt_tokens']:.0f}. CPU-seconds and memory are of all processes of the server. Prices are of the "
        f"machine at {found['prices']['per_hour']:g} an hour, an assumption.\n"
    )


def scaling(found: dict[str, Any]) -> str:
    """Best of 16 with more at a time, longer prompts, longer candidates."""

    def rows(sweep: str, told: str) -> list[tuple[str, ...]]:
        return [
            (
                told.format(**one),
                f"{one['first_token_s']['p50']:.2f} s",
                f"{one['total_s']['p50']:.2f} s",
                f"{one['total_s']['p95']:.2f} s",
                f"{one['requests_per_s']:.2f}",
                f"{one['tokens_per_s']:.0f}",
            )
            for one in found[sweep]
        ]

    return table(
        ("best of 16", "first token", "p50", "p95", "requests/s", "tokens/s"),
        [
            *rows("concurrency", "{at_once} at a time"),
            *rows("prompt", "prompt of {prompt_tokens:.0f} tokens"),
            *rows("length", "{max_tokens} new tokens"),
        ],
    )


def goodput(found: dict[str, Any]) -> str:
    """Answers in time under load that does not wait."""
    told = found["goodput"]
    return (
        table(
            ("load, of capacity", "requests/s", "answered", "turned away", "p50", "p95", "in time", "goodput"),
            [
                (
                    share,
                    f"{one['requests_per_s']:.2f}",
                    str(one["answered"]),
                    str(one["turned_away"]),
                    f"{one['latency_s']['p50']:.2f} s",
                    f"{one['latency_s']['p95']:.2f} s",
                    f"{100 * one['good']['share']:.0f} %",
                    f"{one['good']['per_s']:.2f}/s",
                )
                for share, one in told["loads"].items()
            ],
        )
        + f"\nBest of {told['best_of']} at Poisson times; in time is within {told['objective_s']:.2f} s, three times "
        f"the median of a request alone; capacity is {told['capacity_per_s']:.2f} requests/s with eight at a time.\n"
    )
