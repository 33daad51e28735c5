"""Compiled programs behind the server, from request to answer: in process, and from an artifact."""

import threading

import openai
import pytest
import serving_models as served
import torch
from artifacts import TIERS, artifact, processor
from conversations import unrouted_model

from reroute_fx.loading.prompts import encode
from reroute_fx.serving.start import Settings, start_service

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 12
BOUNDS = {"max_batch_size": 3, "max_length": 96, "max_tokens": 32}
QUESTIONS = ("w9 w11", "w20 w21 w22 w23", "w5")
SAMPLINGS = ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 3})


def settings(kind, tmp_path_factory):
    if kind == "artifact":
        return Settings(model=str(artifact(tmp_path_factory, "llava")), **BOUNDS)
    folder = tmp_path_factory.mktemp("model")
    unrouted_model("llava").save_pretrained(folder)
    processor().save_pretrained(folder)
    return Settings(model=str(folder), tier=str(TIERS[0]), backend=kind, **BOUNDS)


def ask(service, port, number, sampling, stream):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    url = served.data_url(served.encoded(served.picture(number)))
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTIONS[number]},
    ]
    answer = client.chat.completions.create(
        model=service.name,
        messages=[{"role": "user", "content": content}],
        max_tokens=LENGTH,
        stream=stream,
        **sampling,
    )
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


def alone(model, number, sampling):
    inputs = encode(processor(), model, [served.picture(number)], [QUESTIONS[number]])
    torch.manual_seed(sampling.get("seed", 0))
    drawn = {name: value for name, value in sampling.items() if name in ("temperature", "top_p") and value}
    ids = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=bool(drawn), top_k=0, **drawn)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor().tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.full(
    "a minute each: programs are compiled, and a worker starts; test_server.py has them in eager mode"
)
@pytest.mark.parametrize("kind", ["artifact", "inductor"])
def test_answers_of_a_server_are_those_of_its_programs_alone(tmp_path_factory, kind):
    service = start_service(settings(kind, tmp_path_factory))
    (tier,) = service.engine.tiers.values()
    asked = [(number, sampling) for number in range(len(QUESTIONS)) for sampling in SAMPLINGS]
    found = [None] * len(asked)

    def run(i, port):
        found[i] = ask(service, port, *asked[i], stream=i % 2 == 0)

    with served.running_service(service) as port:
        threads = [threading.Thread(target=run, args=(i, port)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [alone(tier.model, *each) for each in asked]
    assert len(set(found)) > 3
    assert tier.pool.free == tier.pool.rows
