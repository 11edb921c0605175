"""The playground in a real browser, over the real app: the page shows what the API returns."""

import asyncio
import json
import re
import shutil
import sys
import typing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from reranker.candidate import Prompt
from reranker.estimators import expected_max
from server.generation.base import SamplingParams
from server.http import api_keys, playground
from server.pipeline.strategies import Strategy
from tests.support.browser import CHROMIUM, Page, chromium
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_over, pipeline

pytestmark = pytest.mark.browser

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium")

TEXTS = ("a dull film", None, "a great film", "a fine film")
REWARDS = {"a dull film": -1.5, "a great film": 2.25, "a fine film": 0.5}
STATES = "[...document.querySelectorAll('#candidates li')].map((row) => row.dataset.state)"
EXPECTED_COMPLAINT = re.compile("Failed to load resource: the server responded with a status of (400|401|429|503)")
"""What the browser logs for the refusals that the tests provoke."""
WINNER = "document.querySelector('[data-state=winner]')"


class HeldGenerator(ScriptedGenerator):
    """Holds back its last candidate until `released` is set; sets `idle` when a generation has ended."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.released = asyncio.Event()
        self.idle = asyncio.Event()

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        return HeldGeneration(self, sampling, n, stream_partial)


class HeldGeneration(ScriptedGeneration):
    def __init__(self, generator: HeldGenerator, sampling: SamplingParams, n: int, stream_partial: bool) -> None:
        super().__init__(generator, sampling, n, stream_partial)
        self._released = generator.released
        self._idle = generator.idle
        self._last = n - 1

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__(None, None, None)
        self._idle.set()

    async def _write(self, index: int) -> None:
        if index == self._last:
            await self._released.wait()
        await super()._write(index)


@asynccontextmanager
async def opened(
    generator: ScriptedGenerator, *scorers: ScriptedScorer, key: str | None = None, **settings: Any
) -> AsyncIterator[tuple[Page, str]]:
    """The page in a browser, and its address; the browser must log no errors and send no request to another host."""
    app = app_over(pipeline(generator, *scorers), **settings)
    async with address_of(app, key=key) as address, chromium() as browser:
        await browser.go(f"{address}/")
        await browser.until("document.querySelector('#model').innerText.indexOf('…') < 0")
        yield browser, address
        assert {url for url in browser.requests if not url.startswith(f"{address}/")} == set()
        assert [complaint for complaint in browser.complaints if not EXPECTED_COMPLAINT.match(complaint)] == []


async def draw(browser: Page, prompt: str = "How was it?", **fields: str) -> None:
    for name, value in fields.items():
        await browser.fill(f"#{name}", value)
    await browser.fill("#prompt", prompt)
    await browser.press("Enter", control=True)


class TestFiles:
    async def test_each_is_served_with_its_type_and_a_policy_that_allows_no_other_host(self) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            for path, file in playground.FILES.items():
                reply = await client.get(path)
                assert reply.content == file.content
                assert reply.headers["content-type"].startswith(file.media_type)
                policy = reply.headers["content-security-policy"].split("; ")
                assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= {
                    *policy
                }
                assert "unsafe" not in reply.headers["content-security-policy"]
                assert reply.headers["x-content-type-options"] == "nosniff"

    def test_they_are_small_and_name_no_other_host(self) -> None:
        assert sum(len(file.content) for file in playground.FILES.values()) < 64_000
        for path, file in playground.FILES.items():
            hosts = set(re.findall(r"https?://([\w.]+)", file.content.decode()))
            assert hosts <= {"www.w3.org"}, path  # the namespace of SVG, which browsers do not fetch

    async def test_no_other_file_is_served(self) -> None:
        async with client_over(ScriptedGenerator(["word"])) as client:
            for path in ("/playground/", "/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/x.js"):
                assert (await client.get(path)).status_code == 404, path


@in_a_browser
class TestDrawing:
    async def test_candidates_appear_as_they_finish_and_the_winner_is_that_of_the_api(self) -> None:
        generator = HeldGenerator(TEXTS)
        async with opened(generator, ScriptedScorer(REWARDS)) as (browser, address):
            await draw(browser, best_of="4")
            await browser.until("document.querySelectorAll('#candidates .reward:not(:empty)').length === 2")
            assert await browser.js(STATES) == ["finished", "failed", "finished", "drawing"]
            assert "3 of 4 ended, best so far 2.25" in await browser.text("#status")
            generator.released.set()
            await browser.until(WINNER)

            body = HELLO | {"best_of": 4, "nbest": {"return_candidates": True}}
            async with httpx.AsyncClient(base_url=address) as client:
                reply = await client.post("/v1/chat/completions", json=body)
            answer = reply.json()
            assert await browser.text("[data-state=winner] .text") == answer["choices"][0]["message"]["content"]
            assert await browser.text("[data-state=winner] .number") == str(answer["nbest"]["ranking"][0] + 1)
            shown = "[...document.querySelectorAll('#candidates li')].map((row) => Number(row.dataset.index))"
            assert await browser.js(shown) == [*answer["nbest"]["ranking"], 1]  # best first, then the one that failed
            assert await browser.text("[data-state=failed] .text") == "scripted failure"
            assert "3 completed, 1 failed" in await browser.text("#status")
            assert await browser.text("#figure-reward") == "2.25"
            assert await browser.text("#figure-tokens") == str(answer["usage"]["total_tokens"])
            shares = (
                "[...document.querySelectorAll('.fill')].map((bar) => Number(bar.style.getPropertyValue('--share')))"
            )
            assert await browser.js(shares) == pytest.approx([1, 0.03 + 0.97 * 2 / 3.75, 0.03, 0])

    async def test_candidates_can_be_listed_in_the_order_of_drawing(self) -> None:
        async with opened(ScriptedGenerator(TEXTS), ScriptedScorer(REWARDS)) as (browser, _):
            await draw(browser, best_of="4")
            await browser.until(WINNER)
            await browser.js("document.querySelector('[name=order][value=drawn]').click()")
            assert await browser.js(STATES) == ["finished", "failed", "winner", "finished"]

    async def test_escape_cancels_the_unfinished_candidates_in_the_engine(self) -> None:
        generator = HeldGenerator(["early", "early", "late"])
        async with opened(generator) as (browser, _):
            await draw(browser, best_of="3")
            await browser.until("document.querySelectorAll('[data-state=finished]').length === 2")
            await browser.press("Escape")
            await browser.until("!document.body.ariaBusy")
            assert await browser.js(STATES) == ["finished", "finished", "cancelled"]
            await generator.idle.wait()
            assert generator.cancelled == [2]

    async def test_candidates_cut_off_by_a_deadline_are_shown_as_cancelled(self) -> None:
        async with opened(HeldGenerator(["early", "late"])) as (browser, _):
            await draw(browser, best_of="2", deadline_s="0.2")
            await browser.until(WINNER)
            assert await browser.js(STATES) == ["winner", "cancelled"]
            assert "1 cancelled, stopped by deadline" in await browser.text("#status")

    async def test_candidates_that_a_policy_did_not_draw_are_shown_as_not_drawn(self) -> None:
        stopping = {"policy": "adaptive", "target_reward": 0, "wave": 2}
        async with opened(ScriptedGenerator(["a", "b", "c"]), ScriptedScorer()) as (browser, _):
            await draw(browser, best_of="4", others=json.dumps({"nbest": {"stopping": stopping}}))
            await browser.until(WINNER)
            assert await browser.js(STATES) == ["winner", "finished", "spared", "spared"]
            assert "2 completed, 2 not drawn, stopped by adaptive" in await browser.text("#status")

    async def test_a_stopping_policy_can_be_chosen_in_the_form(self) -> None:
        generator = HeldGenerator(["early", "early", "early", "late"])
        async with opened(generator) as (browser, _):
            await browser.choose("#stopping", "straggler_cut")
            await draw(browser, best_of="4")
            await browser.until(WINNER)
            assert "3 completed, 1 cancelled, stopped by straggler cut" in await browser.text("#status")
            await browser.choose("#stopping", "speculative_rejection")
            code = await browser.js("document.querySelector('#snippet').textContent")
            assert re.search(r'"checkpoints": \[\s*12\s*\]', code)

    async def test_blocks_are_shown_as_they_are_chosen(self) -> None:
        scorer = ScriptedScorer({"a b": 1, "u v": 2, "u v c": 4, "u v w": 3})
        async with opened(ScriptedGenerator(["a b c", "u v w"]), scorer) as (browser, _):
            await browser.choose("#strategy", "blockwise")
            assert await browser.js("[document.querySelector('#stopping').disabled]") == [True]
            await draw(browser, best_of="2", block_tokens="2")
            await browser.until(WINNER)
            assert await browser.js(STATES) == ["winner"]
            assert await browser.text("[data-state=winner] .text") == "u v c"
            assert await browser.text("[data-state=winner] .reward") == "4.00"
            assert await browser.text("#figure-reward") == "4.00"
            assert await browser.text("#status") == "The answer has 2 blocks, each the best of 2."

    async def test_a_single_candidate_of_a_text_completion_grows(self) -> None:
        generator = ScriptedGenerator(["so very good " + "word " * 40], word_delay_s=0.05)
        async with opened(generator) as (browser, _):
            await browser.js("document.querySelector('[name=kind][value=completion]').click()")
            await draw(browser, "It was", best_of="1")
            await browser.until("document.querySelector('.text').innerText.startsWith('so very')")
            assert await browser.js(STATES) == ["drawing"]
            assert generator.calls[0][0].text == "It was"
            await browser.press("Escape")

    async def test_the_form_offers_the_served_scorers_and_strategies(self) -> None:
        other = ScriptedScorer({"a": 2.0, "b": 1.0})
        other.name = "other"
        async with opened(ScriptedGenerator(["a", "b"]), ScriptedScorer({"a": 1.0, "b": 2.0}), other) as (browser, _):
            options = "[...document.querySelectorAll('#{} option')].map((option) => option.value)"
            assert await browser.js(options.format("reward_model")) == ["scripted-reward", "other"]
            assert await browser.js(options.format("strategy")) == list(typing.get_args(Strategy))
            await browser.choose("#reward_model", "other")
            await draw(browser, best_of="2")
            await browser.until(WINNER)
            assert await browser.text("[data-state=winner] .text") == "a"
            await browser.choose("#strategy", "majority")
            await draw(browser, best_of="2")
            await browser.until(f"!document.body.ariaBusy && {WINNER}")
            assert await browser.text("#figure-reward") == "none"
            assert await browser.js("document.querySelector('#curve').hidden")

    async def test_markup_in_an_answer_is_shown_as_text(self) -> None:
        text = "<img src=x onerror=alert(1)><b>bold</b>"
        async with opened(ScriptedGenerator([text])) as (browser, address):
            await draw(browser, best_of="2")
            await browser.until(WINNER)
            assert await browser.text("[data-state=winner] .text") == text
            assert f"{address}/x" not in browser.requests

    async def test_other_fields_are_sent_as_json(self) -> None:
        generator = ScriptedGenerator(["word"])
        async with opened(generator) as (browser, _):
            await browser.js("document.querySelector('#more').open = true")
            await browser.fill("#others", '{"top_p": 0')
            await browser.js("document.querySelector('#more').open = false")
            await draw(browser)
            assert await browser.js("document.querySelector('#more').open")  # it shows the invalid field
            assert generator.calls == []
            await draw(browser, others='{"top_p": 0.5, "nbest": {"on_reward_failure": "first"}}')
            await browser.until(WINNER)
            assert generator.calls[0][1].top_p == 0.5


@in_a_browser
class TestFigures:
    async def test_the_estimator_gives_the_same_values_as_that_in_python(self) -> None:
        random = Random(7)
        sizes = (1, 2, 5, 16, 64, 700)
        pools = [[random.choice([-1.5, 0.0, random.gauss(0, 3)]) for _ in range(size)] for size in sizes]
        expected = [[expected_max(pool, n) for n in range(1, len(pool) + 1)] for pool in pools]
        async with opened(ScriptedGenerator(["word"])) as (browser, _):
            estimates = await browser.js(
                "import('/playground/estimators.js').then(({ expectedMax }) => "
                f"{json.dumps(pools)}.map((pool) => pool.map((_, index) => expectedMax(pool, index + 1))))"
            )
        for in_python, in_browser in zip(expected, estimates, strict=True):
            assert in_browser == pytest.approx(in_python, rel=1e-9, abs=1e-9)

    async def test_the_curve_shows_the_estimates_for_the_pool(self) -> None:
        async with opened(ScriptedGenerator(TEXTS), ScriptedScorer(REWARDS)) as (browser, _):
            await draw(browser, best_of="4")
            await browser.until(WINNER)
            cells = await browser.js("[...document.querySelectorAll('#curve td')].map((cell) => cell.textContent)")
            # -1.5, 0.5, 2.25: the mean; pairs 0.5, 2.25, 2.25; the largest
            assert cells == ["1", "0.417", "2", "1.667", "3", "2.250"]
            assert await browser.js("document.querySelectorAll('#curve circle').length") == 3

    async def test_the_price_is_kept_after_a_reload(self) -> None:
        async with opened(ScriptedGenerator(["so very good"])) as (browser, address):
            assert await browser.js("document.querySelector('#price').value") == ""
            await browser.fill("#price", "250")
            await browser.go(f"{address}/")
            await browser.until("document.querySelector('#strategy').options.length")
            await draw(browser, best_of="2")
            await browser.until(WINNER)
            assert await browser.text("#figure-price") == "0.00325"  # (7 + 2 * 3) / 1e6 * 250

    @pytest.mark.parametrize("kind", ["chat", "completion"])
    async def test_the_code_gives_the_same_answer(self, kind: str) -> None:
        generator = ScriptedGenerator(['it\'s "fine"', "poor"])
        prompt = "It's \"quoted\", $HOME,\n`two` lines, \\n and 'ä🎬'"
        async with opened(generator, ScriptedScorer()) as (browser, _):
            await browser.js(f"document.querySelector('[name=kind][value={kind}]').click()")
            await draw(browser, prompt, best_of="2", seed="7", others='{"nbest": {"return_candidates": true}}')
            await browser.until(WINNER)
            await browser.js("document.querySelector('#code').open = true")
            curl = await browser.text("#snippet")
            await browser.js("document.querySelector('[name=language][value=python]').click()")
            python = await browser.text("#snippet")
            if shutil.which("curl"):
                assert 'it\'s \\"fine\\"' in await output("bash", "-c", curl)
            assert '11.0 it\'s "fine"' in await output(sys.executable, "-c", python)
        first, *others = generator.calls
        assert others == [first] * len(others)
        assert (first[0].text or first[0].messages[0].content) == prompt

    async def test_the_code_is_copied_or_selected_where_copying_is_forbidden(self) -> None:
        async with opened(ScriptedGenerator(["word"])) as (browser, _):
            await browser.js("document.querySelector('#code').open = true")
            code = await browser.text("#snippet")
            await browser.js("document.querySelector('#copy').click()")
            await browser.until("document.querySelector('#copy').innerText === 'Selected'")
            assert (await browser.js("getSelection().toString()")).strip() == code.strip()
            await browser.send(
                "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
            )
            await browser.js("document.querySelector('#copy').click()")
            await browser.until("document.querySelector('#copy').innerText === 'Copied'")
            assert (await browser.js("navigator.clipboard.readText()")).strip() == code.strip()


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    return stdout.decode()


@in_a_browser
class TestErrors:
    """The page shows each error as a title and a sentence that says what to do."""

    async def problem(self, browser: Page) -> str:
        await browser.until("!document.querySelector('#problem').hidden && !document.body.ariaBusy")
        return await browser.text("#problem")

    async def test_the_page_asks_for_a_key_stores_it_only_in_its_tab_and_reports_a_used_up_budget(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "keys.toml"
        key = api_keys.new_key(file, "alice", requests_per_minute=2)
        probe = api_keys.new_key(file, "probe")
        async with opened(ScriptedGenerator(["word"]), key=probe, keys_file=file) as (browser, _):
            assert "The server requires an API key" in await self.problem(browser)
            assert await browser.js("document.activeElement.id") == "key"
            await browser.send("Input.insertText", text=key)
            await browser.press("Tab")  # the first request: the list of models
            await browser.until("document.querySelector('#problem').hidden")
            await draw(browser)
            await browser.until(WINNER)
            assert key not in await browser.js("JSON.stringify({ ...localStorage }) + document.cookie")
            assert await browser.js("sessionStorage.getItem('nbest.key')") == key
            assert key not in await browser.text("body")
            await browser.js("document.querySelector('#code').open = true")
            assert "$NBEST_API_KEY" in await browser.text("#snippet")
            await draw(browser)
            problem = await self.problem(browser)
            assert "The server is busy" in problem
            assert "2 requests a minute" in problem
            assert re.search(r"\(Retry in \d+ seconds?\.\)", problem)

    async def test_an_engine_that_is_down_is_reported(self) -> None:
        generator = ScriptedGenerator(["word"])
        async with opened(generator) as (browser, _):
            generator.ready = False
            await draw(browser)
            problem = await self.problem(browser)
        assert "The server is not ready" in problem
        assert "the scripted engine is down" in problem

    async def test_an_error_event_in_the_stream_is_reported(self) -> None:
        async with opened(ScriptedGenerator(["word"]), ScriptedScorer(fails=True)) as (browser, _):
            await draw(browser, best_of="2")
            problem = await self.problem(browser)
        assert "The answer was interrupted" in problem
        assert "nbest.on_reward_failure" in problem

    @pytest.mark.parametrize("end", ["close()", "error(new TypeError('network error'))"])
    async def test_a_connection_that_ends_before_the_answer_is_reported(self, end: str) -> None:
        async with opened(ScriptedGenerator(["word"])) as (browser, _):
            stream = f"new ReadableStream({{ pull: (reader) => reader.{end} }})"
            await browser.js(f"globalThis.fetch = async () => new Response({stream})")
            await draw(browser)
            problem = await self.problem(browser)
        assert "The connection ended before the answer was complete" in problem

    async def test_a_refused_request_is_reported(self) -> None:
        async with opened(ScriptedGenerator(["word"]), max_best_of=4) as (browser, _):
            await draw(browser, best_of="5")
            problem = await self.problem(browser)
        assert "The request was refused" in problem
        assert "best_of is over the 4 candidates" in problem


@in_a_browser
class TestAccessibility:
    async def test_all_controls_can_be_reached_and_used_with_the_keyboard(self) -> None:
        async with opened(ScriptedGenerator(TEXTS), ScriptedScorer(REWARDS)) as (browser, _):
            await draw(browser, best_of="4")
            await browser.until(WINNER)
            await browser.js("document.querySelectorAll('form details').forEach((part) => { part.open = true })")
            reachable = (
                "[...document.querySelectorAll('input, select, textarea, button, summary, pre')].filter((control) => "
                "control.checkVisibility() && !control.disabled && (control.type !== 'radio' || control.checked))"
            )
            count = await browser.js(f"(globalThis.left = new Set({reachable})).size")
            assert count > 20
            for _ in range(count + 1):  # once through the page, and past the controls of the browser
                await browser.press("Tab")
                await browser.js("left.delete(document.activeElement)")
            assert await browser.js("[...left].map((control) => control.outerHTML)") == []

            await browser.js("document.querySelector('[data-state=finished] summary').focus()")
            await browser.press("Enter")
            assert await browser.js("document.querySelector('[data-state=finished] details').open")
            await browser.js("document.querySelector('[name=kind]').focus()")
            await browser.press("ArrowRight")
            assert await browser.js("document.querySelector('[name=kind]:checked').value") == "completion"

    async def test_the_theme_follows_the_system_until_one_is_chosen(self) -> None:
        async with opened(ScriptedGenerator(["word"])) as (browser, address):
            background = "getComputedStyle(document.body).backgroundColor"
            light = await browser.js(background)
            await browser.prefer("dark")
            dark = await browser.js(background)
            assert brightness(dark) < 60
            assert brightness(light) > 200
            await browser.choose("#theme", "light")
            assert await browser.js(background) == light
            await browser.go(f"{address}/")
            assert await browser.js(background) == light

    async def test_on_a_phone_the_page_scrolls_only_vertically(self) -> None:
        generator = ScriptedGenerator(["word" * 100, "a dull film", None])
        async with opened(generator, ScriptedScorer({"word" * 100: -12345678.9})) as (browser, _):
            await browser.resize(390, 844, mobile=True)
            await draw(browser, "long" * 50, best_of="3", price="12.5")
            await browser.until(WINNER)
            await browser.js("document.querySelectorAll('details').forEach((part) => { part.open = true })")
            assert await browser.js("document.documentElement.scrollWidth") == 390
            assert await browser.js("document.documentElement.scrollHeight") > 844

    async def test_every_field_has_an_accessible_name(self) -> None:
        async with opened(ScriptedGenerator(["word"])) as (browser, _):
            nodes = (await browser.send("Accessibility.getFullAXTree"))["nodes"]
        roles = {"textbox", "spinbutton", "combobox", "radio", "button", "DisclosureTriangle"}
        fields = [node for node in nodes if node.get("role", {}).get("value") in roles]
        assert len(fields) > 10
        assert [node for node in fields if not node["name"]["value"]] == []


def brightness(colour: str) -> float:
    """The mean of the three channels, 0 to 255."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
