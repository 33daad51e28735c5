"""A server from the name of a model or artifact to its last request."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..api import compile
from ..artifact import load
from ..artifact.manifest import NAME as MANIFEST
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError
from ..loading.models_by_name import DEMO, choose_device, load_model, name_of, read_routing
from ..loading.prompts import encode
from ..loading.sample_picture import picture
from ..runtime import RoutedModel, SlotPool
from .bounds import Bounds
from .engine import Engine, Tier
from .http_app import Service, make_app
from .metrics import Metrics
from .preparing import Preparer, process_worker

KEY_VARIABLE = "REROUTE_FX_API_KEY"


class Settings(BaseModel):
    """What is served and how, as `reroute-fx serve` takes it; see there."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    model: str
    tier: str | None = None
    method: str | None = None
    action: str | None = None
    schedule: str | None = None
    pool: str | None = None
    config: Path | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "inductor"
    allow_picture_urls: bool = False
    max_batch_size: int = 8
    max_length: int = 1024
    max_tokens: int = 512
    max_queue: int = 64
    max_pixels: int = 2**24
    timeout: float = 300.0
    workers: int = Field(1, ge=1)

    @property
    def bounds(self) -> Bounds:
        """Of its requests."""
        return Bounds(
            pixels=self.max_pixels, tokens=self.max_tokens, queue=self.max_queue, seconds=self.timeout
        )

    def load(self) -> "Named":
        """The models of its tiers.

        Raises:
            ConfigError: a routing is given of an artifact, which has its own.
        """
        chosen = {name: getattr(self, name) for name in ("method", "action", "schedule", "pool")}
        if not is_artifact(self.model):
            routings = read_routings(self.model, self.revision, self.tier, self.config, chosen)
            how = {name: getattr(self, name) for name in ("backend", "device", "dtype", "revision")}
            return compile_tiers(self.model, routings, **how)
        for name, value in {
            "tier": self.tier,
            "config": self.config,
            "revision": self.revision,
            **chosen,
        }.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is {value}, but {self.model} is an artifact, which has its own. Leave it out."
                )
        return load_artifact(self.model, self.device)


def start_service(settings: Settings, api_key: str | None = None) -> Service:
    """Load, compile and warm up what `make_app` takes."""
    bounds = settings.bounds
    named = settings.load()
    service = make_service(
        named,
        bounds,
        rows=settings.max_batch_size,
        capacity=settings.max_length,
        workers=settings.workers,
        fetches=settings.allow_picture_urls,
        api_key=api_key,
    )
    warm_up(service, named.processor)
    return service


@dataclass(frozen=True)
class Named:
    """Models of one set of weights, by the names of their tiers, and their processor."""

    name: str
    models: dict[str, RoutedModel]
    processor: Any


def is_artifact(name: str) -> bool:
    """Whether a name is that of a folder with an artifact."""
    return (Path(name) / MANIFEST).is_file()


def load_artifact(name: str, device: str) -> Named:
    """The one tier of an artifact, which is called after what was exported.

    Raises:
        ArtifactError: it can't be loaded.
        ConfigError: it has no processor.
    """
    model = load(name, device=None if device == "auto" else device)
    if model.processor is None:
        raise ConfigError(f"{name} has no processor; expected one. Export it with processor=...")
    return Named(Path(name).resolve().name, {"artifact": model}, model.processor)


def read_routings(
    model: str,
    revision: str | None,
    tiers: str | None,
    config: Path | None,
    choices: Mapping[str, str | None],
) -> dict[str, RoutingConfig]:
    """The configuration of each tier of ``"192,128,64"``, by its name; of the default one for None.

    Args:
        model: see `load_model`.
        revision: see `load_model`.
        tiers: numbers with commas between.
        config: JSON file with a `RoutingConfig`, instead of tiers and choices.
        choices: method, action, schedule and pool, None for a default.

    Raises:
        ConfigError: `tiers` is no list of numbers, or one stands twice, or a routing that the model can't have.
    """

    def routing(tier: float | None) -> RoutingConfig:
        named = {name: choices.get(name) for name in ("method", "action", "schedule", "pool")}
        return read_routing(model, revision, tier=tier, config=config, **named)  # type: ignore[arg-type]

    if tiers is None:
        return {"config" if config else choices.get("method") or "128": routing(None)}
    try:
        numbers = [float(part) for part in tiers.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"tier is {tiers!r}; expected numbers with commas between, as 192,128,64."
        ) from error
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"tier is {tiers!r}; expected each tier once.")
    return {f"{number:g}": routing(number) for number in numbers}


def compile_tiers(
    name: str,
    routings: dict[str, RoutingConfig],
    *,
    backend: str,
    device: str,
    dtype: str,
    revision: str | None = None,
) -> Named:
    """A routed model for each tier; they share weights and compiled regions.

    Args:
        name: model id, folder or ``"demo"``.
        routings: by the names of tiers.
        backend: see `reroute_fx.compile`.
        device: see `choose_device`.
        dtype: see `choose_device`.
        revision: see `load_model`.
    """
    loaded = load_model(name, choose_device(device, dtype), dtype, revision)
    models = {
        tier: compile(loaded.model, config=config, backend=backend) for tier, config in routings.items()
    }
    return Named(DEMO if name == DEMO else name_of(loaded.model.config) or name, models, loaded.processor)


def make_service(
    named: Named,
    bounds: Bounds,
    *,
    rows: int,
    capacity: int,
    workers: int,
    fetches: bool = False,
    api_key: str | None = None,
) -> Service:
    """What `make_app` takes.

    Args:
        named: what is served.
        bounds: of requests.
        rows: of each tier.
        capacity: tokens of a row, prompt and answer.
        workers: processes that prepare requests.
        fetches: whether pictures may come from http(s) URLs.
        api_key: that requests have to bring.

    Raises:
        ConfigError: `capacity` is more than the model has positions for, or than an artifact takes.
    """
    tokenizer = named.processor.tokenizer
    text = next(iter(named.models.values())).config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and capacity > positions:
        raise ConfigError(
            f"max_length is {capacity}; expected at most {positions}, the positions of the model."
        )
    tiers = [Tier(name, model, SlotPool(model, rows, capacity)) for name, model in named.models.items()]
    engine = Engine(tiers, tokenizer, bounds, Metrics())
    preparer = Preparer(partial(process_worker, named.processor, bounds), workers, bounds, fetches)
    return Service(named.name, engine, preparer, tokenizer, api_key)


@torch.no_grad()
def warm_up(service: Service, processor: Any) -> None:
    """Run a prompt with a picture and a step in each tier, so that what compiles does so before the first request.

    Waits for the workers, too.
    """
    for tier in service.engine.tiers.values():
        inputs = encode(processor, tier.model, [picture()], ["What is that?"])
        slot = tier.pool.claim()
        try:
            tier.pool.write(slot, tier.model(**inputs, logits_to_keep=1))
            tokens = torch.zeros(tier.pool.rows, dtype=torch.int64, device=tier.model.device)
            tier.pool.step(tokens, [row in slot.rows for row in range(tier.pool.rows)])
        finally:
            tier.pool.release(slot)
    service.preparer.wait()


def read_key(path: Path | None, host: str) -> str | None:
    """The API key of a file or of the environment.

    Raises:
        ConfigError: it is empty, can't be read, or is missing where others than this machine can come.
    """
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api-key-file is {str(path)!r}; expected a file with the key.") from error
        if not key:
            raise ConfigError(f"api-key-file is {str(path)!r}, which is empty; expected a key in it.")
        return key
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not _is_loopback(host):
        raise ConfigError(
            f"host is {host!r}, where other machines can come, and there is no API key; expected one. Give "
            f"--api-key-file, or set {KEY_VARIABLE}."
        )
    return key or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; answers that grow are finished first."""
    import uvicorn

    uvicorn.run(
        make_app(service),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=int(service.bounds.seconds) + 1,
        server_header=False,
    )
