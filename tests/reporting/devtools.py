"""A page in headless Chromium that tests ask and click, through the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

SECONDS = 60.0
"""Longest wait for anything; a page that works needs a few."""
ALL_ELEMENTS = """
const inside = (root) => [...(root?.querySelectorAll("*") ?? [])].flatMap((one) => [one, ...(one.shadowRoot ? inside(one.shadowRoot) : [])]);
"""  # noqa: E501 - one expression
"""JavaScript: every element of a node, those in shadow roots too."""


class Page:
    """An open page."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: WebSocketClientConnection) -> None:
        self._loop, self._socket, self._sent = loop, socket, 0
        self.events: list[dict[str, Any]] = []
        """What the browser reported: console messages, exceptions, requests."""

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Result of a command."""
        return self._loop.run_until_complete(asyncio.wait_for(self._answer(method, params), SECONDS))

    async def _answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.write_message(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(await self._socket.read_message() or "{}")
            if message.get("id") == self._sent:
                return dict(message.get("result", message))
            self.events.append(message)

    def ask(self, expression: str) -> Any:
        """Value of a JavaScript expression, or of the promise that it is."""
        code = f"{ALL_ELEMENTS} ({expression})"
        told = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, replMode=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Value of an expression as soon as it is true."""
        began = time.monotonic()
        while not (value := self.ask(expression)):
            assert time.monotonic() - began < SECONDS, f"never true: {expression}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """All text that is drawn, of shadow roots too."""
        return str(
            self.ask(
                "inside(document.body).filter((one) => !['SCRIPT', 'STYLE'].includes(one.tagName))"
                ".flatMap((one) => [...one.childNodes]).filter((one) => one.nodeType === 3)"
                ".map((one) => one.data).join('\\n')"
            )
        )

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_in_chromium(chromium: str, url: str, profile: Path, *flags: str) -> Iterator[Page]:
    """A page, until the block ends."""
    arguments = [*flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen([chromium, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    try:
        socket = loop.run_until_complete(_connected(_address(profile / "DevToolsActivePort")))
        page = Page(loop, socket)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.send("Page.navigate", url=url)
        yield page
        socket.close()
    finally:
        browser.terminate()
        browser.wait(SECONDS)
        loop.close()


async def _connected(address: str) -> WebSocketClientConnection:
    return await websocket_connect(address, max_message_size=1 << 28)


def _address(file: Path) -> str:
    """Address of the one page, once the browser has said its port."""
    began = time.monotonic()
    while not (file.exists() and file.read_text().count("\n")):
        assert time.monotonic() - began < SECONDS, "the browser did not start"
        time.sleep(0.05)
    port = file.read_text().split("\n")[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as answer:
        targets = json.load(answer)
    return str(next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page"))
