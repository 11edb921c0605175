"""Markdown tables and figures from data."""

from collections.abc import Mapping
from typing import Any


def with_extremes(ratio: Mapping[str, float]) -> str:
    """A median with its extremes, as in `benchmarks.stats.spread`."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"


def machine(provenance: Mapping[str, Any]) -> str:
    """The machine of a result: CPU, cores and instruction sets, as far as they were recorded."""
    cores = [f"{provenance['cores']} cores"] if "cores" in provenance else []
    return ", ".join([provenance["cpu"], *cores, *provenance.get("instruction_sets", ())])
