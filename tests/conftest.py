"""Which tests need the machine for themselves.

`make test` runs the suite in two parts. Most tests run in two processes, a file at a time in each. Tests that start
real engines, their workers or Ray clusters come after them, in one process. The threads of an engine wait for each
other after each matrix product: a second process on the same two cores makes an engine many times slower.
"""

import pytest

ALONE = ("engine", "ray")
"""Markers of tests that are not run beside others; such tests get the marker `alone`."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(name) for name in ALONE):
            item.add_marker("alone")
