"""A browser that tests drive: Chromium's own protocol, over its pipe."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

BROWSER = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


class Page:
    """A page of the browser."""

    def __init__(self, reader, writer):
        self._reader, self._writer, self._number, self._session = reader, writer, 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, **parameters):
        """A method of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        data = b""
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser is gone"
            data += byte
        return json.loads(data)

    def evaluate(self, code):
        """The value of an expression in the page, a promise's when it is kept."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, code, seconds=60):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(code):
            assert time.monotonic() < end, code
            time.sleep(0.05)

    def choose_file(self, selector, path):
        """Put a file into an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path):
        """Write a PNG of all of it."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder):
    """A browser with a profile of its own: a page of it."""
    to_browser, writer = os.pipe()
    reader, from_browser = os.pipe()
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command.append(f"--user-data-dir={folder}")

    def place_pipes():
        # Where the protocol has them. Out of the way first: either may be 3 or 4 already.
        given, taken = os.dup2(to_browser, 30), os.dup2(from_browser, 31)
        os.dup2(given, 3)
        os.dup2(taken, 4)

    process = subprocess.Popen(
        command, pass_fds=(3, 4), preexec_fn=place_pipes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        with os.fdopen(reader, "rb") as answers, os.fdopen(writer, "wb") as questions:
            yield Page(answers, questions)
    finally:
        process.kill()
        process.wait()
