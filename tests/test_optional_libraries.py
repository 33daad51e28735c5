"""A library of an extra that is missing is named, with the extra that brings it."""

import json
import sys

import pytest

from reroute_fx import BackendUnavailableError
from reroute_fx.common.optional_libraries import optional_library


def test_what_is_installed_is_imported():
    assert optional_library("json", "bench", "for JSON") is json
    assert optional_library("json.decoder", "bench", "for JSON") is json.decoder


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError) as caught:
        optional_library("matplotlib", "bench", "for plots")
    assert str(caught.value) == (
        "matplotlib is not installed; expected it for plots. Run pip install 'reroute-fx[bench]'."
    )
    assert isinstance(caught.value.__cause__, ImportError)
