"""Which lines of an input are meant, and under which names: in a bit a line, and a short digest a name."""

import hashlib

DIGEST_BYTES = 16
"""Two of a billion names share a digest with a probability of 10⁻²¹."""


class LineSet:
    """A set of line numbers, a bit each: a million of them are 125 kB."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __contains__(self, line: int) -> bool:
        place, bit = divmod(line, 8)
        return place < len(self._bits) and bool(self._bits[place] >> bit & 1)

    def __len__(self) -> int:
        return self._count

    def add(self, line: int) -> None:
        if line in self:
            return
        place, bit = divmod(line, 8)
        self._bits.extend(bytes(max(0, place + 1 - len(self._bits))))
        self._bits[place] |= 1 << bit
        self._count += 1


class CustomIds:
    """The names taken so far. A line without a custom_id is called by its number."""

    def __init__(self) -> None:
        self._given: set[bytes] = set()
        self._numbered = LineSet()

    def take(self, custom_id: str | None, line: int) -> bool:
        """Takes a name for a line; False if an earlier line has it."""
        name = _digest(custom_id or str(line))
        if custom_id is None:
            self._numbered.add(line)
            return name not in self._given
        if name in self._given or (custom_id.isdecimal() and len(custom_id) < 16 and self._is_numbered(custom_id)):
            return False
        self._given.add(name)
        return True

    def _is_numbered(self, custom_id: str) -> bool:
        return custom_id == str(int(custom_id)) and int(custom_id) in self._numbered


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
