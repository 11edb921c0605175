"""How long scorers are at it, where their calls overlap."""

import time


class Busy:
    """`seconds` in which at least one block `with` it was being run, on one event loop."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = 0
        self._since_s = 0.0

    def __enter__(self) -> None:
        if not self._running:
            self._since_s = time.perf_counter()
        self._running += 1

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if not self._running:
            self.seconds += time.perf_counter() - self._since_s
