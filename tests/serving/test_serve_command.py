"""`reroute-fx serve`: what it refuses before anything is loaded, and the demo in a process of its own."""

import base64
import io
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from reroute_fx.command_line.main import app
from reroute_fx.errors import ConfigError
from reroute_fx.grounding.questions import questions
from reroute_fx.grounding.scenes import scene
from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.start import KEY_VARIABLE, is_artifact, read_key, read_routings


def refused(*arguments):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def test_other_machines_need_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        assert "there is no API key; expected one" in refused("demo", "--host", host)
    for host in ("127.0.0.1", "::1", "localhost"):
        assert read_key(None, host) is None
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert read_key(file, "0.0.0.0") == "secret"
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert read_key(None, "0.0.0.0") == "other"
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty; expected a key"):
        read_key(file, "127.0.0.1")
    assert "expected a file with the key" in refused("demo", "--api-key-file", tmp_path / "none")


def test_tiers():
    routings = read_routings("demo", None, "192,64", None, {})
    assert list(routings) == ["192", "64"]
    assert routings["64"].keep_ratios < routings["192"].keep_ratios
    assert list(read_routings("demo", None, None, None, {})) == ["128"]
    assert read_routings("demo", None, None, None, {"method": "none"})["none"].method == "none"
    assert "expected numbers with commas" in refused("demo", "--tier", "192;64")
    assert "expected each tier once" in refused("demo", "--tier", "64,64.0")
    assert "seconds is 0" in refused("demo", "--timeout", 0)
    with pytest.raises(ConfigError, match="queue is -1; expected a number above 0"):
        Bounds(queue=-1)


def test_an_artifact_has_its_own_tier(tmp_path):
    assert not is_artifact("demo")
    (tmp_path / "manifest.json").write_text("{}")
    assert is_artifact(str(tmp_path))
    assert "tier is 64, but" in refused(tmp_path, "--tier", "64")
    assert "ArtifactError" in refused(tmp_path)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'reroute-fx[serve]'" in refused("demo")


def start(*options):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "reroute_fx.command_line.main", "serve", "demo", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    end = time.monotonic() + 900
    while time.monotonic() < end:
        try:
            client.models.list()
            return process, client
        except openai.APIConnectionError:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.2)
    process.kill()
    raise AssertionError("the server did not start")


def ask(client, **options):
    here = scene("demo", 8)
    buffer = io.BytesIO()
    here.picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": questions(here, references=8, checks=0)[0][0].text},
    ]
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], temperature=0, **options
    )


def runs(pid):
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.full(
    "half a minute: two servers in interpreters of their own; the gate has one in its own process"
)
def test_the_demo_is_served_and_comes_back_after_it_was_killed():
    process, client = start("--backend", "eager", "--tier", "128,64", "--max-batch-size", "2")
    try:
        answer = ask(client).choices[0].message.content
        assert answer.startswith(" [0.")
        stream = ask(client, stream=True, n=2)
        next(iter(stream))
        process.send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    finally:
        process.kill()
        process.wait()
    process, client = start("--backend", "eager", "--max-batch-size", "2")
    try:
        assert ask(client).choices[0].message.content == answer
        children = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
        ).stdout.split()
        assert children
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
        end = time.monotonic() + 60
        while any(map(runs, children)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [pid for pid in children if runs(pid)]
        log = process.stdout.read()
        assert "Where is" not in log
        assert "data:image" not in log
    finally:
        process.kill()
        process.wait()
