"""API keys and their budgets of requests and tokens.

The keys are in a TOML file:

    [keys.alice]
    sha256 = "9f86d081884c7d65…"     # of the key; the key itself is stored nowhere
    requests_per_minute = 60          # budgets are optional
    tokens_per_minute = 100000
    tokens_per_day = 5000000
    admin = true                      # may load adapters; see `server.http.access`

A key is 256 random bits, so a single SHA-256 is enough to store it: slow hashes protect passwords that people choose,
and nobody guesses 256 bits, however fast each guess is. The hash of a presented key is compared with every stored hash
in constant time, so that neither the time nor the order of the keys shows how close a guess came.

The upper estimate of a request's tokens is reserved when it arrives and replaced by the tokens it used when it ends. So
concurrent requests do not overdraw a budget, and what was not used is returned.

The file is read again when it has changed, so a key is revoked by removing it. If the changed file cannot be read, the
keys stay as they were, and the error is logged.
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
from server.http.token_buckets import TokenBucket

KEY_PREFIX = "nbest-"
"""Lets people and secret scanners recognise a leaked key."""
KEY_BYTES = 32
RELOAD_INTERVAL_S = 1.0
"""How often, at most, the file is checked for changes."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names that TOML accepts without quotes."""
MINUTE_S = 60.0
DAY_S = 86_400.0

log = logging.getLogger("nbest")

Clock = Callable[[], float]
Headers = Iterable[tuple[bytes, bytes]]


class KeyEntry(BaseModel):
    """One key as it is stored in the file."""

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
    """The keys of the file, by name.

    Raises:
        ConfigError: the file does not exist or is not a file of keys.
    """
    try:
        return KeysFile.model_validate(tomllib.loads(file.read_text())).keys
    except FileNotFoundError:
        raise ConfigError(f"The keys file {file} does not exist; make it with `nbest keys new NAME`.") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{field} in the keys file {file}: {first['msg'].lower()}; correct it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The keys file {file} cannot be read as TOML: {error}; correct it.") from None


def new_key(file: Path, name: str, *, admin: bool = False, **budgets: int | None) -> str:
    """Makes a key and appends its hash and rights to the file; the key itself is only returned.

    Raises:
        ConfigError: the name is invalid or already used, or the file is not a file of keys or cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key; use up to 64 letters, digits, - and _.")
    if file.exists() and name in read_keys(file):
        raise ConfigError(f"{file} has a key {name} already; remove that key first, or choose another name.")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = KeyEntry(sha256=digest(key), admin=admin, **budgets)
    lines = [  # JSON and TOML write strings, numbers and true in the same way
        f"{field} = {json.dumps(value)}"
        for field, value in entry.model_dump(exclude_none=True, exclude_defaults=True).items()
    ]
    try:
        with open(file, "a", opener=lambda path, flags: os.open(path, flags, mode=0o600)) as appended:
            appended.write("\n".join(["", f"[keys.{name}]", *lines, ""]))
    except OSError as error:
        raise ConfigError(f"The keys file {file} cannot be written: {error.strerror}; choose another path.") from error
    return key


def digest(key: str) -> str:
    """The hash of a key, as the file stores it."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Budget:
    """A token bucket, and its description for error messages, such as "60 requests a minute"."""

    bucket: TokenBucket
    description: str

    @classmethod
    def of(cls, amount: int | None, unit: str, period_s: float, now_s: float) -> "list[Budget]":
        """One budget, or an empty list where there is no limit."""
        if amount is None:
            return []
        period = "day" if period_s == DAY_S else "minute"
        return [cls(TokenBucket(amount, period_s, now_s), f"{amount} {unit} a {period}")]


@dataclass(slots=True)
class Spending:
    """The tokens that one request costs: the estimate at first, then the tokens it used."""

    tokens: float


class Account:
    """The holder of one key, with what is left of its budgets."""

    def __init__(self, name: str, entry: KeyEntry, clock: Clock) -> None:
        self.name = name
        self.entry = entry
        self._clock = clock
        now_s = clock()
        self._request_budgets = Budget.of(entry.requests_per_minute, "requests", MINUTE_S, now_s)
        self._token_budgets = [
            *Budget.of(entry.tokens_per_minute, "tokens", MINUTE_S, now_s),
            *Budget.of(entry.tokens_per_day, "tokens", DAY_S, now_s),
        ]

    def count_request(self) -> None:
        """Counts a request against the budget of requests.

        Raises:
            RateLimitError: the budget is used up for now.
        """
        self._take(self._request_budgets, 1, "requests")

    @contextmanager
    def spending(self, estimate: float) -> Iterator[Spending]:
        """Reserves the estimated tokens; on leaving, replaces them by the `tokens` set on the yielded `Spending`.

        A refused request costs nothing. A request that was cancelled costs its estimate, since its tokens were not
        counted: otherwise a client could pay nothing by disconnecting just before the end.

        Raises:
            RateLimitError: the budget has too few tokens left for now.
        """
        self._take(self._token_budgets, estimate, "tokens")
        spending = Spending(estimate)
        try:
            yield spending
        except (BadRequestError, NotReadyError, OverloadedError):
            spending.tokens = 0
            raise
        finally:
            for budget in self._token_budgets:
                budget.bucket.take(spending.tokens - estimate, self._clock())

    def _take(self, budgets: list[Budget], amount: float, unit: Literal["requests", "tokens"]) -> None:
        now_s = self._clock()
        for budget in budgets:
            if wait_s := budget.bucket.wait_s(amount, now_s):
                raise RateLimitError(
                    f"The key {self.name} has used its {budget.description}; try again after the seconds of "
                    "Retry-After.",
                    retry_after_s=wait_s,
                    unit=unit,
                )
        for budget in budgets:
            budget.bucket.take(amount, now_s)


class Keys:
    """The keys of a file, each with its account; the file is read again when it has changed."""

    def __init__(self, file: Path, clock: Clock = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._checked_s = clock()
        self._version = self._stat()
        self._accounts = {name: Account(name, entry, clock) for name, entry in read_keys(file).items()}

    def account(self, headers: Headers) -> Account:
        """The account of the key in the Authorization header.

        Raises:
            AuthenticationError: the header holds no key, or an unknown key.
        """
        self._reload_if_changed()
        header = next((value for name, value in headers if name == b"authorization"), b"").decode("latin-1")
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("There is no API key in the request; send Authorization: Bearer KEY.")
        presented = digest(key.strip())
        # Compares with all of them, even after a match, so that the time does not depend on the position.
        matching = [
            account for account in self._accounts.values() if hmac.compare_digest(account.entry.sha256, presented)
        ]
        if not matching:
            raise AuthenticationError("This API key is not known here; ask the operator of this server for one.")
        return matching[0]

    def _reload_if_changed(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < RELOAD_INTERVAL_S:
            return
        self._checked_s = now_s
        version = self._stat()
        if version == self._version:
            return
        self._version = version
        try:
            entries = read_keys(self._file)
        except ConfigError as error:
            log.error("The keys stay as they were. %s", error)
            return
        # Accounts whose entry is unchanged keep what is left of their budgets.
        before = self._accounts
        self._accounts = {
            name: before[name] if name in before and before[name].entry == entry else Account(name, entry, self._clock)
            for name, entry in entries.items()
        }

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


ANONYMOUS = Account("anonymous", KeyEntry(sha256="0" * 64), time.monotonic)
"""The account of clients that need no key: no budgets, no admin rights."""
