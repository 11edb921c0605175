"""API keys: the file, the paths that require a key, and budgets with numbers computed by hand."""

import asyncio
import hashlib
import hmac
import os
import stat
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from server.cli import app as command
from server.config import ConfigError
from server.errors import AuthenticationError, BadRequestError, RateLimitError
from server.http import api_keys, playground
from server.http.api_keys import Account, KeyEntry, Keys
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_of, pipeline

CHAT = "/v1/chat/completions"
HASH = "0" * 64


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"nbest"), (b"authorization", f"Bearer {key}".encode())]


class TestFile:
    def test_only_a_key_made_as_admin_has_admin_rights(self, file: Path) -> None:
        api_keys.new_key(file, "alice")
        api_keys.new_key(file, "root", admin=True, tokens_per_day=7)
        assert {name: entry.admin for name, entry in api_keys.read_keys(file).items()} == {"alice": False, "root": True}

    def test_the_file_holds_only_the_hash_of_a_new_key(self, file: Path) -> None:
        key = api_keys.new_key(file, "alice", requests_per_minute=60)
        assert key not in file.read_text()
        assert tomllib.loads(file.read_text()) == {
            "keys": {"alice": {"sha256": hashlib.sha256(key.encode()).hexdigest(), "requests_per_minute": 60}}
        }

    def test_only_the_owner_may_read_the_file(self, file: Path) -> None:
        api_keys.new_key(file, "alice")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_a_key_is_256_random_bits(self, file: Path) -> None:
        first, second = api_keys.new_key(file, "a"), api_keys.new_key(file, "b")
        assert first != second
        assert len(first.removeprefix("nbest-")) == 43  # 256 / 6 bits a character, rounded up

    def test_new_keys_are_appended_to_the_file(self, file: Path) -> None:
        file.write_text("# a comment")
        api_keys.new_key(file, "alice")
        api_keys.new_key(file, "bob", tokens_per_day=7)
        assert file.read_text().startswith("# a comment\n[keys.alice]\n")
        assert api_keys.read_keys(file)["bob"].tokens_per_day == 7

    @pytest.mark.parametrize("name", ["alice", "", "a b", "a.b", "x" * 65, 'a"'])
    def test_a_name_that_is_used_or_invalid_is_refused_and_the_file_stays_as_it_was(
        self, file: Path, name: str
    ) -> None:
        api_keys.new_key(file, "alice")
        before = file.read_text()
        with pytest.raises(ConfigError, match=r"choose another name|cannot name a key"):
            api_keys.new_key(file, name)
        assert file.read_text() == before

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("keys = [", "cannot be read as TOML"),
            ('[keys.a]\nsha256 = "abc"', r"keys\.a\.sha256 in the keys file"),
            (f'[keys.a]\nsha256 = "{HASH}"\nrequests_per_hour = 3', "requests_per_hour"),
            (f'[keys.a]\nsha256 = "{HASH}"\ntokens_per_day = 0', "tokens_per_day"),
        ],
    )
    def test_the_error_for_an_invalid_file_names_the_field(self, file: Path, text: str, message: str) -> None:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Keys(file)

    def test_the_error_for_a_missing_file_says_how_to_make_it(self, file: Path) -> None:
        with pytest.raises(ConfigError, match="nbest keys new"):
            Keys(file)


class TestKeys:
    def test_each_key_has_its_account(self, file: Path) -> None:
        keys = {name: api_keys.new_key(file, name) for name in ("alice", "bob")}
        known = Keys(file)
        assert [known.account(bearer(key)).name for key in keys.values()] == ["alice", "bob"]

    def test_every_hash_is_compared_in_constant_time_even_after_a_match(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [api_keys.new_key(file, name) for name in ("first", "second", "third")]
        known = Keys(file)
        compared: list[str] = []
        constant_time: Callable[[str, str], bool] = hmac.compare_digest

        def recorded_comparison(stored: str, presented: str) -> bool:
            compared.append(stored)
            return constant_time(stored, presented)

        monkeypatch.setattr(hmac, "compare_digest", recorded_comparison)
        known.account(bearer(keys[0]))
        assert compared == [api_keys.digest(key) for key in keys]

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [(b"authorization", b"")],
            [(b"authorization", b"Bearer ")],
            [(b"authorization", b"Bearer nbest-wrong")],
            [(b"authorization", b"Basic nbest-wrong")],
            [(b"authorization", b"Bearer \xff\xfe")],
        ],
    )
    def test_anything_but_a_known_key_is_refused(self, file: Path, headers: list[tuple[bytes, bytes]]) -> None:
        api_keys.new_key(file, "alice")
        with pytest.raises(AuthenticationError):
            Keys(file).account(headers)

    def test_the_hash_of_a_key_is_refused(self, file: Path) -> None:
        key = api_keys.new_key(file, "alice")
        with pytest.raises(AuthenticationError):
            Keys(file).account(bearer(api_keys.digest(key)))

    def test_an_added_or_removed_key_takes_effect_within_a_second_and_other_accounts_stay(
        self, file: Path, clock: Clock
    ) -> None:
        alice = api_keys.new_key(file, "alice")
        known = Keys(file, clock)
        account = known.account(bearer(alice))
        bob = api_keys.new_key(file, "bob")
        clock.now_s = 1
        assert known.account(bearer(bob)).name == "bob"
        assert known.account(bearer(alice)) is account
        file.write_text(f'[keys.bob]\nsha256 = "{api_keys.digest(bob)}"')
        clock.now_s = 2
        with pytest.raises(AuthenticationError):
            known.account(bearer(alice))

    @pytest.mark.parametrize("broken", [b"[keys", None])
    def test_a_file_that_becomes_unreadable_leaves_the_keys_as_they_were_and_is_logged(
        self, file: Path, clock: Clock, caplog: pytest.LogCaptureFixture, broken: bytes | None
    ) -> None:
        key = api_keys.new_key(file, "alice")
        known = Keys(file, clock)
        file.unlink() if broken is None else file.write_bytes(broken)
        clock.now_s = 1
        assert known.account(bearer(key)).name == "alice"
        assert "The keys stay as they were." in caplog.text


class TestAccount:
    def test_requests_over_the_budget_of_a_minute_are_refused(self, clock: Clock) -> None:
        account = Account("alice", KeyEntry(sha256=HASH, requests_per_minute=2), clock)
        account.count_request()
        account.count_request()
        with pytest.raises(RateLimitError, match="2 requests a minute") as refused:
            account.count_request()
        assert refused.value.retry_after_s == 30
        clock.now_s = 30
        account.count_request()

    def test_the_estimated_tokens_are_reserved_and_then_replaced_by_the_used_tokens(self, clock: Clock) -> None:
        account = Account("alice", KeyEntry(sha256=HASH, tokens_per_minute=60), clock)
        with account.spending(50) as spending:
            with pytest.raises(RateLimitError, match="60 tokens a minute") as refused, account.spending(20):
                pass
            assert refused.value.retry_after_s == 10  # 10 of 60 are left, and 1 is added each second
            spending.tokens = 5
        with account.spending(55):
            pass

    def test_a_refused_request_costs_nothing(self, clock: Clock) -> None:
        account = Account("alice", KeyEntry(sha256=HASH, tokens_per_minute=60), clock)
        with pytest.raises(BadRequestError), account.spending(60):
            raise BadRequestError("no")
        with account.spending(60):
            pass

    def test_a_cancelled_request_costs_its_estimate(self, clock: Clock) -> None:
        account = Account("alice", KeyEntry(sha256=HASH, tokens_per_minute=60), clock)
        with pytest.raises(asyncio.CancelledError), account.spending(60):
            raise asyncio.CancelledError
        with pytest.raises(RateLimitError), account.spending(1):
            pass

    def test_the_budgets_of_a_minute_and_of_a_day_are_independent(self, clock: Clock) -> None:
        account = Account("alice", KeyEntry(sha256=HASH, tokens_per_minute=60, tokens_per_day=86_400), clock)
        for minute in range(100):  # 60 tokens a minute are spent and 60 are added: neither budget runs out
            clock.now_s = 60.0 * minute
            with account.spending(60):
                pass
        account = Account("alice", KeyEntry(sha256=HASH, tokens_per_minute=100, tokens_per_day=100), clock)
        with account.spending(100):
            pass
        clock.now_s += 60  # refills the minute's budget, but not the day's
        with pytest.raises(RateLimitError, match="100 tokens a day") as refused, account.spending(100):
            pass
        assert refused.value.retry_after_s == pytest.approx(86_400 - 60)


def client_of_server_with_keys(file: Path, key: str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """A client in memory, without a key, of a server that requires keys."""
    app = app_over(pipeline(ScriptedGenerator(["so very good"]), ScriptedScorer()), keys_file=file)
    return client_of(app, key)


async def test_every_path_except_health_and_the_playground_requires_a_key(file: Path) -> None:
    key = api_keys.new_key(file, "alice")
    documented = app_over(pipeline(ScriptedGenerator(["word"]))).openapi()["paths"]
    without_key = {"/health", *playground.FILES}
    assert documented.keys() & without_key == {"/health", "/"}
    others = ["/openapi.json", "/no/such/path", "/health/", "/Health", "/%2fhealth", "/playground/"]
    paths = [*documented, *without_key, *others]
    async with client_of_server_with_keys(file, key) as client:
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                reply = await client.request(method, path)
                if path in without_key:
                    assert reply.status_code in (200, 405)
                    continue
                assert reply.status_code == 401, (method, path)
                assert reply.headers["WWW-Authenticate"] == "Bearer"
                if method != "HEAD":
                    error = reply.json()["error"]
                    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        authorized = {"Authorization": f"Bearer {key}"}
        assert (await client.get("/metrics", headers=authorized)).status_code == 200
        assert (await client.post(CHAT, json=HELLO, headers=authorized)).status_code == 200


async def test_the_body_of_a_request_without_a_key_is_not_read(file: Path) -> None:
    key = api_keys.new_key(file, "alice")
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10):
            sent += 1
            yield b"x"

    async with client_of_server_with_keys(file, key) as client:
        assert (await client.post(CHAT, content=chunks())).status_code == 401
    assert sent == 0


async def test_each_key_has_its_own_budgets(file: Path) -> None:
    few_requests = api_keys.new_key(file, "few-requests", requests_per_minute=1)
    few_tokens = api_keys.new_key(file, "few-tokens", tokens_per_minute=100)
    async with client_of_server_with_keys(file, few_tokens) as client:

        async def post(key: str, **fields: Any) -> httpx.Response:
            body = HELLO | {"best_of": 1, "max_tokens": 60} | fields
            return await client.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"})

        assert (await post(few_requests)).status_code == 200
        reply = await post(few_requests)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
        assert 1 <= int(reply.headers["Retry-After"]) <= 60

        assert (await post(few_tokens)).status_code == 200  # 62 reserved, 7 + 3 used: 90 are left
        reply = await post(few_tokens, max_tokens=95)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (429, "tokens", "rate_limit_exceeded")
        body = {"prompt": "x" * 400, "candidates": ["y"]}  # 100 + 1 tokens
        reply = await client.post("/v1/score", json=body, headers={"Authorization": f"Bearer {few_tokens}"})
        assert reply.status_code == 429
        metrics = (await client.get("/metrics", headers={"Authorization": f"Bearer {few_tokens}"})).text
    assert 'nbest_shed_total{reason="requests_budget"} 1.0' in metrics
    assert 'nbest_shed_total{reason="tokens_budget"} 2.0' in metrics


async def test_the_official_client_sends_the_key_and_raises_its_own_errors_for_refusals(file: Path) -> None:
    key = api_keys.new_key(file, "alice", requests_per_minute=1)
    app = app_over(pipeline(ScriptedGenerator(["word"])), keys_file=file)
    async with address_of(app, key=key) as address:
        for api_key, refusal in [("wrong", openai.AuthenticationError), (key, None), (key, openai.RateLimitError)]:
            async with openai.AsyncOpenAI(api_key=api_key, base_url=f"{address}/v1", max_retries=0) as client:
                request = client.completions.create(model="scripted", prompt="x", best_of=1)
                if refusal is None:
                    await request
                else:
                    with pytest.raises(refusal):
                        await request


def test_the_command_prints_only_the_key_on_stdout(file: Path) -> None:
    flags = ["--file", str(file), "--tokens-per-day", "9"]
    result = CliRunner().invoke(command, ["keys", "new", "alice", *flags])
    assert result.exit_code == 0, result.output
    key = result.stdout.strip()
    [entry] = api_keys.read_keys(file).values()
    assert (entry.sha256, entry.tokens_per_day) == (api_keys.digest(key), 9)
    assert os.linesep not in key
