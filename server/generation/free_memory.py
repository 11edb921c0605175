"""Returns freed memory to the operating system.

glibc keeps freed memory for the thread that had allocated it. An engine's start needs about 100 MiB for a moment, in
threads that are different ones at the next start. Without this call a server grows with every engine that dies.
"""

import contextlib
import ctypes


def release_free_memory() -> None:
    """Calls glibc's malloc_trim, which takes milliseconds; does nothing where the C library has no such function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
