"""A real headless Chromium, driven over its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/ has the commands. One page a browser, which starts empty and leaves
nothing behind.
"""

import asyncio
import itertools
import json
import shutil
import tempfile
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import websockets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",  # which a container's root has no other way round
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)
PATIENCE_S = 60
LOOKS_A_SECOND = 50
LARGEST_MESSAGE_BYTES = 2**26
CONTROL = 2
KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39}


class Page:
    """The one page of a browser. What it asks of the network and complains about is collected."""

    def __init__(self, socket: websockets.ClientConnection, session: str) -> None:
        self._socket = socket
        self._session = session
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Takes what the browser says, until it is gone."""
        async for message in self._socket:
            said = json.loads(message)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded":
                entry = said["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    async def send(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "sessionId": self._session, "method": method, "params": params}
        await self._socket.send(json.dumps(command))
        answer = await asyncio.wait_for(self._answers[number], PATIENCE_S)
        assert "error" not in answer, answer
        return answer["result"]

    async def go(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def js(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Returns when the expression is true."""
        for _ in range(PATIENCE_S * LOOKS_A_SECOND):
            if await self.js(f"Boolean({condition})"):
                return
            await asyncio.sleep(1 / LOOKS_A_SECOND)
        raise TimeoutError(f"{condition} did not come true:\n{await self.text('body')}")

    async def text(self, selector: str) -> str:
        return str(await self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def fill(self, field: str, text: str) -> None:
        """Types into a field, over what was there; one that is folded away is unfolded."""
        found = f"document.querySelector({json.dumps(field)})"
        await self.js(f"{found}.closest('details')?.setAttribute('open', ''), {found}.select()")
        await self.send("Input.insertText", text=text)

    async def choose(self, field: str, value: str) -> None:
        """One option of a select."""
        select = f"document.querySelector({json.dumps(field)})"
        changed = "for (const kind of ['input', 'change']) select.dispatchEvent(new Event(kind, {bubbles: true}))"
        await self.js(f"(() => {{ const select = {select}; select.value = {json.dumps(value)}; {changed} }})()")

    async def press(self, key: str, *, control: bool = False) -> None:
        params: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEY_CODES[key]}
        if control:
            params["modifiers"] = CONTROL
        down = {"type": "keyDown", "text": "\r"} if key == "Enter" else {"type": "rawKeyDown"}
        await self.send("Input.dispatchKeyEvent", **down, **params)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **params)

    async def resize(self, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    async def prefer(self, scheme: str) -> None:
        """What the system prefers: light or dark."""
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """A page in a browser of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *FLAGS, f"--user-data-dir={profile}", stdout=DEVNULL, stderr=DEVNULL
        )
        try:
            address = await _address(Path(profile))
            async with websockets.connect(address, max_size=LARGEST_MESSAGE_BYTES) as socket, _page(socket) as page:
                yield page
        finally:
            process.terminate()
            await process.wait()


async def _address(profile: Path) -> str:
    """Where the browser listens, which it leaves in its profile."""
    told = profile / "DevToolsActivePort"
    for _ in range(PATIENCE_S * LOOKS_A_SECOND):
        if told.exists() and len(lines := told.read_text().splitlines()) == 2:
            port, path = lines
            return f"ws://127.0.0.1:{port}{path}"
        await asyncio.sleep(1 / LOOKS_A_SECOND)
    raise TimeoutError("Chromium did not begin to listen")


@asynccontextmanager
async def _page(socket: websockets.ClientConnection) -> AsyncIterator[Page]:
    """Opens a page and follows it. The first two commands are the browser's and not yet the page's."""
    await socket.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
    target = (await _answer(socket, 1))["targetId"]
    attach = {"targetId": target, "flatten": True}
    await socket.send(json.dumps({"id": 2, "method": "Target.attachToTarget", "params": attach}))
    page = Page(socket, (await _answer(socket, 2))["sessionId"])
    listening = asyncio.create_task(page.listen())
    try:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await page.send(f"{domain}.enable")
        yield page
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def _answer(socket: websockets.ClientConnection, number: int) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while (said := json.loads(await socket.recv())).get("id") != number:
            pass
    return said["result"]
