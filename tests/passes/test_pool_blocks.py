"""PoolBlocks: one token of each block carries the mean of its block, and nothing else changes."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from suite_tiers import one

from reroute_fx import RoutingConfig
from reroute_fx.passes import (
    ExposeOutputs,
    ExposeStreams,
    InsertSelection,
    MatchError,
    PoolBlocks,
    RouteStages,
    run_passes,
    to_program,
)

CONFIG = RoutingConfig((1, 2), (0.5, 0.25))
UNEVEN = {"lengths": (40, 31, 18), "images": ((21,), (20,), ())}
NONE = torch.iinfo(torch.int64).max


def pool(toy, program, *more):
    graph, results = run_passes(program, [*toy.passes(4), PoolBlocks(), *more])
    return graph, results[4]


def block_members():
    """Of the rows of UNEVEN: places in the visual tokens that form a block, its middle second."""
    return [[0, 1, 2], [5, 9, 10, 11], [7, 8]], [[3, 4, 19]], []


def make_prompt(toy):
    """A prompt and its blocks, each as places in the stream."""
    inputs = toy.make_prompt(CONFIG, **UNEVEN)
    visual = [[*chain(*images)] for images in toy.make_visual(**UNEVEN)]
    members = [
        [[tokens[i] for i in block] for block in row]
        for tokens, row in zip(visual, block_members(), strict=True)
    ]
    inputs["blocks"] = torch.full(inputs["inputs_embeds"].shape[:2], NONE)
    inputs["middles"] = torch.full((3, 3), NONE)
    inputs["always"] = torch.zeros(inputs["visual_index"].shape, dtype=torch.bool)
    for row, blocks in enumerate(members):
        for number, block in enumerate(blocks):
            inputs["blocks"][row, block] = number
            inputs["middles"][row, number] = block[1]
            inputs["always"][row, visual[row].index(block[1])] = True
    return inputs, members


def pooled_by_hand(embeds, members):
    pooled = embeds.clone()
    for row, blocks in enumerate(members):
        for block in blocks:
            pooled[row, block[1]] = sum(embeds[row, place] for place in block) / len(block)
    return pooled


@torch.no_grad()
def test_the_decoder_runs_on_means(toy, exported):
    model, program = exported(layers=3, kv_heads=2)
    graph, result = pool(toy, program)
    assert (result.matched, result.rewritten) == (1, 1)
    inputs, members = make_prompt(toy)
    plain = {name: inputs[name] for name in ("inputs_embeds", "position_ids")}
    precise = {**plain, "inputs_embeds": pooled_by_hand(plain["inputs_embeds"].double(), members)}
    rounded = model(**{**precise, "inputs_embeds": precise["inputs_embeds"].float()})
    exact = toy.double(model)(**precise)
    found = toy.call(to_program(graph, program), inputs)["output"]
    is_token = torch.arange(40) < torch.tensor(UNEVEN["lengths"])[:, None]
    bound = toy.tolerance(rounded[is_token], exact[is_token])
    assert (found - exact)[is_token].abs().max() <= bound
    assert (model(**plain) - exact)[is_token].abs().max() > 1000 * bound


@torch.no_grad()
def test_only_middles_change(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = pool(toy, program, ExposeStreams())
    inputs, members = make_prompt(toy)
    stream = toy.call(to_program(graph, program), inputs)["routing"]["stream.0"]
    expected = pooled_by_hand(inputs["inputs_embeds"], members)
    torch.testing.assert_close(stream, expected, rtol=1e-6, atol=1e-6)
    changed = (stream != inputs["inputs_embeds"]).any(dim=2).nonzero().tolist()
    assert changed == sorted([row, block[1]] for row, blocks in enumerate(members) for block in blocks)


def test_without_blocks_nothing_changes(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    inputs, _ = make_prompt(toy)
    inputs |= {"blocks": torch.full_like(inputs["blocks"], NONE), "middles": torch.full((3, 1), NONE)}
    unrouted, _ = run_passes(program, toy.passes(4))
    expected = toy.call(to_program(unrouted, program), inputs)["output"]
    assert torch.equal(toy.call(to_program(pool(toy, program)[0], program), inputs)["output"], expected)


def test_larger_sizes_make_no_difference(toy, exported):
    """As sizes are rounded up for CUDA graphs."""
    _, program = exported(layers=3, kv_heads=2)
    routed = to_program(pool(toy, program, ExposeStreams())[0], program)
    inputs, _ = make_prompt(toy)
    wide = dict(inputs)
    for name, value in {"position_ids": 0, "blocks": NONE // 2, "middles": NONE // 2}.items():
        wide[name] = F.pad(inputs[name], (0, 7), value=value)
    wide["inputs_embeds"] = F.pad(inputs["inputs_embeds"], (0, 0, 0, 7), value=-3.0)
    narrow, padded = (toy.call(routed, given)["routing"]["stream.0"] for given in (inputs, wide))
    torch.testing.assert_close(padded[:, :40], narrow, rtol=1e-6, atol=1e-6)


@one("3 s each")
@pytest.mark.parametrize("forced", [1, 2])
@pytest.mark.parametrize("action", ["compact_route_stagewise", "physical_delete"])
def test_the_first_decisions_keep_middles_whatever_their_scores(toy, exported, action, forced):
    _, program = exported(layers=3, kv_heads=2)
    inputs, _ = make_prompt(toy)

    def routing(always):
        more = [InsertSelection((1, 2), always=always), RouteStages(action), ExposeOutputs()]
        return toy.call(to_program(pool(toy, program, *more)[0], program), inputs)["routing"]

    found, free = routing(forced), routing(0)
    always, pools, changed = inputs["always"], [list(range(21)), list(range(20)), []], 0
    for number, (layer, counts) in enumerate(((1, (10, 10, 0)), (2, (5, 5, 0)))):
        for row, count in enumerate(counts):
            scores, marks = found[f"scores.{layer}"][row], always[row] & (number < forced)
            assert scores[pools[row]].isfinite().all()
            middles = [i for i in pools[row] if marks[i]]
            assert len(middles) == int(marks.sum())
            others = sorted((i for i in pools[row] if not marks[i]), key=lambda i: -scores[i])
            kept = sorted([*middles, *others[: count - len(middles)]])
            assert found[f"kept.{layer}"][row].nonzero().flatten().tolist() == kept
            changed += int((marks & ~free[f"kept.{layer}"][row]).sum())
            if action == "physical_delete":
                pools[row] = kept
    assert changed, "attention keeps them anyway"


@pytest.mark.full("3 s each; routed programs are exported again in test_route_stages.py")
@pytest.mark.parametrize(
    "more", [(), (InsertSelection((1, 2), always=1), RouteStages("compact_route_stagewise"))]
)
def test_result_exports_again(toy, exported, more):
    _, program = exported(layers=3, kv_heads=2)
    graph, _ = pool(toy, program, *more, ExposeOutputs())
    inputs, _ = make_prompt(toy)
    other = {
        name: tensor if name.startswith("slots") else torch.cat([tensor, tensor[:1]])
        for name, tensor in inputs.items()
    }
    toy.assert_exports_again(to_program(graph, program), inputs, other)


def test_it_runs_once_and_before_decisions(toy, exported):
    _, program = exported(layers=3, kv_heads=2)
    with pytest.raises(MatchError, match="can't run on a graph with pooled blocks"):
        pool(toy, program, PoolBlocks())
    with pytest.raises(MatchError, match="can't run on a graph with decisions"):
        run_passes(program, [*toy.passes(4), InsertSelection((1,)), PoolBlocks()])
