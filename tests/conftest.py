"""How the suite is spread over two processes (`make test` runs pytest with -n 2 --dist loadgroup).

A file is a unit of work. Tests that start real engines, Ray clusters or browsers are one unit together: each takes both
cores and hundreds of MiB, so two of them never run at the same time, and the fixtures of a session are made once.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ALONE = ("engine", "ray")
"""Markers of tests that take a machine of their own."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test its unit, and moves those of the largest unit to the front: it takes longest."""
    for item in items:
        alone = any(item.get_closest_marker(name) for name in ALONE)
        group = "engines and clusters" if alone else str(item.path.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ALONE))
