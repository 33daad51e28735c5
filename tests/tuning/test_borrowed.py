"""What is borrowed from other papers for a measurement does what they say."""

import pytest
import torch
from borrowed import Blocks, ProxyLosses, SeedLosses
from plain_losses import PlainLosses

from reroute_fx import RoutingConfig
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.tuning.divergence import answer
from reroute_fx.tuning.read_prompts import demo_prompts, read_prompts

CONFIG = RoutingConfig((1, 4, 8), (0.3, 0.2, 0.25))
pytestmark = [pytest.mark.full("10 s; it is no product code"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def loaded():
    return load_model(DEMO, "cpu", "float32")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded.model


@pytest.fixture(scope="module")
def answered(loaded):
    (batch,) = read_prompts(loaded.model, demo_prompts(8), loaded.processor, rows=8)
    return answer(loaded.model, batch, 8)


def test_blocks_cover_the_picture():
    blocks = Blocks.cut(144, 3)
    assert blocks.of_token.sum(0).tolist() == [1.0] * 144
    assert blocks.of_token.sum(1).tolist() == [16.0] * 9
    assert blocks.of_token[torch.arange(9), blocks.middles].tolist() == [1.0] * 9
    assert blocks.middles.tolist() == [row * 12 + column for row in (2, 6, 10) for column in (2, 6, 10)]


def test_without_proxies_nothing_changes(model, answered):
    assert ProxyLosses(model, 0).losses(CONFIG, [answered]) == PlainLosses(model).losses(CONFIG, [answered])


def test_proxies_cost_what_they_replace_and_move_what_waits(model, answered, monkeypatch):
    """Where a layer adds the same to each token, tokens that wait move as those that run."""
    losses = ProxyLosses(model, 2)
    assert [kept.shape[1] for kept in losses.kept(CONFIG, answered).values()] == [
        count - 4 for count in CONFIG.keep_counts(144)
    ]
    rows, left = [], []

    def add(layer, stream, active, prompts):
        rows.append(active.shape[1])
        return stream + 0.5

    def stage(layers, stream, *given):
        before, after = ProxyLosses.stage(losses, layers, stream, *given)
        left.append((len(layers), before - stream, after - stream, given[-1].visual))
        return before, after

    monkeypatch.setattr(losses, "layer", add)
    monkeypatch.setattr(losses, "stage", stage)
    losses.kept(CONFIG, answered)
    text = rows[0] - CONFIG.keep_counts(144)[0]
    assert rows == [
        text + count
        for count, layers in zip(CONFIG.keep_counts(144), (3, 4, 8), strict=True)
        for _ in range(layers)
    ]
    for layers, before, after, visual in left:
        for row, places in enumerate(visual):
            for moved, steps in ((after, layers), (before, layers - 1)):
                assert (moved[row, places] - 0.5 * steps).abs().max() < 1e-4


def test_seeds_are_kept_for_their_position(model, answered):
    losses = SeedLosses(model, 6)
    prompts = losses._prompts(answered)
    positions = prompts.visual[0] - prompts.padding[0]
    frequencies = 10_000 ** (-torch.arange(16) / 16)
    cosines, sines = ((positions[:, None] * frequencies).double() for _ in range(2))
    cosines, sines = cosines.cos().sum(1), sines.sin().sum(1)
    first = set(cosines.topk(3).indices.tolist())
    sines[list(first)] = -torch.inf
    expected = first | set(sines.topk(3).indices.tolist())
    for kept in losses.kept(CONFIG, answered).values():
        assert expected <= set(kept[0].tolist())
    plain = PlainLosses(model).kept(CONFIG, answered).values()
    assert any(not expected <= set(kept[0].tolist()) for kept in plain)
