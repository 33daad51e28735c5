"""FastV and PyramidDrop as their authors run them, against a decoder in plain loops."""

import pytest
import torch
from plain_decoder import PlainDecoder
from suite_tiers import one, share

import reroute_fx

STEPS = 6
PRESETS = {
    # Layers, ratios, whether the layer before is asked, whether positions are counted anew: from the authors' code.
    "fastv-official-k2": ((2,), (0.5,), True, False),
    "fastv-official-k3": ((3,), (0.5,), True, False),
    "pdrop-official": ((8, 16, 24), (0.5, 0.25, 0.125), False, True),
}
ROUTED = {
    "fastv-official-k2": ((2, 7, 15, 23), True, False),
    "pdrop-official": ((8, 16, 24), False, True),
}


def embeddings(golden):
    """The prompt's embeddings with the picture's features in them, and the places of these."""
    model, ids = golden.model, golden.inputs["input_ids"]
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(golden.inputs["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(ids)[0]
    is_visual = ids[0] == model.config.image_token_id
    embeds[is_visual] = features
    return embeds, is_visual.nonzero().flatten().tolist()


def expect_same(golden, routed, plain):
    embeds, visual = embeddings(golden)
    with torch.no_grad():
        output, wanted = routed(**golden.inputs), plain.answer(embeds, visual, STEPS)
    for layer, kept in output.routing.selected.items():
        assert kept[0].tolist() == wanted.kept[layer]
    # Float32 noise is near 1e-5, another selection or position moves logits by 1e-2 and more.
    torch.testing.assert_close(output.logits[0, -1].double(), wanted.logits, rtol=0, atol=1e-4)
    for layer, count in enumerate(output.routing.kv_lengths[0]):
        assert output.past_key_values.layers[layer].keys.shape[2] == count
    tokens = routed.generate(**golden.inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert tokens[0, -STEPS:].tolist() == wanted.tokens
    return output


@pytest.mark.parametrize("name", share(PRESETS, ["fastv-official-k2", "pdrop-official"], "3 s each"))
def test_as_the_authors_run_it(llava, name):
    layers, ratios, previous, contiguous = PRESETS[name]
    routed = reroute_fx.compile(llava.model, method=name, action="physical_delete", backend="eager")
    counts = {layer: int(576 * ratio) for layer, ratio in zip(layers, ratios, strict=True)}
    plain = PlainDecoder(llava.model, counts, previous=previous, deletes=True, contiguous=contiguous)
    output = expect_same(llava, routed, plain)
    assert {layer: len(kept[0]) for layer, kept in output.routing.selected.items()} == counts


@one("3 s each")
@pytest.mark.parametrize("action", ["compact_route", "compact_route_stagewise"])
@pytest.mark.parametrize("name", ROUTED)
def test_routed(llava, name, action):
    layers, previous, contiguous = ROUTED[name]
    routed = reroute_fx.compile(llava.model, 0.4, method=name, action=action, backend="eager")
    config = routed.routing_config
    assert config.decision_layers == layers
    counts = dict(zip(layers, config.keep_counts(), strict=True))
    plain = PlainDecoder(llava.model, counts, previous=previous, deletes=False, contiguous=contiguous)
    expect_same(llava, routed, plain)


def test_deleting_twice_asks_the_layer_before_among_the_survivors(llava):
    config = reroute_fx.RoutingConfig(
        (5, 6, 20),
        action="physical_delete",
        method="fastv-official-k2",
        scoring="previous",
        keep_tokens=(300, 200, 50),
    )
    routed = reroute_fx.compile(llava.model, config=config, backend="eager")
    counts = {5: 300, 6: 200, 20: 50}
    plain = PlainDecoder(llava.model, counts, previous=True, deletes=True, contiguous=False)
    expect_same(llava, routed, plain)


@pytest.mark.full("4 s; it guards the test beside it")
def test_positions_matter(llava):
    """The check above can fail: with positions kept the answers are others."""
    config = reroute_fx.RoutingConfig.from_tier(0.4, "pdrop-official", "physical_delete")
    kept = reroute_fx.compile(llava.model, config=config, backend="eager")
    original = reroute_fx.RoutingConfig(config.decision_layers, config.keep_ratios, config.action)
    other = reroute_fx.compile(llava.model, config=original, backend="eager")
    with torch.no_grad():
        difference = kept(**llava.inputs).logits[0, -1] - other(**llava.inputs).logits[0, -1]
    assert difference.abs().max() > 1e-2


def test_positions_in_several_directions_are_not_counted_anew(qwen):
    with pytest.raises(reroute_fx.UnsupportedModelError, match="positions is 'contiguous'"):
        reroute_fx.compile(qwen.model, method="pdrop-official", backend="eager")


@torch.no_grad()
def test_rows_of_a_batch_keep_positions_of_their_own(llava):
    """Contiguous positions of a padded batch, in the prompt and for generated tokens."""
    routed = reroute_fx.compile(llava.model, method="pdrop-official", backend="eager")
    ids, pixels = llava.inputs["input_ids"], llava.inputs["pixel_values"]
    longer = torch.cat([ids[:, :1], ids[:, -9:-4], ids[:, 1:]], dim=1)
    batch = torch.zeros(2, longer.shape[1], dtype=torch.long)
    batch[0, -ids.shape[1] :], batch[1] = ids[0], longer[0]
    mask = torch.ones_like(batch)
    mask[0, : -ids.shape[1]] = 0
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    together = routed.generate(
        input_ids=batch, attention_mask=mask, pixel_values=pixels.repeat(2, 1, 1, 1), **options
    )
    for row, alone in zip(together, (ids, longer), strict=True):
        single = routed.generate(input_ids=alone, pixel_values=pixels, **options)
        assert row[-STEPS:].tolist() == single[0, -STEPS:].tolist()
