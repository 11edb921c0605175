"""Waiting in tests for what another thread or process does."""

import time
from typing import Any


def eventually(holds: Any, timeout_s: float = 10) -> bool:
    """Whether a condition becomes true; looks until it does or the time is up."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True
