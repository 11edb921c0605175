"""Waits in tests for a condition that another thread or process makes true."""

import time
from typing import Any


def eventually(condition: Any, timeout_s: float = 10) -> bool:
    """Whether the condition becomes true within the time limit; checks it every 20 ms."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True
