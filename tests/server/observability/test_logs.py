"""Log lines: each has the id of its request, each request has an access line, and no line contains a text."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.observability import logs
from server.observability.request_context import open_record
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_over, pipeline

CHAT = "/v1/chat/completions"
SECRET = "xyzzy"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """A stream for `configure` to write to; logging is restored after the test."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    handlers, level = root.handlers[:], root.level
    names = (*logs.LOG_WHOLE_REQUESTS, "uvicorn", "uvicorn.error")
    levels = {name: logging.getLogger(name).level for name in names}
    uvicorn_before = uvicorn.handlers[:], uvicorn.propagate
    uvicorn.handlers[:], uvicorn.propagate = [], True  # other tests serve with uvicorn's own logging
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield io.StringIO()
    logging.captureWarnings(False)
    uvicorn.handlers[:], uvicorn.propagate = uvicorn_before
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def lines_of(written: io.StringIO, logger: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in lines if line["logger"] == logger]


class TestRequestId:
    async def test_the_id_of_the_client_is_returned(self) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            reply = await client.post(CHAT, json=HELLO, headers={"X-Request-ID": "order-66:retry.1"})
        assert reply.headers["x-request-id"] == "order-66:retry.1"

    @pytest.mark.parametrize("client_id", ["", "two words", "a" * 129, 'quo"ted', "tab\tbed", "caf\u00e9"])
    async def test_an_id_that_could_forge_log_lines_is_replaced(self, client_id: str) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            reply = await client.get("/v1/models", headers={b"X-Request-ID": client_id.encode("latin-1")})
        assert reply.headers["x-request-id"].startswith("req_")

    async def test_two_requests_have_two_ids(self) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            ids = {(await client.get("/v1/models")).headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2

    async def test_every_reply_has_an_id_even_after_a_bug(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = ScriptedGenerator(["word"])
        async with client_over(generator) as client:
            refused = await client.post(CHAT, json=HELLO | {"best_of": 0})
            unknown = await client.get("/no/such/path")
            streamed = await client.post(CHAT, json=HELLO | {"stream": True})
            monkeypatch.setattr(generator, "generate", None)
            after_bug = await client.post(CHAT, json=HELLO)
        replies = (refused, unknown, streamed, after_bug)
        assert [reply.status_code for reply in replies] == [400, 404, 200, 500]
        assert all(reply.headers["x-request-id"].startswith("req_") for reply in replies)

    async def test_the_official_client_exposes_the_id(self) -> None:
        app = app_over(pipeline(ScriptedGenerator(["word"])))
        async with (
            address_of(app) as address,
            openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
        ):
            answer = await client.chat.completions.create(
                model="scripted",
                messages=[{"role": "user", "content": "Hello?"}],
                extra_headers={"X-Request-ID": "mine"},
            )
        assert answer._request_id == "mine"


class TestAccessLine:
    async def test_it_has_the_endpoint_the_status_and_the_tokens(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        async with client_over(ScriptedGenerator(["so good", "bad"])) as client:
            await client.post(CHAT, json=HELLO | {"best_of": 2}, headers={"X-Request-ID": "mine"})
        [line] = [line for line in lines_of(written, "nbest.access") if line["endpoint"] == CHAT]
        assert line.pop("time")
        assert line.pop("message")
        assert line.pop("duration_s") >= 0
        assert line == {
            "level": "INFO",
            "logger": "nbest.access",
            "request_id": "mine",
            "method": "POST",
            "endpoint": CHAT,
            "status": 200,
            "prompt_tokens": 7,
            "generated_tokens": 3,
            "scored_tokens": 3,
        }

    async def test_a_request_without_an_answer_has_no_tokens(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        async with client_over(ScriptedGenerator([None])) as client:
            await client.post(CHAT, json=HELLO)
        [line] = [line for line in lines_of(written, "nbest.access") if line["endpoint"] == CHAT]
        assert line["status"] == 503
        assert "generated_tokens" not in line

    async def test_a_score_request_has_the_tokens_that_the_scorer_read(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        async with client_over(ScriptedGenerator(["word"])) as client:
            await client.post("/v1/score", json={"prompt": "x", "candidates": ["great fun"]})
        [line] = [line for line in lines_of(written, "nbest.access") if line["endpoint"] == "/v1/score"]
        assert line["scored_tokens"] == 2

    async def test_probes_are_logged_at_debug_only(self, written: io.StringIO) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            logs.configure("info", "json", written)
            await client.get("/health")
            assert lines_of(written, "nbest.access") == []
            logs.configure("debug", "json", written)
            await client.get("/health")
            assert [line["endpoint"] for line in lines_of(written, "nbest.access")] == ["/health"]

    @pytest.mark.parametrize("log_format", ["text", "json"])
    async def test_no_text_of_a_request_or_an_answer_is_written_at_any_level(
        self, log_format: logs.LogFormat, written: io.StringIO
    ) -> None:
        logs.configure("debug", log_format, written)
        message = {"role": "user", "content": SECRET}
        async with client_over(ScriptedGenerator([SECRET]), ScriptedScorer(fails=True)) as client:
            for extra in ({}, {"stream": True}, {"nbest": {"on_reward_failure": "first"}}, {"best_of": 0}):
                await client.post(CHAT, json=HELLO | {"messages": [message]} | extra)
            await client.get(f"/{SECRET}?{SECRET}")
        server_lines = [line for line in written.getvalue().splitlines() if "httpx" not in line]  # the test's client
        assert any(CHAT in line for line in server_lines)
        assert not [line for line in server_lines if SECRET in line]


class TestLines:
    async def test_every_line_of_a_request_has_its_id_even_from_tasks_and_threads(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        log = logging.getLogger("some.library")

        async def request(name: str) -> None:
            open_record("GET", name)
            await asyncio.create_task(asyncio.to_thread(log.warning, "from a thread of %s", name))

        await asyncio.gather(asyncio.create_task(request("a")), asyncio.create_task(request("b")))
        log.warning("outside of requests")
        ids = {(line["message"], line.get("request_id")) for line in lines_of(written, "some.library")}
        assert ids == {("from a thread of a", "a"), ("from a thread of b", "b"), ("outside of requests", None)}

    def test_text_lines_have_the_id_or_a_dash(self, written: io.StringIO) -> None:
        logs.configure("info", "text", written)
        logging.getLogger("nbest").warning("nothing is wrong")
        assert written.getvalue() == "WARNING nbest [-]: nothing is wrong\n"

    def test_a_traceback_is_one_json_line(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        try:
            raise RuntimeError("scripted")
        except RuntimeError:
            logging.getLogger("nbest").exception("It broke.")
        [line] = lines_of(written, "nbest")
        assert (line["message"], line["level"]) == ("It broke.", "ERROR")
        assert line["traceback"].endswith("RuntimeError: scripted")

    def test_json_lines_omit_the_coloured_message_of_uvicorn(self, written: io.StringIO) -> None:
        logs.configure("info", "json", written)
        logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "in colour"})
        [line] = lines_of(written, "uvicorn.error")
        assert line.keys() == {"time", "level", "logger", "message"}

    def test_debug_lines_of_the_openai_client_with_whole_requests_are_not_written(self, written: io.StringIO) -> None:
        logs.configure("debug", "json", written)
        logging.getLogger("openai._base_client").debug("Request options: %s", SECRET)
        assert written.getvalue() == ""

    async def test_the_bug_behind_a_500_is_logged_with_the_id_of_the_request(
        self, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = ScriptedGenerator(["word"])
        app = app_over(pipeline(generator))
        logs.configure("warning", "json", written)
        async with address_of(app) as address, httpx.AsyncClient() as client:
            monkeypatch.setattr(generator, "generate", None)
            reply = await client.post(f"{address}{CHAT}", json=HELLO, headers={"X-Request-ID": "mine"})
        assert reply.status_code == 500
        [line] = lines_of(written, "uvicorn.error")
        assert (line["level"], line["request_id"]) == ("ERROR", "mine")
        assert "TypeError" in line["traceback"]
