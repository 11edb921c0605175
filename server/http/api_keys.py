"""API keys: who may ask, and how much.

    [keys.alice]
    sha256 = "9f86d081884c7d65…"     # of the key; the key itself is kept nowhere
    requests_per_minute = 60          # budgets are optional
    tokens_per_minute = 100000
    tokens_per_day = 5000000
    admin = true                      # may load adapters; see `server.http.access`

A key is 256 random bits, so a single SHA-256 is enough at rest: slow hashes protect what people think up, and nobody
guesses 256 bits, however fast each guess is. What is presented is hashed and compared with every hash in constant time,
so that neither the time nor the order tells how near a guess came.

Tokens are reserved by the upper estimate when a request comes in and settled by what it used: so many requests at once
do not overdraw a budget, and what was not used is given back.

The file is read again when it has changed, so that a key is revoked by removing it. One that cannot be read then leaves
the keys as they were, and the log says so.

Budgets over time, as token buckets.

A bucket holds what may be spent at once and refills evenly: 60 a minute is one each second, and 60 at once after a
quiet minute. More than the bucket holds may be taken from a full one, which then is in debt until it has refilled: no
request is too large to be ever let through, and in the long run nobody gets more than the budget.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.config import ConfigError
from server.errors import AuthenticationError, BadRequestError, NotReadyError, OverloadedError, RateLimitError

MINUTE_S = 60.0
DAY_S = 86_400.0


class Bucket:
    """Refills to `capacity` within `period_s`; full at first. Pure; the caller says what time it is."""

    def __init__(self, capacity: float, period_s: float, now_s: float) -> None:
        self._capacity = capacity
        self._rate_per_s = capacity / period_s
        self._level = capacity
        self._filled_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0 if it may be now."""
        self._refill(now_s)
        return max(0.0, min(amount, self._capacity) - self._level) / self._rate_per_s

    def take(self, amount: float, now_s: float) -> None:
        """Spends the amount; a negative one gives back what was taken and not used."""
        self._refill(now_s)
        self._level = min(self._level - amount, self._capacity)

    def _refill(self, now_s: float) -> None:
        self._level = min(self._capacity, self._level + (now_s - self._filled_s) * self._rate_per_s)
        self._filled_s = now_s


KEY_PREFIX = "nbest-"
"""By which secret scanners and people tell what leaked."""
KEY_BYTES = 32
LOOK_AGAIN_S = 1.0
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names that TOML takes without quotes."""

log = logging.getLogger("nbest")

Clock = Callable[[], float]
Headers = Iterable[tuple[bytes, bytes]]


class KeyEntry(BaseModel):
    """One key as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1)] | None = None
    admin: bool = False

    @property
    def has_budgets(self) -> bool:
        return any((self.requests_per_minute, self.tokens_per_minute, self.tokens_per_day))


class KeysFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: dict[str, KeyEntry] = Field(default_factory=dict)


def read_keys(file: Path) -> dict[str, KeyEntry]:
    """Name -> key.

    Raises:
        ConfigError: the file is not there or is none of keys.
    """
    try:
        return KeysFile.model_validate(tomllib.loads(file.read_text())).keys
    except FileNotFoundError:
        raise ConfigError(f"The keys file {file} does not exist; make it with `nbest keys new NAME`.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place} in the keys file {file}: {first['msg'].lower()}; correct it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The keys file {file} cannot be read as TOML: {error}; correct it.") from None


def new_key(file: Path, name: str, *, admin: bool = False, **budgets: int | None) -> str:
    """A new key, whose hash and rights are appended to the file; only the caller ever has the key.

    Raises:
        ConfigError: the name is taken or cannot be one, or the file is none of keys.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key; use up to 64 letters, digits, - and _.")
    if file.exists() and name in read_keys(file):
        raise ConfigError(f"{file} has a key {name} already; remove that first, or choose another name.")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = KeyEntry(sha256=digest(key), admin=admin, **budgets)
    lines = [  # a string, a number or true: what JSON and TOML write alike
        f"{field} = {json.dumps(value)}"
        for field, value in entry.model_dump(exclude_none=True, exclude_defaults=True).items()
    ]
    try:
        with open(file, "a", opener=lambda path, flags: os.open(path, flags, mode=0o600)) as appended:
            appended.write("\n".join(["", f"[keys.{name}]", *lines, ""]))
    except OSError as error:
        raise ConfigError(f"The keys file {file} cannot be written: {error.strerror}; choose another place.") from error
    return key


def digest(key: str) -> str:
    """The hash of a key as the file has it."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Budget:
    """A bucket, and what to call it before the client."""

    bucket: Bucket
    called: str

    @classmethod
    def of(cls, amount: int | None, unit: str, period_s: float, now_s: float) -> "list[Budget]":
        """One budget, or none where there is no limit."""
        if amount is None:
            return []
        return [cls(Bucket(amount, period_s, now_s), f"{amount} {unit} a {'day' if period_s == DAY_S else 'minute'}")]


@dataclass(slots=True)
class Spending:
    """What one request uses: at first the estimate, and once it is known what it was."""

    tokens: float


class Account:
    """Whoever holds one key, with what is left of its budgets."""

    def __init__(self, name: str, entry: KeyEntry, clock: Clock) -> None:
        self.name = name
        self.entry = entry
        self._clock = clock
        now_s = clock()
        self._requests = Budget.of(entry.requests_per_minute, "requests", MINUTE_S, now_s)
        self._tokens = [
            *Budget.of(entry.tokens_per_minute, "tokens", MINUTE_S, now_s),
            *Budget.of(entry.tokens_per_day, "tokens", DAY_S, now_s),
        ]

    def count_request(self) -> None:
        """One request more.

        Raises:
            RateLimitError: there have been as many as the budget allows.
        """
        self._take(self._requests, 1, "requests")

    @contextmanager
    def spending(self, estimate: float) -> Iterator[Spending]:
        """Reserves the estimated tokens, and settles on leaving by what `Spending` was told.

        A request that was refused costs nothing. One that was cut off costs its estimate, since nobody counted what it
        used: otherwise hanging up just before the end would be free.

        Raises:
            RateLimitError: not so much is left.
        """
        self._take(self._tokens, estimate, "tokens")
        spending = Spending(estimate)
        try:
            yield spending
        except (BadRequestError, NotReadyError, OverloadedError):
            spending.tokens = 0
            raise
        finally:
            for budget in self._tokens:
                budget.bucket.take(spending.tokens - estimate, self._clock())

    def _take(self, budgets: list[Budget], amount: float, unit: Literal["requests", "tokens"]) -> None:
        now_s = self._clock()
        for budget in budgets:
            if wait_s := budget.bucket.wait_s(amount, now_s):
                raise RateLimitError(
                    f"The key {self.name} has used its {budget.called}; try again after the seconds of Retry-After.",
                    retry_after_s=wait_s,
                    unit=unit,
                )
        for budget in budgets:
            budget.bucket.take(amount, now_s)


class Keys:
    """The keys of a file, each with its account."""

    def __init__(self, file: Path, clock: Clock = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._looked_s = clock()
        self._version = self._stat()
        self._accounts = {name: Account(name, entry, clock) for name, entry in read_keys(file).items()}

    def account(self, headers: Headers) -> Account:
        """The account of the key in the Authorization header.

        Raises:
            AuthenticationError: there is no key, or none of ours.
        """
        self._look_again()
        header = next((value for name, value in headers if name == b"authorization"), b"").decode("latin-1")
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("There is no API key in the request; send Authorization: Bearer KEY.")
        presented = digest(key.strip())
        # All of them, whichever matches.
        matching = [one for one in self._accounts.values() if hmac.compare_digest(one.entry.sha256, presented)]
        if not matching:
            raise AuthenticationError("This API key is not known here; ask whoever runs this server for one.")
        return matching[0]

    def _look_again(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_AGAIN_S:
            return
        self._looked_s = now_s
        version = self._stat()
        if version == self._version:
            return
        self._version = version
        try:
            entries = read_keys(self._file)
        except ConfigError as error:
            log.error("The keys stay as they were. %s", error)
            return
        before = self._accounts
        self._accounts = {
            name: before[name] if name in before and before[name].entry == entry else Account(name, entry, self._clock)
            for name, entry in entries.items()
        }

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size)


ANYONE = Account("anyone", KeyEntry(sha256="0" * 64), time.monotonic)
"""Who asks where no key is asked for: nothing is limited."""
