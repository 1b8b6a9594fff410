"""A headless Chromium that tests drive by its debugging protocol, and a server of the pages that it opens."""

import base64
import json
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--remote-allow-origins=*", "--remote-debugging-port=0",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}


def program() -> str | None:
    "Where Chromium or Chrome is, if it is installed."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(folder: Path):
    "The address at which the files of a folder are served."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Page:
    "One page of a browser. `errors`: what the pages complained of since they were opened."

    def __init__(self, address: str):
        import websocket

        self.socket, self.count, self.errors = websocket.create_connection(address, timeout=60), 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        "Send a command and wait for its answer."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (said := self._next()).get("id") != self.count:
            pass
        assert "error" not in said, (method, said["error"])
        return said["result"]

    def _next(self) -> dict:
        said = json.loads(self.socket.recv())
        match said.get("method"), said.get("params"):
            case "Runtime.exceptionThrown", p:
                self.errors.append(p["exceptionDetails"].get("exception", {}).get("description", p["exceptionDetails"]["text"]))  # fmt: skip
            case "Runtime.consoleAPICalled", {"type": "error", "args": args}:
                self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in args))
            case "Log.entryAdded", {"entry": {"level": "error", **entry}}:
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")
        return said

    def run(self, script: str):
        "What a script says; it may be a promise."
        said = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, script: str, seconds: float = 20):
        "What a script says as soon as that is neither false, 0 nor empty."
        end = time.monotonic() + seconds
        while not (said := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return said

    def open(self, address: str) -> None:
        "Open an address and wait until it is loaded."
        self("Page.navigate", url=address)
        self.until(f"document.readyState == 'complete' && location.href == {json.dumps(address)}")

    def size(self, width: int, height: int = 900) -> None:
        "Make the window so large, in pixels."
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        "Prefer light or dark colours."
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=name)])

    def press(self, key: str) -> None:
        "Press and release a key."
        code = KEYS[key]
        text = dict(text="\r") if key == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self) -> bytes:
        "What is seen, as a PNG."
        return base64.b64decode(self("Page.captureScreenshot")["data"])


@contextmanager
def browser(profile: Path):
    "A page of a browser with a profile of its own in this folder."
    done = subprocess.Popen([program(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        line = next(line for line in done.stderr if "listening on" in line)
        threading.Thread(target=lambda: list(done.stderr), daemon=True).start()
        port = line.split("127.0.0.1:")[1].split("/")[0]
        with urlopen(Request(f"http://127.0.0.1:{port}/json/new", method="PUT")) as answer:
            yield Page(json.load(answer)["webSocketDebuggerUrl"])
    finally:
        done.terminate()
        done.wait()
