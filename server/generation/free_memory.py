"""Memory that was freed goes back to the system.

glibc keeps what is freed for the thread that had it. An engine's start needs a hundred MiB for a moment, in threads
that are others with the next start: without this a server grows with every engine that dies.
"""

import contextlib
import ctypes


def give_back_free_memory() -> None:
    """Takes milliseconds; does nothing where the C library is not glibc, which alone has the function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
