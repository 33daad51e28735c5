"""`reroute-fx serve` in a process of its own, for scripts that measure it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 600, 60, 120


class ServedProcess:
    """A server of a model on a port of this machine, which is starting.

    Args:
        model: what `reroute-fx serve` takes.
        options: of the command.
        variables: of its environment, besides those of this process.
    """

    def __init__(self, model: str, *options: str, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        command = [sys.executable, "-m", "reroute_fx.command_line.main", "serve", model, *options]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, **variables},
        )

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.request("GET", "/health").close()
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.5)

    def stop(self) -> int:
        """Its exit status, when it has finished its answers."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def request(self, method: str, path: str, content: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        data = None if content is None else json.dumps(content)
        connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    @property
    def name(self) -> str:
        """Of the model, as requests give it."""
        return str(json.loads(self.request("GET", "/v1/models").read())["data"][0]["id"])

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.request("GET", "/metrics").read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"reroute_fx_{name}"))

    def memory(self) -> int:
        """Bytes that the server and its workers hold, without files that they map."""
        listed = subprocess.run(
            ["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True
        )
        pids = [self.process.pid, *map(int, listed.stdout.split())]
        return sum(map(_anonymous_bytes, pids))


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # `ps` lists itself, and has ended.
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
