"""How the suite is spread over two processes: `make test` runs pytest with -n 2.

A file is a unit of work. Tests that start real engines or Ray clusters are one unit together, which begins first: each
takes both cores and gigabytes of memory, so two of them never run at the same time, and what a session shares is
started once.
"""

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
ENGINES_AND_CLUSTERS = ("end_to_end/", "server/distributed/", "training/rl/test_on_ray.py")
"""Paths below tests/, or beginnings of them."""


class UnitScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped here
    """Sends each unit to one process as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].removeprefix(f"{TESTS.name}/")
        return "engines and clusters" if file.startswith(ENGINES_AND_CLUSTERS) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> UnitScheduling:
    return UnitScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the largest unit to the front: it takes longest."""
    items.sort(key=lambda item: not str(item.path.relative_to(TESTS)).startswith(ENGINES_AND_CLUSTERS))
