"""A real headless Chromium, controlled over its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/ lists the commands. Each browser has one page and a fresh profile,
which is deleted at the end.
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
    "--no-sandbox",  # root in a container cannot use the sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)
TIMEOUT_S = 60
POLLS_PER_S = 50
MAX_MESSAGE_BYTES = 2**26
CONTROL = 2
"""The DevTools protocol's modifier bit of the control key."""
KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39}


class Page:
    """The only page of a browser; `requests` collects the URLs it requests, `complaints` its errors and warnings."""

    def __init__(self, socket: websockets.ClientConnection, session: str) -> None:
        self._socket = socket
        self._session = session
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Reads the browser's messages until the connection closes."""
        async for data in self._socket:
            message = json.loads(data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded":
                entry = message["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    async def send(self, method: str, **params: Any) -> Any:
        """Sends a command to the page and returns its result."""
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "sessionId": self._session, "method": method, "params": params}
        await self._socket.send(json.dumps(command))
        answer = await asyncio.wait_for(self._answers[number], TIMEOUT_S)
        assert "error" not in answer, answer
        return answer["result"]

    async def go(self, url: str) -> None:
        """Loads a page."""
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def js(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Returns when the expression is true."""
        for _ in range(TIMEOUT_S * POLLS_PER_S):
            if await self.js(f"Boolean({condition})"):
                return
            await asyncio.sleep(1 / POLLS_PER_S)
        raise TimeoutError(f"{condition} did not become true:\n{await self.text('body')}")

    async def text(self, selector: str) -> str:
        return str(await self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def fill(self, field: str, text: str) -> None:
        """Replaces the text of a field by typing; opens the <details> that contains it."""
        element = f"document.querySelector({json.dumps(field)})"
        await self.js(f"{element}.closest('details')?.setAttribute('open', ''), {element}.select()")
        await self.send("Input.insertText", text=text)

    async def choose(self, field: str, value: str) -> None:
        """Selects an option of a <select>."""
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
        """Sets the preferred colour scheme: light or dark."""
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """Starts a browser and yields its page."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *FLAGS, f"--user-data-dir={profile}", stdout=DEVNULL, stderr=DEVNULL
        )
        try:
            address = await _address(Path(profile))
            async with websockets.connect(address, max_size=MAX_MESSAGE_BYTES) as socket, _page(socket) as page:
                yield page
        finally:
            process.terminate()
            await process.wait()


async def _address(profile: Path) -> str:
    """The address at which the browser listens, which it writes into its profile."""
    port_file = profile / "DevToolsActivePort"
    for _ in range(TIMEOUT_S * POLLS_PER_S):
        if port_file.exists() and len(lines := port_file.read_text().splitlines()) == 2:
            port, path = lines
            return f"ws://127.0.0.1:{port}{path}"
        await asyncio.sleep(1 / POLLS_PER_S)
    raise TimeoutError("Chromium did not start to listen")


@asynccontextmanager
async def _page(socket: websockets.ClientConnection) -> AsyncIterator[Page]:
    """Opens a page and enables its events; the first two commands go to the browser, the others to the page."""
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
    async with asyncio.timeout(TIMEOUT_S):
        while (message := json.loads(await socket.recv())).get("id") != number:
            pass
    return message["result"]
