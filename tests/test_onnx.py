"""Programs as ONNX files compute on ONNX Runtime what the routed graph computes, in operators that TensorRT imports."""

import dataclasses
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from artifacts import LIMITS, sign
from conversations import (
    BATCHES,
    IMAGE,
    NOISE,
    ROUTING,
    SINGLE,
    batch,
    build,
    forward_and_steps,
    new_tokens,
    prompt,
)
from kernel_examples import SELECTIONS, selection_inputs
from safetensors.torch import load_file
from suite_tiers import share
from torch.export import Dim

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx.capture import text_decoder
from reroute_fx.errors import ArtifactError, BackendUnavailableError, CaptureError, InputError
from reroute_fx.kernels import select_tokens_reference
from reroute_fx.lowering.onnx.onnx_operators import supported_operators
from reroute_fx.lowering.onnx.onnx_program import OPSET, WEIGHTS, OnnxProgram, operators, write_onnx
from reroute_fx.lowering.selection_by_counting import select_tokens_by_counting
from reroute_fx.runtime.loaded_model import PROGRAMS

DIVIDENDS = {
    "whole": torch.tensor([-7, -6, -1, 0, 1, 6, 7]),
    "real": torch.tensor([-7.5, -6.0, -0.5, 0.0, 0.5, 6.0, 7.5]),
}

SIZES = {
    **BATCHES,
    "long": [prompt(5, *range(3, 43)), prompt(6, 31, 8, images=3), prompt(8, 9), prompt(7, 9, 11, images=2)],
}
ROUNDING = 5 * NOISE
"""Of ONNX Runtime, which besides the order of sums has its own exponential and its own softmax."""
SORTING_OR_SIZED_BY_VALUES = {"TopK", "NonZero", "Unique", "Compress", "NonMaxSuppression"}
"""Operators that TensorRT takes up to 3840 values, or whose results have sizes that depend on values."""


A_MODEL = (
    "35 s to 60 s; the gate writes and runs smaller programs, and has LLaVA ahead of time (test_artifact.py)"
)


@pytest.fixture(scope="module", params=share(["llava", "qwen"], gate=[], reason=A_MODEL))
def made(request, tmp_path_factory):
    """A routed model, and an artifact of it."""
    folder = tmp_path_factory.mktemp("onnx") / request.param
    config = dataclasses.replace(ROUTING[request.param], decision_layers=(1,), keep_ratios=(0.6,))
    return make(request.param, build(request.param, layers=2), config, folder, export)


def export(routed, programs, folder):
    reroute_fx.export(routed, folder, format="onnx", limits=LIMITS)
    return {name: folder / f"{name}.onnx" for name in programs}


def make(family, model, config, folder, write):
    routed = reroute_fx.compile(model, config=config, backend="eager")
    programs = {name: executable.program for name, executable in routed.programs.items()}
    before = {name: describe(program) for name, program in programs.items()}
    paths = write(routed, programs, folder)
    return SimpleNamespace(
        model=model,
        family=family,
        config=config,
        programs=programs,
        before=before,
        folder=folder,
        paths=paths,
        files={name: OnnxProgram(path) for name, path in paths.items()},
        routed=routed,
    )


@contextmanager
def on_files(made):
    """The routed model with the files in place of its programs."""
    decoder = text_decoder(made.routed)
    graphs = {name: getattr(decoder, name) for name in made.files}
    for name, program in made.files.items():
        setattr(decoder, name, program)
    yield made.routed
    for name, program in graphs.items():
        setattr(decoder, name, program)


def describe(program):
    nodes = [(node.format_node(), str(node.meta.get("val"))) for node in program.graph.nodes]
    return nodes, str(program.graph_signature), dict(program.range_constraints), list(program.state_dict)


@torch.no_grad()
def check_parity(made, inputs):
    def run(model):
        return model(**inputs), forward_and_steps(model, inputs, [9, 10, 11])[:, -3:]

    expected, expected_steps = run(made.routed)
    with on_files(made) as model:
        found, found_steps = run(model)
    for layer in made.config.decision_layers:
        for ours, theirs in zip(found.routing.selected[layer], expected.routing.selected[layer], strict=True):
            assert torch.equal(ours, theirs)
    is_token = inputs["attention_mask"].bool()
    assert (found.logits - expected.logits)[is_token].abs().max() < ROUNDING
    assert (found_steps - expected_steps).abs().max() < ROUNDING


@pytest.mark.parametrize("rows", SIZES)
def test_files_compute_what_the_graph_computes(made, rows):
    check_parity(made, batch(made.family, *SIZES[rows]))


@pytest.mark.parametrize("rows", SIZES)
def test_files_generate_the_same(made, rows):
    inputs, options = batch(made.family, *SIZES[rows]), {"max_new_tokens": 12, "do_sample": False}
    expected = new_tokens(made.routed, inputs, **options)
    with on_files(made) as model:
        assert torch.equal(new_tokens(model, inputs, **options), expected)


def write_prefill(routed, programs, folder):
    return write_onnx({"prefill": programs["prefill"]}, folder)


@pytest.mark.full("17 s; selecting by counting is compared with sorting for such pools, too")
def test_images_with_pools_of_their_own(tmp_path_factory):
    config = RoutingConfig((1,), (0.5,), "compact_route", pool="image")
    made = make("llava", build("llava", layers=2), config, tmp_path_factory.mktemp("onnx"), write_prefill)
    check_parity(made, batch("llava", *SIZES["padded"]))
    assert operators(made.paths["prefill"]) <= supported()


def test_programs_are_not_changed(made):
    assert {name: describe(program) for name, program in made.programs.items()} == made.before


def test_weights_are_stored_once(made):
    stored = load_file(made.folder / WEIGHTS)
    held = [*made.model.parameters(), *made.model.buffers()]
    for tensor in stored.values():
        assert sum(tensor.shape == other.shape and torch.equal(tensor, other) for other in held) >= 1
    largest = [p for p in text_decoder(made.model).parameters() if p.ndim > 1]
    for weight in largest:
        same = [t for t in stored.values() if t.shape == weight.shape and torch.equal(t, weight)]
        assert len(same) == 1
    assert (made.folder / WEIGHTS).stat().st_size < sum(t.nbytes for t in stored.values()) + 128 * len(stored)


def test_models_refer_to_the_weights(made):
    for path in made.paths.values():
        constants = onnx.load(path, load_external_data=False).graph.initializer
        external = [c for c in constants if c.data_location == onnx.TensorProto.EXTERNAL]
        inline = [c for c in constants if c.data_location != onnx.TensorProto.EXTERNAL]
        assert {entry.value for c in external for entry in c.external_data if entry.key == "location"} == {
            WEIGHTS
        }
        decoder = text_decoder(made.model)
        matrices = {
            name for name, given in decoder.layers.named_parameters(prefix="layers") if given.ndim == 2
        }
        assert matrices
        assert matrices <= {c.name for c in external}
        assert all(len(c.raw_data) <= 64 for c in inline)
        for constant in onnx.load(path).graph.initializer:
            if constant.name in {c.name for c in external}:
                weight = decoder.get_parameter_or_buffer(constant.name)
                assert (onnx.numpy_helper.to_array(constant) == weight.numpy(force=True)).all()


def test_names(made):
    """Inputs have the names of the program's; what it writes into comes back."""
    layers, decisions = range(2), made.config.decision_layers
    for name, program in made.programs.items():
        graph = onnx.load(made.paths[name], load_external_data=False).graph
        assert [i.name for i in graph.input] == list(program.graph_signature.user_inputs)
    outputs = {
        name: {o.name for o in onnx.load(path, load_external_data=False).graph.output}
        for name, path in made.paths.items()
    }
    assert outputs["prefill"] == (
        {"last_hidden_state"}
        | {f"{kind}.{i}" for i in layers for kind in ("key", "value")}
        | {f"{kind}.{i}" for i in decisions for kind in ("scores", "kept")}
    )
    caches = {f"{kind}_cache_{i}.new" for i in layers for kind in ("key", "value")}
    assert outputs["continuation"] == {"last_hidden_state"} | caches


def test_sizes_stay_symbols(made):
    """Each symbol of the program is one of the file, and none stands for two."""
    for name, program in made.programs.items():
        placeholders = {n.name: n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
        names = {}
        for value in onnx.load(made.paths[name], load_external_data=False).graph.input:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, placeholders[value.name].shape, strict=True):
                if isinstance(size, int):
                    assert dim.dim_value == size
                else:
                    assert names.setdefault(str(size), dim.dim_param) == dim.dim_param != ""
        assert len(set(names.values())) == len(names)


def test_files_are_valid_and_tensorrt_takes_their_operators(made):
    for path in made.paths.values():
        onnx.checker.check_model(path, full_check=True)
        used = operators(path)
        assert used <= supported()
        assert not used & SORTING_OR_SIZED_BY_VALUES
        assert [entry.version for entry in onnx.load(path, load_external_data=False).opset_import] == [OPSET]


def test_artifacts_generate_without_the_model(made):
    """`load` runs all of an artifact on ONNX Runtime, from pictures to logits."""
    loaded = reroute_fx.load(made.folder)
    assert loaded.report.manifest.requirements is None
    assert "ONNX Runtime" in str(loaded.report)
    for rows in BATCHES.values():
        inputs = batch(made.family, *rows)
        with torch.no_grad():
            expected, found = made.routed(**inputs), loaded(**inputs)
        is_token = inputs["attention_mask"].bool()
        assert (found.logits - expected.logits)[is_token].abs().max() < ROUNDING
        for layer in made.config.decision_layers:
            assert all(map(torch.equal, found.routing.selected[layer], expected.routing.selected[layer]))
        answers = [new_tokens(m, inputs, max_new_tokens=8, do_sample=False) for m in (loaded, made.routed)]
        assert torch.equal(*answers)


@pytest.mark.full("needs an artifact of Qwen")
@pytest.mark.parametrize("made", ["qwen"], indirect=True)
@torch.no_grad()
def test_pictures_that_do_not_fit(made):
    """`test_artifact.py` has it for artifacts of machine code."""
    loaded = reroute_fx.load(made.folder)
    inputs = batch("qwen", [1, 5, *[IMAGE] * 36, 9])
    inputs |= {"pixel_values": torch.zeros(144, 96), "image_grid_thw": torch.tensor([[1, 12, 12]])}
    with pytest.raises(InputError, match=r"36 visual tokens in a picture.*limits.image_tokens=32"):
        loaded(**inputs)
    inputs = batch("qwen", *SINGLE)
    with pytest.raises(InputError, match="grids"):
        loaded(**{**inputs, "image_grid_thw": None})
    with pytest.raises(InputError, match="multiples of 2"):
        loaded(**{**inputs, "image_grid_thw": torch.tensor([[1, 64, 1]])})


def test_they_run_on_cpu(made):
    with pytest.raises(ArtifactError, match="device is meta, but ONNX artifacts run on cpu"):
        reroute_fx.load(made.folder, device="meta")


def test_all_operators_of_an_artifact_are_taken(made):
    for name in PROGRAMS:
        assert operators(made.folder / f"{name}.onnx") <= supported()


def test_damaged_files_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    (folder / "head.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"head\.onnx has 7 bytes"):
        reroute_fx.load(folder)
    sign(folder)
    with pytest.raises(ArtifactError, match=r"ONNX Runtime can't load .*head\.onnx"):
        reroute_fx.load(folder)


def supported():
    return {name for name, rules in supported_operators().items() if rules["supported"]}


def test_files_hold_no_paths(made):
    for path in made.paths.values():
        content = path.read_bytes()
        for folder in (Path(torch.__file__).parents[1], Path(reroute_fx.__file__).parent, made.folder):
            assert str(folder).encode() not in content


def test_the_list_of_operators_is_whole():
    """Every operator of the newest opset in the list, and no other than those that are older."""
    newest = {
        s.name
        for s in onnx.defs.get_all_schemas()
        if s.domain == "" and s.since_version <= 23 and s.support_level == s.SupportType.COMMON
    }
    assert newest <= set(supported_operators())
    assert all(rules["types"] for rules in supported_operators().values() if rules["supported"])


class Toy(torch.nn.Module):
    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.arange(8).to(dtype))
        self.same_weight = self.weight

    def forward(self, inputs_embeds):
        return {"last_hidden_state": self.function(inputs_embeds * self.weight + self.same_weight)}


def toy(function, dtype=torch.float32):
    """A program on ``[B, S, 8]``."""
    example = {"inputs_embeds": torch.zeros(3, 4, 8, dtype=dtype)}
    shapes = {"inputs_embeds": {0: Dim("batch"), 1: Dim("length")}}
    return torch.export.export(Toy(function, dtype), (), example, dynamic_shapes=shapes)


def test_tied_weights_are_stored_once(tmp_path):
    path = write_onnx({"toy": toy(torch.neg)}, tmp_path)["toy"]
    assert len(load_file(tmp_path / WEIGHTS)) == 1
    x = torch.randn(2, 5, 8)
    expected = -(x * torch.arange(8) + torch.arange(8))
    assert torch.allclose(OnnxProgram(path).run(inputs_embeds=x)["last_hidden_state"], expected)


REFUSED = {
    "BitwiseAnd": lambda x: x.long() & 1,
    "Det": lambda x: torch.linalg.det(x[..., None, None].expand(*x.shape, 2, 2)),
    "Cos on DOUBLE": lambda x: x.double().cos(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_tensorrt_does_not_take_is_refused(what, tmp_path):
    with pytest.raises(CaptureError, match=rf"'prefill' uses .*{what} at \w+"):
        write_onnx({"prefill": toy(REFUSED[what])}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_fixed_to_a_size_is_refused(tmp_path):
    program = toy(torch.neg)
    graph, output = program.graph, program.graph.output_node()
    (result,) = output.args[0]
    with graph.inserting_before(output):
        seven = graph.call_function(torch.ops.aten.ones.default, ([7, 8],))
        output.args = ((graph.call_function(torch.ops.aten.add.Tensor, (result, seven)),),)
    program.graph_module.recompile()
    with pytest.raises(CaptureError, match="'prefill' was fixed to a size"):
        write_onnx({"prefill": program}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision(tmp_path):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for dtype, name in ((torch.float16, "half"), (torch.bfloat16, "brain")):
        path = write_onnx({name: toy(torch.neg, dtype)}, tmp_path)[name]
        (weight,) = load_file(tmp_path / WEIGHTS).values()
        assert torch.equal(weight, torch.arange(8).to(dtype))
        if dtype == torch.float16:
            found = OnnxProgram(path).run(inputs_embeds=x.to(dtype))["last_hidden_state"]
            product = x.to(dtype).double() * weight
            rounding = 2**-11 * (2 * product.abs() + weight)  # of the product, and of the sum
            assert ((found + (product + weight)).abs() <= rounding).all()
        else:
            with pytest.raises(BackendUnavailableError, match="float32 model"):
                OnnxProgram(path)


@pytest.mark.parametrize("ends", [(0, 2, 2, 7), (7, 7, 7, 7), (1, 3, 6, 7)])
def test_products_of_experts(ends, tmp_path):
    """Experts without rows included."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8, 5))

        def forward(self, rows, ends):
            return {"products": torch.ops.transformers.grouped_mm_fallback(rows, self.weight, ends)}

    given = {"rows": torch.randn(7, 8), "ends": torch.tensor(ends, dtype=torch.int32)}
    module = Experts().requires_grad_(False)
    program = torch.export.export(module, (), given, dynamic_shapes={"rows": {0: Dim.AUTO}, "ends": None})
    found = OnnxProgram(write_onnx({"experts": program}, tmp_path)["experts"]).run(**given)["products"]
    starts = (0, *ends)
    expected = torch.cat([given["rows"][starts[i] : starts[i + 1]] @ module.weight[i] for i in range(4)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_soft_capped_attention_of_any_length(is_causal, tmp_path):
    """Four heads on two, exported where sizes are symbols that could be equal."""

    def attend(x):
        query, states = x.view(*x.shape[:2], 4, 2).transpose(1, 2), x[..., :4].view(*x.shape[:2], 2, 2)
        key, value = states.transpose(1, 2), states.transpose(1, 2) / 8
        place = torch.arange(x.shape[1])
        mask = None if is_causal else (place[:, None] - place < 3)[None, None]
        hidden = torch.ops.reroute.attention_with_softcap(query, key, value, 2.0, mask, is_causal, 0.1)
        return hidden.transpose(1, 2).flatten(2)

    program = OnnxProgram(write_onnx({"toy": toy(attend)}, tmp_path)["toy"])
    for size in ((3, 4), (2, 5), (1, 1)):
        x = torch.randn(*size, 8, generator=torch.Generator().manual_seed(0))
        expected = Toy(attend)(x)["last_hidden_state"]
        torch.testing.assert_close(program.run(inputs_embeds=x)["last_hidden_state"], expected)


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_libraries_that_write_are_missed_before_anything_is_traced(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailableError, match=rf"^{name} is not installed.*reroute-fx\[onnx\]"):
        write_onnx({"prefill": None}, tmp_path)


def test_the_library_that_runs_is_missed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"^onnxruntime is not installed.*reroute-fx\[onnx\]"):
        OnnxProgram(tmp_path / "prefill.onnx")


@pytest.mark.parametrize("rows", SELECTIONS)
@pytest.mark.parametrize("padding", [0, 3])
def test_counting_selects_what_sorting_selects(rows, padding):
    def few_values(count, generator):
        return torch.randint(3, (count,), generator=generator).float()

    for values in ({}, {"values": few_values}):
        inputs = selection_inputs(SELECTIONS[rows], padding=padding, more_slots=padding, **values)
        expected, found = select_tokens_reference(*inputs), select_tokens_by_counting(*inputs)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", DIVIDENDS)
def test_division_rounds_down(kind, tmp_path):
    class Divide(torch.nn.Module):
        def forward(self, given, by):
            return {"by three": given // 3, "by minus two": given // -2, "by tensor": given // by}

    given, by = DIVIDENDS[kind], torch.tensor([2, -2, 3, 5, -3, -4, 4]).to(DIVIDENDS[kind].dtype)
    write_onnx({"divide": torch.export.export(Divide(), (), {"given": given, "by": by})}, tmp_path)
    found = OnnxProgram(tmp_path / "divide.onnx").run(given=given, by=by)
    for name, expected in Divide()(given, by).items():
        assert torch.equal(found[name], expected)
