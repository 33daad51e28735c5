"""A tiny model with a processor that serves in tests, and what it answers alone."""

import base64
import functools
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn
from PIL import Image
from tiny_models import byte_tokenizer, llava_config
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import reroute_fx
from reroute_fx import RoutingConfig, serving
from reroute_fx.loading.prompts import render_chat
from reroute_fx.runtime import SlotPool
from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.engine import Engine, Tier
from reroute_fx.serving.http_app import Service, make_app
from reroute_fx.serving.metrics import Metrics
from reroute_fx.serving.preparing import Preparer, start_worker

CAPACITY = 192
BOUNDS = Bounds(
    body_bytes=200_000,
    picture_bytes=60_000,
    pixels=10_000,
    pictures=2,
    prompt_characters=2000,
    answers=3,
    tokens=150,
)
PAGE = Path(serving.__file__).with_name("page.html")
ROUTINGS = {"128": RoutingConfig((1,), (0.5,)), "64": RoutingConfig((1,), (0.25,))}


@functools.cache
def processor():
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        byte_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@functools.cache
def unrouted_model():
    torch.manual_seed(0)
    tokenizer = processor().tokenizer
    config = llava_config(2, 0.5)
    config.image_token_id = config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    model = LlavaForConditionalGeneration(config).eval()
    specials = [tokenizer.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "<pad>", "<image>")]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, suppress_tokens=specials
    )
    return model


@functools.cache
def models():
    """A routed model for each tier; they share weights."""
    return {
        name: reroute_fx.compile(unrouted_model(), config=routing, backend="eager")
        for name, routing in ROUTINGS.items()
    }


def tiers(rows=3):
    return [Tier(name, model, SlotPool(model, rows, CAPACITY)) for name, model in models().items()]


def engine(bounds=None, rows=3):
    """Not started: tests step it."""
    return Engine(tiers(rows), processor().tokenizer, bounds or Bounds(), Metrics())


def preparer(bounds=None, fetches=False):
    """With a worker in a thread, which needs no interpreter of its own."""
    limits = bounds or Bounds()
    return Preparer(
        lambda: ThreadPoolExecutor(1, initializer=start_worker, initargs=(processor(), limits)),
        1,
        limits,
        fetches,
    )


def picture(seed, size=(20, 16)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def prompt(text, *pictures):
    """Inputs of a row."""
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    rendered = render_chat(processor(), [{"role": "user", "content": content}])
    images = {"images": list(pictures)} if pictures else {}
    return dict(processor()(text=[rendered], **images, return_tensors="pt"))


def alone(inputs, tier, tokens, seed=None, **options):
    """The new token ids that `generate` gives."""
    options = {"top_k": 0, **options}
    if seed is not None:
        torch.manual_seed(seed)
    ids = models()[tier].generate(**inputs, max_new_tokens=tokens, do_sample=seed is not None, **options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@contextmanager
def running(bounds=BOUNDS, api_key=None):
    """A server of the tiny model on a port of this machine: its service and its port."""
    service = Service("tiny", engine(bounds), preparer(bounds), processor().tokenizer, api_key)
    with running_service(service) as port:
        yield service, port


@contextmanager
def running_service(service):
    """A server on a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
    assert not service.engine.is_alive
