"""The custom_ids and line numbers of an input that have been used, in a bounded number of bytes per line."""

import hashlib

DIGEST_BYTES = 16
"""Two of a billion names share a digest with a probability of 10⁻²¹."""


class LineSet:
    """A set of line numbers, as one flag byte for each line up to the highest: a megabyte for a million lines."""

    def __init__(self) -> None:
        self._flags = bytearray()

    def __contains__(self, line: int) -> bool:
        return line < len(self._flags) and bool(self._flags[line])

    def __len__(self) -> int:
        return self._flags.count(True)

    def add(self, line: int) -> None:
        self._flags.extend(bytes(max(0, line + 1 - len(self._flags))))
        self._flags[line] = True


class CustomIds:
    """The names of the lines so far. A line without a custom_id has its line number as its name.

    Holds a digest of `DIGEST_BYTES` for each custom_id, and a flag for each line that has none.
    """

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._numbered = LineSet()

    def claim(self, custom_id: str | None, line: int) -> bool:
        """Gives the line its name; False if an earlier line has that name."""
        digest = _digest(custom_id or str(line))
        if custom_id is None:
            self._numbered.add(line)
            return digest not in self._digests
        if digest in self._digests or self._is_number_of_line(custom_id):
            return False
        self._digests.add(digest)
        return True

    def _is_number_of_line(self, custom_id: str) -> bool:
        """Whether it is the number of an earlier line that has no custom_id."""
        if not custom_id.isdecimal() or len(custom_id) >= 16:  # longer ones are no line numbers, and int() is slow
            return False
        return custom_id == str(int(custom_id)) and int(custom_id) in self._numbered


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
