"""Fixtures that several test files share."""

import pytest
from golden_models import Golden, load_golden

from reroute_fx._compat import settle_cpu_math


@pytest.fixture(scope="session", autouse=True)
def _exact_math() -> None:
    settle_cpu_math()


@pytest.fixture(scope="session")
def llava() -> Golden:
    return load_golden("llava")


@pytest.fixture(scope="session")
def qwen() -> Golden:
    return load_golden("qwen2_5_vl")
