"""Good and bad requests for twenty minutes against a server of the model that ships: nothing is lost, nothing grows.

    python benchmarks/serving_soak.py [--seconds 1200] [--rate 1.5] [--output-json serving_soak.json]

Requests arrive at random, of all kinds in `KINDS`: whole and streamed answers, several answers to a prompt, clients
that leave, and what strangers send. Each kind has one outcome that is right: an answer is the one that its picture got
first, with the same seed, and a bad request is refused with 400 by the name of its field. After a tenth of the time,
the warm-up, anonymous memory of the server and its workers is read every two seconds: the median of the last quarter
over that of the first may be 1.02. At the end no row is in use, nothing waits, and every request has an outcome.
"""

import base64
import http.client
import io
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from record import RESULTS, OutputJson, save, summary
from rich.console import Console
from served_process import ANSWER_SECONDS, ServedProcess

from reroute_fx.loading.sample_picture import picture

TIERS, ROWS, CLIENTS, SIZES = "128,64", 4, 4, (168, 336, 672)
MOST_GROWTH = 1.02


def data_url(size: int, seed: int) -> str:
    buffer = io.BytesIO()
    picture(seed, (size, size)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


URLS = [data_url(size, seed) for seed, size in enumerate(SIZES)]


def body(url: str, text: str = "Where is the small red circle?", **options: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    chosen = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options}
    return {"model": "demo", "messages": [{"role": "user", "content": content}], **chosen}


BAD = {
    "an unknown field": ({"colour": "red"}, "colour"),
    "a placeholder": ({"text": "<image> and"}, "messages[0].content[1].text"),
    "too many tokens": ({"max_tokens": 100_000}, "max_tokens"),
    "another tier": ({"reroute": {"tier": 7}}, "reroute.tier"),
    "no base64": ({"url": "data:image/png;base64,#"}, "messages[0].content[0].image_url.url"),
    "a truncated picture": ({"url": URLS[0][:-4000]}, "messages[0].content[0].image_url.url"),
    "a file": ({"url": "file:///etc/passwd"}, "messages[0].content[0].image_url.url"),
}
KINDS = {"whole": 5, "stream": 5, "several": 2, "left": 2, "bad": 4}
"""How often each comes."""


class Client:
    """Sends requests of all kinds and says what became of them."""

    def __init__(self, server: ServedProcess, seed: int, answers: dict[Any, str]) -> None:
        self.server, self.random, self.answers = server, random.Random(seed), answers

    def send(self) -> tuple[str, str]:
        """Kind and outcome of a request; the right one is ``"ok"``."""
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        run: Callable[[], str] = getattr(self, f"_{kind}")
        try:
            return kind, run()
        except TimeoutError:
            return kind, "unanswered"
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            return kind, f"{type(error).__name__}: {error}"

    def _asked(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        which, tier = self.random.randrange(len(URLS)), self.random.choice([128, 64])
        return (which, tier), body(URLS[which], reroute={"tier": tier}, **options)

    def _post(self, content: Any) -> http.client.HTTPResponse:
        return self.server.request("POST", "/v1/chat/completions", content)

    def _compare(self, key: Any, text: str) -> str:
        return "ok" if self.answers.setdefault(key, text) == text else f"another answer: {text!r}"

    def _whole(self) -> str:
        key, content = self._asked()
        with self._post(content) as response:
            found = json.loads(response.read())
        (choice,) = found["choices"]
        return self._compare(key, choice["message"]["content"])

    def _stream(self) -> str:
        key, content = self._asked(stream=True)
        with self._post(content) as response:
            events = response.read().decode().strip().split("\n\n")
        if events[-1] != "data: [DONE]":
            return f"cut: {events[-1]}"
        parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
        return self._compare(key, "".join(part["delta"].get("content", "") for part in parts))

    def _several(self) -> str:
        key, content = self._asked(n=2, temperature=1, seed=self.random.randrange(3))
        with self._post(content) as response:
            found = json.loads(response.read())
        texts = [choice["message"]["content"] for choice in found["choices"]]
        return self._compare((*key, content["seed"]), json.dumps(texts))

    def _left(self) -> str:
        _, content = self._asked(stream=True, max_tokens=200)
        with self._post(content) as response:
            return "ok" if response.read(100) else "nothing came"

    def _bad(self) -> str:
        name = self.random.choice(list(BAD))
        changed, field = BAD[name]
        with self._post(body(**{"url": URLS[0], **changed})) as response:
            told = json.loads(response.read())["error"]
        right = response.status == 400 and told["param"] == field
        return "ok" if right else f"{name}: {response.status} {told}"


class Soak:
    """Clients against a server for a time."""

    def __init__(self, server: ServedProcess, seconds: float, rate: float) -> None:
        self.server, self.seconds, self.rate = server, seconds, rate
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.latencies: list[float] = []
        self.memory: list[tuple[float, int]] = []
        self.answers: dict[Any, str] = {}
        self.start = time.monotonic()

    def run(self) -> None:
        threads = [threading.Thread(target=self._clients, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while (passed := time.monotonic() - self.start) < self.seconds:
            self.memory.append((passed, self.server.memory()))
            time.sleep(2)
        for thread in threads:
            thread.join()

    def _clients(self, number: int) -> None:
        client = Client(self.server, number, self.answers)
        while True:
            time.sleep(client.random.expovariate(self.rate / CLIENTS))
            before = time.monotonic()
            if before - self.start > self.seconds:
                return
            self.outcomes[client.send()] += 1
            self.latencies.append(time.monotonic() - before)

    def left(self) -> dict[str, float]:
        """What the server holds when all have gone."""
        end, names = time.monotonic() + ANSWER_SECONDS, ("rows_in_use", "requests_waiting")
        while True:
            held = {name: self.server.metric(name) for name in names}
            if not any(held.values()) or time.monotonic() > end:
                return held
            time.sleep(0.5)

    @property
    def growth(self) -> float:
        """Median memory of the last quarter over that of the first, after the warm-up."""
        settled = [held for passed, held in self.memory if passed > self.seconds / 10]
        quarter = max(1, len(settled) // 4)
        return float(np.median(settled[-quarter:]) / np.median(settled[:quarter]))


def main(
    seconds: Annotated[float, typer.Option(help="for which requests are sent")] = 1200,
    rate: Annotated[float, typer.Option(help="requests a second, on average at most")] = 1.5,
    output_json: OutputJson = RESULTS / "serving_soak.json",
) -> None:
    """Soak, and write what was found; the exit status is 1 if something was lost or grew."""
    # In bfloat16 a row rounds otherwise beside others.
    options = ["--tier", TIERS, "--max-batch-size", str(ROWS), "--dtype", "float32"]
    server = ServedProcess("demo", *options)
    try:
        server.wait()
        soak = Soak(server, seconds, rate)
        soak.run()
        left = soak.left()
        counted = server.metric("requests_answered_total")
    finally:
        stopped = server.stop()
    wrong = {f"{kind}: {outcome}": n for (kind, outcome), n in soak.outcomes.items() if outcome != "ok"}
    good = sum(n for (kind, _), n in soak.outcomes.items() if kind != "bad")
    passed = (
        not wrong
        and counted == good
        and not any(left.values())
        and soak.growth <= MOST_GROWTH
        and stopped in (0, -signal.SIGTERM)
    )
    record = {
        "setting": {"seconds": seconds, "rate": rate, "tiers": TIERS, "rows": ROWS, "clients": CLIENTS},
        "passed": passed,
        "requests": {kind: n for (kind, outcome), n in sorted(soak.outcomes.items()) if outcome == "ok"},
        "wrong": wrong,
        "left": left,
        "prompts_that_ended": counted,
        "latency": summary(soak.latencies),
        "memory_growth": soak.growth,
        "memory": [[round(passed, 1), held] for passed, held in soak.memory],
    }
    path = save(output_json, record)
    about = {name: value for name, value in record.items() if name != "memory"}
    Console(width=120).print(about)
    Console(width=120).print(f"written to {path}")
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
