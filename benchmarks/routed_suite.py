"""A pytest plugin that lets tests of a model class run on routed models, and keeps how each test ended.

A model in eval mode is compiled with ratio 1.0 at its first forward or generation; `eval()` in a test returns the
routed model itself, so that what the test does with it later is done to the routed one. Models in training mode and
decoders without a vision-language model around them are left alone.

Environment: ``ROUTED_SUITE_OUT``, the JSON to write; ``ROUTED_SUITE_ROUTE=1`` to route.
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

import reroute_fx
from reroute_fx.errors import RerouteError, first_line
from reroute_fx.runtime import RoutedModel

MODEL_CLASSES = (LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)
EVERYTHING = reroute_fx.RoutingConfig((1,), (1.0,))
"""Of a decoder with two layers: the second one runs on all tokens, by way of a selection."""

LONGEST_SECONDS = 240
_records: dict[str, dict[str, Any]] = {}
_routed_calls = 0
_twins: "WeakKeyDictionary[torch.nn.Module, tuple[Any, Any]]" = WeakKeyDictionary()


def route_models() -> None:
    for model_class in MODEL_CLASSES:
        _replace(model_class, "eval", _eval)
        _replace(model_class, "__call__", functools.partial(_delegate, "__call__"))
        _replace(model_class, "generate", functools.partial(_delegate, "generate"))


def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, replaced)


def _eval(original: Callable[..., Any], model: Any) -> Any:
    original()
    caller = sys._getframe(2).f_globals["__name__"]
    is_own_call = caller.split(".")[0] in ("transformers", "torch", "reroute_fx", "accelerate", "peft")
    return model if is_own_call or isinstance(model, RoutedModel) else _twin(model)


def _delegate(name: str, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    global _routed_calls
    if isinstance(model, RoutedModel):
        _routed_calls += 1
        return original(*args, **kwargs)
    if model.training:
        return original(*args, **kwargs)
    twin = _twin(model)
    if model.can_generate():
        twin.generation_config = model.generation_config
    return getattr(twin, name)(*args, **kwargs)


def _twin(model: Any) -> Any:
    """The routed model of `model`, compiled anew when its tensors or its config are others."""
    made_of = tuple(map(id, model.parameters())), model.config.to_json_string(use_diff=False)
    if model not in _twins or _twins[model][0] != made_of:
        _twins[model] = made_of, reroute_fx.compile(model, config=_config(model), backend="eager")
    return _twins[model][1]


def _config(model: Any) -> Any:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return EVERYTHING if layers > 1 else reroute_fx.RoutingConfig((), (), method="none")


def _out() -> Path:
    return Path(os.environ["ROUTED_SUITE_OUT"])


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("ROUTED_SUITE_ROUTE") == "1":
        route_models()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a test that takes too long."""
    global _routed_calls
    _routed_calls = 0
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"the test takes more than {LONGEST_SECONDS} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    kept = _records.setdefault(item.nodeid, {})
    # A subtest that failed is followed by a report on the whole test.
    if kept.get("outcome") != "failed" and (call.when == "call" or outcome != "passed"):
        kept |= {"outcome": outcome, "routed_calls": _routed_calls}
        if call.excinfo is not None and outcome == "failed":
            kept |= _why(call.excinfo.value)
        _out().write_text(json.dumps(_records, indent=1))
    return report


def _why(error: BaseException) -> dict[str, str]:
    refusal = next((e for e in _causes(error) if isinstance(e, RerouteError)), None)
    said = refusal or error
    return {
        "error": type(said).__name__,
        "message": first_line(said)[:400],  # type: ignore[arg-type]
        "kind": "refusal" if refusal else "failure",
    }


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
