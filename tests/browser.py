"""Chromium without a window, by its DevTools protocol."""

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from repvgg.web import app

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Have a folder on a web server; yields its address."""
    with app.server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


class Browser:
    """One page of it."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def do(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json(timeout=60)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    async def value(self, script: str) -> Any:
        found = await self.do("Runtime.evaluate", expression=f"JSON.stringify({script})", awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return json.loads(found["result"].get("value", "null"))

    async def until(self, state: Any, of: str = "document.body ? document.body.dataset.state ?? null : null") -> None:
        for _ in range(600):
            if await self.value(of) == state:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(await self.value("document.body.innerText"))

    async def drop(self, file: Path) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.do("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    async def choose(self, file: Path) -> None:
        """Give a file to the page's input for files."""
        root = (await self.do("DOM.getDocument"))["root"]["nodeId"]
        field = (await self.do("DOM.querySelector", nodeId=root, selector="input[type=file]"))["nodeId"]
        await self.do("DOM.setFileInputFiles", nodeId=field, files=[str(file)])


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Browser]:
    """Start a browser with an empty page. profile: a folder of its own."""
    import aiohttp

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command = [str(CHROMIUM), *flags, "--window-size=1100,1250", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            if (profile / "DevToolsActivePort").exists() and (profile / "DevToolsActivePort").read_text().strip():
                break
            await asyncio.sleep(0.1)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [target for target in await answer.json() if target["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Browser(socket)
    finally:
        process.terminate()
        process.wait()
