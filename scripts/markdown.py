"""Markdown from data."""

from collections.abc import Iterable, Mapping


def with_extremes(ratio: Mapping[str, float]) -> str:
    """A median and its extremes, as in `benchmarks.stats.paired_ratio`."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heading = tuple(heading)
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
