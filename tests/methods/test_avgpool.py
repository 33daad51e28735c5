"""Average pooling: the reduction alone, and in a model that decides nothing behind it."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conversations import SINGLE, batch, new_tokens, unrouted_model

import reroute_fx
from reroute_fx import InputError, RoutingConfig, UnsupportedModelError
from reroute_fx.methods.avgpool import reduce
from reroute_fx.passes import TowerStates


def pool(features, count):
    return reduce(TowerStates(features, None, features, 1.0, (), count))


@pytest.mark.parametrize("edge", [1, 2, 3, 4, 6, 8, 12, 24])
def test_squares_are_those_of_avg_pool2d(edge):
    features = torch.randn(2, 576, 5, dtype=torch.double)
    indices, pooled = pool(features, edge**2)
    picture = features.transpose(1, 2).unflatten(2, (24, 24))
    expected = F.avg_pool2d(picture, 24 // edge).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    size = 24 // edge
    middles = [
        [(row * size + size // 2) * 24 + column * size + size // 2]
        for row in range(edge)
        for column in range(edge)
    ]
    assert indices[0].tolist() == [place for (place,) in middles]


def cells(side, count):
    """Edges of each cell: top, bottom, left, right."""
    rows = round(math.sqrt(count))
    for row in range(rows):
        columns = (row + 1) * count // rows - row * count // rows
        for column in range(columns):
            down = Fraction(row * side, rows), Fraction((row + 1) * side, rows)
            yield *down, Fraction(column * side, columns), Fraction((column + 1) * side, columns)


@pytest.mark.parametrize(
    ("side", "counts"), [(4, range(1, 17)), (7, range(1, 50)), (24, (64, 128, 192, 575))]
)
def test_a_feature_is_the_mean_over_the_area_of_its_cell(side, counts):
    features = torch.randn(1, side * side, 1, dtype=torch.double)
    for count in counts:
        indices, pooled = pool(features, count)
        assert indices.shape == (1, count)
        for place, mean, (top, bottom, left, right) in zip(
            indices[0].tolist(), pooled[0, :, 0].tolist(), cells(side, count), strict=True
        ):
            assert place == (top + bottom) // 2 * side + (left + right) // 2
            total = sum(
                float((min(bottom, y + 1) - max(top, y)) * (min(right, x + 1) - max(left, x)))
                * float(features[0, y * side + x, 0])
                for y in range(math.floor(top), math.ceil(bottom))
                for x in range(math.floor(left), math.ceil(right))
            )
            assert mean == pytest.approx(total / float((bottom - top) * (right - left)), abs=1e-5)


@pytest.mark.parametrize("side", [4, 7, 12])
def test_middles_rise_for_any_number_of_cells(side):
    features = torch.ones(1, side * side, 1, dtype=torch.double)
    for count in range(1, side * side + 1):
        indices, pooled = pool(features, count)
        assert (indices[0].diff() > 0).all()
        assert 0 <= int(indices.min()) <= int(indices.max()) < side * side
        torch.testing.assert_close(pooled, torch.ones(1, count, 1, dtype=torch.double), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_decoder_runs_on_what_is_left():
    """Against the original decoder on pooled features, at the positions of the middles."""
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    routed = reroute_fx.compile(model, 0.5, method="avgpool", backend="eager")
    assert routed.routing_config.decision_layers == ()
    assert routed.report.average_tokens == 288
    output, inner = routed(**inputs), model.model
    (features,) = inner.get_image_features(inputs["pixel_values"]).pooler_output
    tower = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    indices, pooled = pool(tower, 8)
    assert output.routing.entered[0].tolist() == indices[0].tolist()
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    embeds = inner.get_input_embeddings()(inputs["input_ids"])[0]
    embeds[is_image] = features.fill_(-1).index_copy(0, indices[0], inner.multi_modal_projector(pooled)[0])
    stays = ~is_image
    stays[is_image.nonzero().flatten()[indices[0]]] = True
    positions = torch.arange(len(stays))[None, stays]
    wanted = inner.language_model(inputs_embeds=embeds[None, stays], position_ids=positions)
    logits = model.lm_head(wanted.last_hidden_state)
    torch.testing.assert_close(output.logits[:, stays], logits, rtol=1e-4, atol=1e-4)
    assert output.routing.kv_lengths == ((int(stays.sum()),) * model.config.text_config.num_hidden_layers,)


@torch.no_grad()
def test_features_that_were_not_reduced_are_refused():
    """They would fill the places of tokens that are not there."""
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    routed = reroute_fx.compile(model, 0.5, method="avgpool", backend="eager")
    expected, pixels = routed(**inputs).logits, inputs.pop("pixel_values")
    whole, reduced = (
        {"image": each.get_image_features(pixel_values=pixels)} for each in (model, routed.model)
    )
    with pytest.raises(
        InputError, match=r"came without method 'avgpool' having reduced them; expected pixel_values"
    ):
        routed(**inputs, mm_encoder_outputs=whole)
    assert torch.equal(routed(**inputs, mm_encoder_outputs=reduced).logits, expected)


@pytest.mark.full("21 s; it runs in eager in the gate")
def test_it_compiles_and_generates():
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    eager, compiled = (
        reroute_fx.compile(model, 0.5, method="avgpool", backend=backend) for backend in ("eager", "inductor")
    )
    assert torch.equal(*(new_tokens(each, inputs, max_new_tokens=6) for each in (eager, compiled)))


@pytest.mark.parametrize("tier", [192, 128, 64, 0.3])
def test_averages_are_the_tier(tier):
    config = RoutingConfig.from_tier(tier, "avgpool")
    assert abs(config.average_tokens(32) - (tier if tier > 1 else 576 * tier)) <= 1


def test_pictures_of_any_size_are_refused():
    with pytest.raises(UnsupportedModelError, match="the tokens of its pictures depend on their sizes"):
        reroute_fx.inspect(unrouted_model("qwen"), 128, method="avgpool")
