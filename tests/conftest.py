"""Fixtures that several test files share."""

import gc
import importlib
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

# There is no GPU to run Triton's kernels on: they are interpreted, which Triton settles as it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Every core has a test to run: no pools of compilers, and none that optimises what calls the kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")
# Which vector instructions there are the system says: no programs are compiled to try them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# What was compiled once is found again, by the other workers too, and nothing of another checkout is.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build/cache/inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build/cache/triton"))

import processor_seconds
import pytest
import tier_plugin
import torch
from golden_models import Golden, load_golden

from reroute_fx._compat import settle_cpu_math
from reroute_fx.capture import captured_decoder
from reroute_fx.lowering.inductor import compiled_regions

rounds = tier_plugin.rounds

# Pytest listens to all loggers that don't propagate. Then torch writes down every graph that it traces or compiles,
# which takes a fifth of the time.
logging.getLogger("torch.__trace").propagate = True

# The suite has more kinds of tiny decoders than a program that serves models.
captured_decoder._KINDS = 64

# Graphs are many small objects that live long: looking through them again and again takes a tenth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    tier_plugin.add_options(parser)
    processor_seconds.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    tier_plugin.configure(config)
    processor_seconds.configure(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> tier_plugin.Scheduling:
    return tier_plugin.Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier_plugin.modify_items(config, items)


@pytest.fixture(scope="session", autouse=True)
def _exact_math() -> None:
    settle_cpu_math()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Every core has a worker already.
        torch.set_num_threads(1)


@pytest.fixture
def benchmark_module(monkeypatch):
    """A function that imports a script of `benchmarks/` by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def tiny(benchmark_module):
    """Tiny models of many families."""
    return benchmark_module("tiny_families")


@pytest.fixture
def no_traces(monkeypatch):
    """As in a process of its own, no decoder is traced yet."""
    monkeypatch.setattr(captured_decoder, "_alike", OrderedDict())


@pytest.fixture
def fresh_regions(monkeypatch):
    """As in a process of its own, no region is compiled yet."""
    monkeypatch.setattr(compiled_regions, "_regions", {})


@pytest.fixture(scope="session")
def llava() -> Golden:
    return load_golden("llava")


@pytest.fixture(scope="session")
def qwen() -> Golden:
    return load_golden("qwen2_5_vl")


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["llava", "qwen"])
def family(request):
    return request.param
