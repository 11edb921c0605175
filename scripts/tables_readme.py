"""The table of README, from results that docs/benchmarks.md, docs/stopping.md and docs/reliability.md show in full."""

from collections.abc import Callable
from typing import Any

from reranker.markdown import table


def figures(result: Callable[[str], Any]) -> str:
    """The quality, the speed and the reliability of best-of-N, one line each; `result` reads a result by its name."""
    quality, others, stopping = result("quality"), result("side_by_side"), result("stopping")
    killed = result("reliability")["killed"]
    times_as_long = others["times_as_long_as_nbest"]
    share = stopping["policies"]["film reviews"]["adaptive_rejection"]["equal"]["token_share"]["mean"]
    at_once, best_of = others["at_once"], others["best_of"]

    def by_n(curve: dict[str, Any]) -> str:
        return " → ".join(f"{point['mean']:.2f}" for point in curve.values())

    counts = " → ".join(quality["winner_reward"])
    scoring = (
        f"best of {best_of} *with* scoring, as a share of `vllm serve` with its defaults and n={best_of} *without*"
    )
    share_of_plain = f"plain best-of-{stopping['plain_n']}'s tokens that `adaptive_rejection` needs for the same reward"
    rows = [
        (f"mean reward of the winner, best of {counts}", by_n(quality["winner_reward"])),
        ("the same answers by an independent judge (VADER, -1 to 1)", by_n(quality["winner_vader"])),
        (f"time of {scoring}", f"{1 / times_as_long['vllm, defaults']['one']['median']:.2f}"),
        (
            f"answers per second with {at_once} requests at once, against scoring after `vllm serve`",
            f"{times_as_long['vllm, then score']['at once']['median']:.1f} times as many",
        ),
        (
            "the same, against a script of transformers",
            f"{times_as_long['script']['at once']['median']:.1f} times as many",
        ),
        (f"share of {share_of_plain}", f"{share:.2f}"),
        (
            f"engine killed under {killed['in_flight']} requests, {killed['rounds']} times",
            f"{killed['statuses']['200']} answered, {killed['lost']} lost",
        ),
    ]
    return table(("measured on two CPU cores, with the embedded models", ""), rows)
