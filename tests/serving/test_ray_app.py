"""Ray Serve: the application behind Ray's proxy, with two replicas that are killed and replaced under load."""

import base64
import io
import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import yaml
from pydantic import ValidationError

from reroute_fx.errors import BackendUnavailableError
from reroute_fx.loading.sample_picture import picture
from reroute_fx.serving.ray_app import NAME, app
from reroute_fx.serving.start import Settings

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
SECONDS = 600
"""Until replicas run, with interpreters of their own that import torch."""

VARIABLES = {
    # Otherwise Ray writes one into the home folder.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Otherwise replicas yield to everything else, for minutes while other tests run.
    "RAY_worker_niceness": "0",
    # On a busy machine a proxy takes longer to start than the 5 seconds that it has.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'reroute-fx\[ray\]'"):
        app(Settings(model="demo"))


def test_settings_are_those_of_the_command():
    assert Settings(model="demo", tier=128).tier == "128"
    with pytest.raises(ValidationError, match="teir"):
        Settings(model="demo", teir=128)


def documented_config(**changed):
    """The config in docs/serving.md, for the demo in eager mode."""
    (block,) = re.findall(r"```yaml\n(applications:.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    config = yaml.safe_load(block)
    (application,) = config["applications"]
    application["args"] |= {"model": "demo", "backend": "eager", "max_batch_size": 2, **changed}
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"name": NAME, "num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
    return config


class Cluster:
    """Ray on this machine, with the application at a port."""

    def __init__(self, ray, port):
        self.ray, self.port = ray, port

    def deploy(self, **changed):
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(documented_config(**changed)))

    def wait_for(self, before=()):
        """Until two replicas run, none of them of those before; their processes."""
        end = time.monotonic() + SECONDS
        while True:
            application = self.ray.serve.status().applications.get("default")
            running = application is not None and application.status == "RUNNING"
            if running and len(pids := self.replicas()) == 2 and not pids & set(before):
                return pids
            assert time.monotonic() < end, application
            time.sleep(0.5)

    def replicas(self):
        """Processes of replicas of this cluster, whose raylet is a child of this process."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
        parents = {int(pid): int(parent) for pid, parent, _ in rows}
        return {
            int(pid)
            for pid, parent, command in rows
            if command.startswith("ray::ServeReplica") and parents.get(int(parent)) == os.getpid()
        }

    def client(self):
        address = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def cluster():
    # Both tiers know where Ray is: the gate has no test that needs it, and `make full` installs it.
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        found = Cluster(ray, port)
        found.deploy()
        found.wait_for()
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


def picture_url():
    buffer = io.BytesIO()
    picture(0, (168, 168)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(client, **options):
    content = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": "Where is the small red circle?"},
    ]
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=16,
        extra_body={"ignore_eos": True},
        **options,
    )


class Load:
    """Four clients that ask again and again, and what became of each request."""

    def __init__(self, cluster, answer):
        self.cluster, self.answer = cluster, answer
        self.outcomes, self._stop = [], threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(4)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self.threads:
            thread.join(180)
        assert not any(thread.is_alive() for thread in self.threads), "a request is unanswered"

    def _run(self, first):
        client = self.cluster.client()
        for number in itertools.count(first):
            if self._stop.is_set():
                return
            self.outcomes.append(self._ask(client, streams=number % 2 == 0))

    def _ask(self, client, streams):
        try:
            if not streams:
                choice = ask(client).choices[0]
                return "answered" if choice.message.content == self.answer else "wrong"
            chunks = [chunk.choices[0] for chunk in ask(client, stream=True) if chunk.choices]
        except openai.APIError as error:
            return f"error: {type(error).__name__}"
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        ended = bool(chunks) and chunks[-1].finish_reason is not None
        return "cut" if not ended else "answered" if text == self.answer else "wrong"

    def wait_for(self, more):
        """Until as many requests more have an outcome."""
        end, wanted = time.monotonic() + SECONDS, len(self.outcomes) + more
        while len(self.outcomes) < wanted:
            assert time.monotonic() < end, self.outcomes
            time.sleep(0.1)


_REASON = "minutes: a Ray cluster of four interpreters; `make full` installs the extra [ray]"


@pytest.mark.full(_REASON)
def test_rays_proxy_streams_an_answer_as_it_grows(cluster):
    client = cluster.client()
    whole = ask(client)
    times, text = [], ""
    for chunk in ask(client, stream=True):
        times.append(time.monotonic())
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 16
    # Tokens that are made faster than the proxy reads come together.
    assert len(set(times)) >= 4
    assert times[-1] - times[1] > times[1] - times[0] > 0
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=10**6
        )


@pytest.mark.full(_REASON)
def test_a_replica_that_is_killed_is_replaced_and_no_request_is_lost(cluster):
    answer = ask(cluster.client()).choices[0].message.content
    with Load(cluster, answer) as load:
        load.wait_for(8)
        before = cluster.wait_for()
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        load.wait_for(8)
        assert killed not in cluster.wait_for(before=[killed])
        load.wait_for(8)
    assert load.outcomes.count("answered") > len(load.outcomes) / 2
    # Who reads a stream sees that it was cut: its last chunk has no finish_reason.
    assert "wrong" not in load.outcomes


@pytest.mark.full(_REASON)
def test_an_update_drops_no_request(cluster):
    answer = ask(cluster.client()).choices[0].message.content
    with Load(cluster, answer) as load:
        load.wait_for(4)
        before = cluster.wait_for()
        cluster.deploy(max_tokens=64)
        cluster.wait_for(before=before)
        load.wait_for(8)
    assert set(load.outcomes) == {"answered"}
