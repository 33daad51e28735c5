"""Projections: the formula by hand, and the table of the documentation."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reroute_fx import ConfigError, RoutingConfig
from reroute_fx.analysis.roofline import GPUS, Gpu, project
from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.analysis.theory import LayerCost
from reroute_fx.command_line.main import app

ROOT = Path(__file__).parents[1]
LAYER = LayerCost.dense(64, 4, 2, 128)
LINEAR = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128


def report(layer=LAYER):
    config = RoutingConfig((1,), (0.5,))
    return RoutingReport(config, (), (layer, layer), 4, visual_tokens=20, text_tokens=10)


def flops(rows, batch):
    return batch * (2 * LINEAR * rows + 4 * 64 * rows * rows)


def moved(rows, batch):
    """Bytes of weights, keys and values."""
    return 2 * LINEAR + batch * 2 * 32 * rows * 2


def test_arithmetic_is_the_bound_of_a_fast_memory():
    found = project(report(), Gpu("", flops=1e6, bandwidth=1e30, memory=1e9), batch=3)
    scoring = 3 * 2 * (64 * 32 * 30 + 64 * 64 + 64 * 30)
    expected = [(flops(30, 3) * 2) / 0.6e6, (flops(30, 3) + flops(20, 3) + scoring) / 0.6e6]
    assert found.prefill == pytest.approx(expected)
    one = [3 * (2 * LINEAR + 4 * 64 * rows) for rows in (30, 20)]
    assert found.step == pytest.approx([2 * one[0] / 0.6e6, sum(one) / 0.6e6])


def test_bytes_are_the_bound_of_a_slow_memory():
    found = project(report(), Gpu("", flops=1e30, bandwidth=1e6, memory=1e9), batch=3)
    expected = [2 * moved(30, 3) / 0.8e6, (moved(30, 3) + moved(20, 3)) / 0.8e6]
    assert found.prefill == pytest.approx(expected)
    assert found.step == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "fits"), [(1.0, (False, False)), (1 / 0.9, (False, True)), (1.2, (True, True))]
)
def test_what_does_not_fit(share, fits):
    routed = moved(30, 3) + moved(20, 3)
    assert project(report(), Gpu("", 1.0, 1.0, memory=share * routed + 1e-3), batch=3).fits == fits


def test_layers_that_are_not_counted_are_refused():
    with pytest.raises(ConfigError, match="gpu is given, but the FLOPs leave out bmm"):
        project(report(LayerCost(1, 1, 1, 1, 1, ("bmm",))), GPUS["h100"], 1)


def test_inspect_prints_the_projection():
    done = CliRunner().invoke(app, ["inspect", "demo", "--gpu", "h100", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["projection"]
    assert found["gpu"]["name"] == GPUS["h100"].name
    assert [each["batch"] for each in found["batches"]] == [1, 8, 32]
    wrong = CliRunner().invoke(app, ["inspect", "demo", "--gpu", "h1000"])
    assert wrong.exit_code == 1
    assert "gpu is 'h1000'; expected one of a100, h100, h200, b200, l4" in " ".join(wrong.output.split())


def test_the_table_of_the_documentation_is_current(benchmark_module):
    table = benchmark_module("projections").markdown_table()
    assert table in (ROOT / "docs" / "performance.md").read_text()
