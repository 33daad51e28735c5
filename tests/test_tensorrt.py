"""The tensorrt backend: what Torch-TensorRT would convert, and that what it is given computes the same.

The library itself runs on NVIDIA GPUs only: tests of it are marked `tensorrt` and skipped elsewhere. All others
take a stand-in that checks what it is given as the library's own signatures do, and then runs it in PyTorch.
"""

import copy
import importlib.util
import json
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from artifacts import TIERS, artifact, remember, routed_at
from conversations import (
    BATCHES,
    NOISE,
    ROUTING,
    batch,
    build,
    forward_and_steps,
    new_tokens,
    prompt,
    unrouted_model,
)
from kernel_examples import NO_TOKEN, SELECTIONS, positions_of, scoring_inputs, selection_inputs
from torch.export import Dim, ExportedProgram
from transformers.modeling_outputs import BaseModelOutput

import reroute_fx
from reroute_fx import BackendUnavailableError, ConfigError, InputError, RoutingConfig, api, kernels
from reroute_fx.artifact import exporting
from reroute_fx.capture import capture_decoder, find_visual_token_ids, text_decoder
from reroute_fx.config.limits import Limits
from reroute_fx.errors import ArtifactError, CaptureError
from reroute_fx.lowering.selection_by_counting import select_tokens_by_counting
from reroute_fx.lowering.tensorrt import decompositions, engine_coverage, engines
from reroute_fx.lowering.tensorrt.decompositions import Size
from reroute_fx.lowering.tensorrt.engine_coverage import coverage_of_decomposed
from reroute_fx.lowering.tensorrt.engines import coverage, coverage_of, decompose, lower_tensorrt
from reroute_fx.passes import ACTIONS
from reroute_fx.pipeline import route
from reroute_fx.runtime import make_routed_model

RECORDER = Path(__file__).parents[1] / "benchmarks" / "record_converters.py"
CUDA = torch.device("cuda")
LIMITS = Limits(batch=4, length=96, image_tokens=48)
COMPILE_KEYWORDS = {
    *("arg_inputs", "kwarg_inputs", "device", "disable_tf32", "min_block_size", "attn_bias_is_causal"),
    *("require_full_compilation", "truncate_double", "immutable_weights", "decompose_attention"),
}
"""Of `torch_tensorrt.dynamo.compile` in 2.11 to 2.14, as far as a caller of this kind may use them."""


class Library:
    """A stand-in for `torch_tensorrt`, with the signatures of 2.11 to 2.14.

    Attributes:
        compiled: arguments of each call of `dynamo.compile`.
    """

    __version__ = "0.0.0"

    def __init__(self):
        self.compiled = []
        self.files = {}
        self.dynamo = SimpleNamespace(compile=self._compile)

    def Input(self, *, shape=None, min_shape=None, opt_shape=None, max_shape=None, dtype, name):
        assert (shape is None) == (None not in (min_shape, opt_shape, max_shape))
        return SimpleNamespace(
            shape=shape, min_shape=min_shape, opt_shape=opt_shape, max_shape=max_shape, dtype=dtype, name=name
        )

    def _compile(self, exported_program, inputs=None, **keywords):
        assert inputs is None
        assert keywords.keys() <= COMPILE_KEYWORDS
        self.compiled.append(SimpleNamespace(program=exported_program, **keywords))
        return exported_program.module(check_guards=False)

    def save(
        self,
        module,
        file_path="",
        *,
        extra_files=None,
        output_format="exported_program",
        retrace,
        pickle_protocol,
    ):
        assert output_format == "exported_program"
        # What is in the file, and so can be moved with it.
        number = str(len(self.files))
        Path(file_path).write_text(number)
        self.files[number] = module, extra_files

    def load(self, file_path="", extra_files=None):
        module, files = self.files[Path(file_path).read_text()]
        extra_files.update({name: files[name] for name in extra_files if name in files})
        return SimpleNamespace(module=lambda: module)

    @contextmanager
    def installed(self):
        """Let it be found, on a machine that has a GPU."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (engines, api, exporting):
                patch.setattr(module, "check_tensorrt", lambda device: self)
            patch.setattr(engines, "program_device", lambda program: CUDA)
            yield


@pytest.fixture(scope="module")
def library():
    return Library()


IN_FULL = pytest.mark.full("25 s for each family, for a backend that is experimental")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def made(request, library):
    """A routed model, and the same one on what the library would be given."""
    model, config = unrouted_model(request.param), ROUTING[request.param]
    routed = reroute_fx.compile(model, config=config, backend="eager")
    programs = {name: executable.program for name, executable in routed.programs.items()}
    before = {name: fingerprint(program) for name, program in programs.items()}
    with library.installed():
        lowered = {name: lower_tensorrt(program, name, LIMITS) for name, program in programs.items()}
    calls = dict(zip(programs, library.compiled, strict=True))
    library.compiled.clear()
    return SimpleNamespace(
        family=request.param,
        routed=routed,
        lowered=with_programs(model, routed, lowered),
        programs=programs,
        before=before,
        calls=calls,
    )


def with_programs(model, routed, programs):
    """A routed model that runs other programs."""
    return make_routed_model(
        model,
        text_decoder(model),
        report=routed.report,
        position_rank=capture_decoder(model).position_rank,
        visual_ids=find_visual_token_ids(model.config),
        **programs,
    )


def fingerprint(program):
    """All that a program is made of but its weights."""
    nodes = [(n.name, n.format_node(), str(n.meta.get("val")), sorted(n.meta)) for n in program.graph.nodes]
    environment = next(
        n.meta["val"].fake_mode.shape_env for n in program.graph.nodes if n.name == "inputs_embeds"
    )
    sizes = str(environment.deferred_runtime_asserts), len(environment.guards), str(environment.replacements)
    return nodes, str(program.graph_signature), str(program.range_constraints), sizes


@IN_FULL
@pytest.mark.parametrize("rows", BATCHES)
@torch.no_grad()
def test_it_computes_what_the_program_computes(made, rows):
    inputs = batch(made.family, *BATCHES[rows])
    expected, found = made.routed(**inputs), made.lowered(**inputs)
    for layer in ROUTING[made.family].decision_layers:
        for ours, theirs in zip(found.routing.selected[layer], expected.routing.selected[layer], strict=True):
            assert torch.equal(ours, theirs)
    is_token = inputs["attention_mask"].bool()
    assert (found.logits - expected.logits)[is_token].abs().max() < NOISE
    steps = [forward_and_steps(model, inputs, [9, 10, 11])[:, -3:] for model in (made.lowered, made.routed)]
    assert (steps[0] - steps[1]).abs().max() < NOISE


@IN_FULL
def test_it_generates_the_same(made):
    """Sizes are those of no call before: three rows, another length, a cache that grows."""
    inputs = batch(made.family, prompt(5, 9), prompt(6, 9, 11, 13, 17, images=2), prompt(8, 31, 8))
    answers = [
        new_tokens(model, inputs, max_new_tokens=9, do_sample=False) for model in (made.lowered, made.routed)
    ]
    assert torch.equal(*answers)


@IN_FULL
def test_the_program_stays_as_it_was(made):
    assert {name: fingerprint(program) for name, program in made.programs.items()} == made.before


@IN_FULL
def test_the_library_is_given_functional_programs_of_aten_operators(made):
    for call in made.calls.values():
        targets = {n.target for n in call.program.graph.nodes if n.op == "call_function"}
        operators = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
        assert {operator.namespace for operator in operators} == {"aten"}
        assert not any(operator._schema.is_mutable for operator in operators)


@IN_FULL
def test_the_library_is_given_every_input_with_its_range(made):
    for name, call in made.calls.items():
        assert call.arg_inputs == ()
        assert (call.device.type, call.disable_tf32, call.attn_bias_is_causal) == ("cuda", True, False)
        fakes = {n.name: n.meta["val"] for n in made.programs[name].graph.find_nodes(op="placeholder")}
        assert list(call.kwarg_inputs) == list(
            call.program.module(check_guards=False)._in_spec.child(1).context
        )
        for key, given in call.kwarg_inputs.items():
            assert (given.name, given.dtype) == (key, fakes[key].dtype)
            assert given.shape is None
            for dim, size in enumerate(fakes[key].shape):
                sizes = [shape[dim] for shape in (given.min_shape, given.opt_shape, given.max_shape)]
                if isinstance(size, int):
                    assert sizes == [size] * 3
                    continue
                is_row = str(size) == str(fakes["inputs_embeds"].shape[0])
                assert sizes[0] == 1
                assert sizes[1] >= 2
                assert sizes[2] == (LIMITS.batch if is_row else LIMITS.length)


@IN_FULL
def test_sizes_that_the_library_reads_from_the_program_are_bounded(made):
    """Torch-TensorRT takes the bounds of an engine's inputs from the symbols, and a least size of 2 for 1."""
    for call in made.calls.values():
        ranges = call.program.range_constraints.values()
        assert {int(bounds.lower) for bounds in ranges} == {2}
        assert {int(bounds.upper) for bounds in ranges} == {LIMITS.batch, LIMITS.length}


class Writing(torch.nn.Module):
    """New tokens into a cache, as a continuation writes them; what it returns is what the cache then holds."""

    def forward(self, inputs_embeds, cached_0, key_cache_0):
        row = torch.arange(inputs_embeds.shape[0])[:, None]
        slot = cached_0[:, None] + torch.arange(inputs_embeds.shape[1])
        new = inputs_embeds.unflatten(2, (2, 4))
        torch.ops.aten.index_put_(key_cache_0, [row, None, slot], new)
        return {"output": BaseModelOutput(last_hidden_state=key_cache_0 * 2), "routing": {"key.0": new}}


def writing_inputs(rows=3, new=2, capacity=7):
    return {
        "inputs_embeds": torch.randn(rows, new, 8),
        "cached_0": torch.arange(rows) % (capacity - new + 1),
        "key_cache_0": torch.zeros(rows, 2, capacity, 4),
    }


@pytest.fixture(scope="module")
def writing() -> ExportedProgram:
    rows, new, capacity = Dim("rows"), Dim("new"), Dim("capacity")
    shapes = {
        "inputs_embeds": {0: rows, 1: new},
        "cached_0": {0: rows},
        "key_cache_0": {0: rows, 2: capacity},
    }
    return torch.export.export(Writing(), (), writing_inputs(), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def lowered(writing, library):
    with library.installed():
        program = lower_tensorrt(writing, "continuation", LIMITS)
    return SimpleNamespace(program=program, given=library.compiled.pop().program)


@pytest.mark.parametrize("sizes", [(3, 2, 7), (1, 1, 1), (4, 5, 9)])
def test_caches_are_written_in_place(lowered, sizes):
    inputs = writing_inputs(*sizes)
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    whole = Writing()(**expected)
    result = lowered.program(**inputs)
    assert torch.equal(inputs["key_cache_0"], expected["key_cache_0"])
    assert inputs["key_cache_0"].any()
    assert torch.equal(result["output"].last_hidden_state, whole["output"].last_hidden_state)
    assert torch.equal(result["routing"]["key.0"], whole["routing"]["key.0"])


def test_what_the_library_decomposes_again_stays_the_same(lowered):
    program = lowered.given
    table = decompositions._decompositions()
    theirs = {operator: table[operator] for operator in table if operator not in decompositions._OURS}
    again = program.run_decompositions(theirs)
    counts = [Counter(n.target for n in p.graph.nodes if n.op == "call_function") for p in (program, again)]
    assert counts[0] == counts[1]
    assert not any("copy_" in str(node.target) for node in again.module().graph.nodes)


def test_programs_are_saved_and_loaded(lowered, library, tmp_path):
    path = tmp_path / "continuation.ep"
    with library.installed():
        engines.save_tensorrt(lowered.program, path)
        loaded = engines.load_tensorrt(path)
    assert loaded.interface == lowered.program.interface
    assert (loaded.name, loaded.compilations, loaded.program) == ("continuation", 0, None)
    inputs = writing_inputs()
    loaded(**inputs)
    assert inputs["key_cache_0"].any()


def test_a_batch_of_one_row_is_fixed(writing, library):
    with library.installed():
        lower_tensorrt(writing, "continuation", Limits(batch=1, length=9, image_tokens=4))
    given = library.compiled.pop().kwarg_inputs
    assert given["cached_0"].shape == (1,)
    cache = given["key_cache_0"]
    assert (cache.min_shape, cache.max_shape) == ((1, 2, 1, 4), (1, 2, 9, 4))


def test_files_of_others_are_refused(library, tmp_path):
    with library.installed():
        with pytest.raises(ArtifactError, match="is no file"):
            engines.load_tensorrt(tmp_path / "none.ep")
        path = tmp_path / "other.ep"
        library.save(None, str(path), extra_files={}, retrace=False, pickle_protocol=4)
        with pytest.raises(ArtifactError, match="can't be read"):
            engines.load_tensorrt(path)


@pytest.mark.full("20 s; lowering, and saving what was lowered, are tested apart")
def test_compile_and_export(library, tmp_path_factory, tmp_path):
    """From a model to engines to an artifact, whose other programs are machine code, and back."""
    made, eager = artifact(tmp_path_factory, "llava"), routed_at("llava", TIERS[0])
    remember(made, eager)
    inputs, options = batch("llava", *BATCHES["padded"]), {"max_new_tokens": 6, "do_sample": False}
    expected = new_tokens(eager, inputs, **options)
    with library.installed():
        routed = reroute_fx.compile(unrouted_model("llava"), tier=TIERS[0], backend="tensorrt", limits=LIMITS)
        assert torch.equal(new_tokens(routed, inputs, **options), expected)
        assert routed.report.backend == "tensorrt"
        with pytest.raises(InputError, match=r"5 rows.*limits\.batch=4"):
            routed(**batch("llava", *BATCHES["single"] * 5))
        path = reroute_fx.export(routed, tmp_path / "llava", format="tensorrt", limits=LIMITS)
        loaded = reroute_fx.load(path)
        assert torch.equal(new_tokens(loaded, inputs, **options), expected)
    formats = {name: files.format for name, files in loaded.report.manifest.programs.items()}
    assert formats == {
        **dict.fromkeys(("embeddings", "images", "head"), "aot"),
        **dict.fromkeys(("prefill", "continuation"), "tensorrt"),
    }
    library.compiled.clear()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"backend": "tensorrt"}, BackendUnavailableError, r"reroute-fx\[tensorrt\]"),
        ({"backend": "tensorrt", "dynamic": False}, ConfigError, "dynamic is False; expected True"),
        ({"backend": "tensorrt", "cuda_graphs": True}, ConfigError, "cuda_graphs is True; expected False"),
        ({"backend": "tensorrt", "limits": 8}, ConfigError, "limits is a int"),
        ({"backend": "eager", "limits": LIMITS}, ConfigError, "limits are given for backend 'eager'"),
    ],
)
def test_compile_refuses_before_anything_is_traced(arguments, error, match, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(api, "capture_decoder", lambda model: pytest.fail("traced"))
    with pytest.raises(error, match=match):
        reroute_fx.compile(unrouted_model("llava"), tier=TIERS[0], **arguments)


def test_export_refuses_before_anything_is_traced(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(exporting, "trace", lambda routed: pytest.fail("traced"))
    with pytest.raises(BackendUnavailableError, match=r"reroute-fx\[tensorrt\]"):
        reroute_fx.export(routed_at("llava", TIERS[0]), tmp_path / "new", format="tensorrt")
    assert not list(tmp_path.iterdir())


CHECKED = {
    "aten._to_copy.default": "to_copy_dtype_validator(placeholder_only=False)",
    "aten.cat.default": "cat_validator",
    "aten.clone.default": "not is_only_operator_on_placeholder",
    "aten.index.Tensor": "index_dtype_validator",
    "aten.scaled_dot_product_attention.default": "scaled_dot_product_attention_validator",
    "aten.split_with_sizes.default": "has_static_shapes_in_args([1])",
    "operator.getitem": "getitem_validator",
}
"""Operators that Torch-TensorRT looks at before it converts them, and what it calls that."""


@pytest.fixture(scope="module")
def covered(made):
    """What becomes of both programs of a model, for each action."""
    decomposed = {name: call.program for name, call in made.calls.items()}
    by_action = {ROUTING[made.family].action: coverage_of_decomposed(decomposed)}
    captured = capture_decoder(build(made.family, layers=2))
    for action in set(ACTIONS) - by_action.keys():
        program, _ = route(captured.program, RoutingConfig((1,), (0.5,), action, pool="image"))
        by_action[action] = coverage_of({"prefill": program})
    return by_action


@pytest.mark.full("11 s for a backend that is experimental")
def test_every_operator_has_a_converter(covered):
    """None is left to PyTorch, in the stages and outside, for any action."""
    for action in ACTIONS:
        found = covered[action]
        assert found.source.startswith("recorded list of torch_tensorrt 2.")
        assert [entry.name for entry in found.left] == []
        for entry in found.operators:
            assert CHECKED.get(entry.name, "") in entry.reason
            assert bool(entry.reason) == (entry.name in CHECKED)


@IN_FULL
def test_operators_are_found_in_their_regions(covered, made):
    found = covered[ROUTING[made.family].action]
    assert found.programs == ("prefill", "continuation")
    by_name = {entry.name: entry for entry in found.operators}
    attention = by_name["aten.scaled_dot_product_attention.default"]
    assert attention.calls == {"prefill": 4, "continuation": 4}
    assert attention.regions == tuple(f"layer.{i}" for i in range(4))
    kinds = {region.partition(".")[0] for entry in found.operators for region in entry.regions}
    assert kinds >= {"layer", "decision", "compact", "restore", "slots", "outside"}
    assert {region.partition(".")[0] for region in by_name["aten._softmax.default"].regions} == {"decision"}


@IN_FULL
def test_a_report_is_for_people_and_for_machines(covered, made):
    found = covered[ROUTING[made.family].action]
    text = str(found)
    assert all(entry.name in text for entry in found.operators)
    assert found.source in text
    assert "0 are left to PyTorch" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["source"] == found.source
    assert len(plain["operators"]) == len(found.operators)


class Planted(torch.nn.Module):
    """A stable sort has no converter, a gather none for symbolic sizes, and a sum has."""

    def forward(self, inputs_embeds):
        order = inputs_embeds.sort(dim=1, stable=True, descending=True).indices
        return inputs_embeds.gather(1, order).sum(1)


@pytest.fixture(scope="module")
def planted() -> ExportedProgram:
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    program = torch.export.export(Planted(), (torch.rand(3, 5),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        if "sort" in str(node.target):
            node.meta["region"] = "layer.3"
    return program


def test_a_size_of_at_most_one_is_fixed(planted):
    sizes = {("inputs_embeds", 0): Size(2, 1), ("inputs_embeds", 1): Size(7, 9)}
    given = engines._inputs(decompose(planted, sizes), Library().Input)["inputs_embeds"]
    assert (given.min_shape, given.opt_shape, given.max_shape) == ((1, 1), (1, 7), (1, 9))
    sizes["inputs_embeds", 1] = Size(2, 1)
    given = engines._inputs(decompose(planted, sizes), Library().Input)["inputs_embeds"]
    assert given.shape == (1, 1)


def test_what_has_no_converter_is_listed(planted):
    found = coverage(SimpleNamespace(programs={"prefill": SimpleNamespace(program=planted)}))
    left = {entry.name: entry for entry in found.left}
    assert left.keys() == {"aten.sort.stable", "aten.gather.default"}
    assert left["aten.sort.stable"].reason == "no converter"
    assert left["aten.sort.stable"].regions == ("layer.3",)
    assert left["aten.gather.default"].reason == "its converter does not take symbolic sizes"
    assert left["aten.gather.default"].regions == ("outside",)
    assert "2 are left to PyTorch" in str(found)


def test_a_converter_for_fixed_sizes_is_enough_for_fixed_sizes():
    fixed = torch.export.export(Planted(), (torch.rand(3, 5),))
    assert {entry.name for entry in coverage_of({"program": fixed}).left} == {"aten.sort.stable"}


def test_the_registry_of_an_installed_library_is_asked_first(planted, monkeypatch):
    class Registry:
        def get(self, node):
            return None if "gather" in str(node.target) or "sort" in str(node.target) else object()

        def get_unvalidated(self, target):
            return object() if target is torch.ops.aten.gather.default else None

    names = ["torch_tensorrt"]
    for part in ("dynamo", "conversion", "_ConverterRegistry"):
        names.append(f"{names[-1]}.{part}")
    modules = {name: ModuleType(name) for name in names}
    modules["torch_tensorrt"].__version__ = "9.8.7"
    modules[names[-1]].DYNAMO_CONVERTERS = Registry()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = coverage_of({"program": planted})
    assert found.source == "registry of the installed torch_tensorrt 9.8.7"
    assert {entry.name: entry.reason for entry in found.left} == {
        "aten.sort.stable": "no converter",
        "aten.gather.default": "its converters don't take this call",
    }


def equal_scores(count, generator):
    return torch.randint(3, (count,), generator=generator) / 2


def infinite_scores(count, generator):
    return torch.tensor([0.5, -torch.inf, torch.inf, -0.0, 0.0])[
        torch.randint(5, (count,), generator=generator)
    ]


@pytest.mark.parametrize(
    "values", [torch.rand, equal_scores, infinite_scores], ids=lambda values: values.__name__
)
@pytest.mark.parametrize("rows", SELECTIONS)
def test_selections_are_those_of_the_reference(rows, values):
    scores = (
        values
        if values is not torch.rand
        else (lambda count, generator: torch.rand(count, generator=generator))
    )
    for padding, more_slots, seed in ((0, 0, 0), (5, 0, 1), (3, 2, 2)):
        inputs = selection_inputs(SELECTIONS[rows], scores, padding, more_slots, seed=seed)
        found = select_tokens_by_counting(*inputs)
        for ours, theirs in zip(found, kernels.select_tokens_reference(*inputs), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (1, 1)])
def test_scores_are_those_of_the_reference(heads, kv_heads):
    inputs = scoring_inputs(heads, kv_heads, 23, 8, [23, 9, 1], [12, 3, 0])
    found = decompositions.visual_scores(*inputs)
    assert torch.equal(found, kernels.visual_scores_reference(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_rows_are_those_of_the_reference(dtype):
    positions = positions_of(11, [5, 0, 3], 5)
    shapes = {1: (3, 11, 4), 2: (3, 3, 11, 4)}
    tensors = [(torch.randn(shapes[dim]) * 4).to(dtype) for dim in (1, 2)]
    tensors.append((torch.randn(1, 11, 2) * 4).to(dtype))  # one row for the whole batch
    found = decompositions.compact_tokens(tensors, positions, [1, 2, 1])
    expected = kernels.compact_tokens_reference(tensors, positions, [1, 2, 1])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("active", [[5, 0, 3], [5, 5, 5], [0, 0, 0]])
def test_restored_streams_are_those_of_the_reference(active):
    positions = positions_of(11, active, 5)
    stream, rows = torch.randn(3, 11, 4), torch.randn(3, 5, 4)
    expected = kernels.restore_tokens_reference(stream, rows, positions)
    assert torch.equal(decompositions.restore_tokens(stream, rows, positions), expected)
    positions[positions > 11] = NO_TOKEN
    assert torch.equal(decompositions.restore_tokens(stream, rows, positions), expected)


@pytest.mark.parametrize("shape", [(4, 2, 9, 3), (4, 2, 9)])
def test_cache_writes_are_those_of_index_put(shape):
    row, slot = torch.arange(4)[:, None], torch.tensor([0, 6, 3, 2])[:, None] + torch.arange(3)
    cache, new = torch.randn(shape), torch.randn(4, 3, *shape[1:2], *shape[3:])
    found = decompositions._index_put(cache, [row, None, slot], new)
    assert torch.equal(found, torch.ops.aten.index_put(cache, [row, None, slot], new))


@pytest.mark.parametrize("indices", [[None, 0], [0], [None, 0, 0], ["mask", None, 0]])
def test_other_writes_stay_as_they_are(indices):
    index = {None: None, 0: torch.tensor([0, 1]), "mask": torch.tensor([True, False])}
    given = [index[i] for i in indices]
    assert decompositions._index_put(torch.zeros(2, 2, 2), given, torch.zeros(2)) is NotImplemented


def test_other_sums_stay_as_they_are():
    flags = torch.tensor([[True, False, True, True]])
    assert torch.equal(decompositions._cumsum(flags, 1), flags.cumsum(1))
    assert decompositions._cumsum(flags.float(), 1) is NotImplemented
    assert decompositions._cumsum(flags, 0) is NotImplemented


def test_a_size_that_was_fixed_is_an_error(planted, monkeypatch):
    fixed = torch.export.export(Planted(), (torch.rand(3, 5),))
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda program, table: fixed)
    with pytest.raises(CaptureError, match="fixed the input inputs_embeds to"):
        decompose(planted)


def test_a_library_that_is_missing_is_named(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=r"not installed.*pip install 'reroute-fx\[tensorrt\]'"):
        lower_tensorrt(planted)
    with pytest.raises(BackendUnavailableError, match="not installed"):
        engines.load_tensorrt(Path("none"))


def test_a_library_that_can_not_be_loaded_says_why(planted, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for line, reason in (
        ("raise Exception('no libnvinfer.so')", r"Exception: no libnvinfer.so"),
        (
            "import tensorrt_that_is_not_there",
            r"ModuleNotFoundError: No module named 'tensorrt_that_is_not_there'",
        ),
    ):
        (tmp_path / "torch_tensorrt.py").write_text(line)
        importlib.invalidate_caches()
        with pytest.raises(BackendUnavailableError, match=rf"can't be loaded \({reason}\)"):
            lower_tensorrt(planted)
    assert coverage_of({"program": planted}).source.startswith("recorded list")


def test_who_uses_it_is_warned_once_that_no_engine_was_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Library())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        with pytest.raises(BackendUnavailableError):
            engines.check_tensorrt(CUDA)
        assert not said
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for _ in range(2):
            assert isinstance(engines.check_tensorrt(CUDA), Library)
    (warning,) = said
    assert warning.category is UserWarning
    assert "experimental" in str(warning.message)
    assert "no engine of it has been built and run on a GPU yet" in str(warning.message)


def test_a_model_on_cpu_is_refused_before_anything_is_traced(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Library())
    monkeypatch.setattr(engines, "decompose", None)
    with pytest.raises(BackendUnavailableError, match="the model is on cpu; expected a CUDA device"):
        lower_tensorrt(planted)


FAKE_PACKAGE = {
    "_version.py": "__version__ = '9.9.9'\n",
    "dynamo/lowering/_decomposition_groups.py": """
torch_enabled_decompositions: Set[int] = {aten.addcmul, aten.arange.start}
torch_disabled_decompositions: Set[int] = {aten.linear.default}
""",
    "dynamo/lowering/_decompositions.py": """
replace_inplace_op(aten.add_, aten.add)
@register_torch_trt_decomposition(torch.ops.aten.silu.default, registry=TABLE)
def silu(x): ...
""",
    "dynamo/conversion/aten_ops_converters.py": """
@dynamo_tensorrt_converter(torch.ops.aten.gather.default)
@dynamo_tensorrt_converter(
    operator.add, supports_dynamic_shapes=True, capability_validator=lambda n, s: True
)
@enforce_tensor_types({0: (int,)})
def convert(): ...
if FEATURES.later:
    @dynamo_tensorrt_converter(torch.ops.aten.nonzero.default, requires_output_allocator=True)
    def convert_later(): ...
""",
}


def load_recorder():
    spec = importlib.util.spec_from_file_location("record_converters", RECORDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorder_reads_what_a_package_registers(tmp_path):
    for name, source in FAKE_PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    recorded = load_recorder().record(tmp_path, "2000-01-01")
    file = "dynamo/conversion/aten_ops_converters.py"
    plain = {
        "target": "aten.gather.default",
        "supports_dynamic_shapes": False,
        "requires_output_allocator": False,
        "validator": "",
        "only_if": "",
        "file": file,
    }
    assert recorded["converters"] == [
        plain,
        {
            **plain,
            "target": "operator.add",
            "supports_dynamic_shapes": True,
            "validator": "lambda n, s: True",
        },
        {
            **plain,
            "target": "aten.nonzero.default",
            "requires_output_allocator": True,
            "only_if": "FEATURES.later",
        },
    ]
    assert (recorded["version"], recorded["recorded"]) == ("9.9.9", "2000-01-01")
    assert recorded["decompositions"] == {
        "torch": ["aten.addcmul", "aten.arange.start"],
        "kept": ["aten.linear.default"],
        "own": ["aten.add_", "aten.silu.default"],
    }


def test_the_recorder_refuses_what_is_no_package(tmp_path):
    recorder = load_recorder()
    with pytest.raises(SystemExit, match="has no folder dynamo"):
        recorder.record(tmp_path, "2000-01-01")
    (tmp_path / "dynamo").mkdir()
    with pytest.raises(SystemExit, match="registers no converter"):
        recorder.record(tmp_path, "2000-01-01")


def test_the_recorded_list_is_of_a_release_and_names_operators_that_torch_has():
    recorded = decompositions.load_recorded()
    assert {"source", "version", "recorded", "converters", "decompositions"} == recorded.keys()
    assert len(recorded["converters"]) > 200
    names = {entry["target"] for entry in recorded["converters"] if entry["target"].startswith("aten.")}
    known = [name for name in names if decompositions.find_operator(name) is not None]
    assert len(known) == len(names)


def test_conditions_of_a_converter_are_told():
    entry = {
        "target": "aten.nonzero.default",
        "supports_dynamic_shapes": True,
        "requires_output_allocator": True,
        "validator": "some_validator",
        "only_if": "FEATURES.later",
    }
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.nonzero.default, (graph.placeholder("x"),))
    found = engine_coverage._Recorded([entry]).support(node)
    assert found.is_converted
    assert found.reason == (
        "only if FEATURES.later; validated by Torch-TensorRT at conversion: some_validator; needs an output allocator"
    )


def no_library():
    """Why the real library can't be used here; empty if it can."""
    try:
        engines.check_tensorrt(CUDA)
    except BackendUnavailableError as error:
        return str(error)
    return ""


@pytest.mark.tensorrt
@pytest.mark.skipif(no_library() != "", reason=no_library())
@pytest.mark.parametrize("rows", BATCHES)
@torch.no_grad()
def test_engines_compute_what_the_program_computes(family, rows, tmp_path):
    model, config = copy.deepcopy(unrouted_model(family)).cuda(), ROUTING[family]
    routed = reroute_fx.compile(model, config=config, backend="eager")
    for name, executable in routed.programs.items():
        engines.save_tensorrt(lower_tensorrt(executable.program, name, LIMITS), tmp_path / name)
    loaded = {name: engines.load_tensorrt(tmp_path / name) for name in routed.programs}
    on_engines = with_programs(model, routed, loaded)
    inputs = {name: tensor.cuda() for name, tensor in batch(family, *BATCHES[rows]).items()}
    expected, found = routed(**inputs), on_engines(**inputs)
    for layer in config.decision_layers:
        for ours, theirs in zip(found.routing.selected[layer], expected.routing.selected[layer], strict=True):
            assert torch.equal(ours, theirs)
    is_token = inputs["attention_mask"].bool()
    assert (found.logits - expected.logits)[is_token].abs().max() < NOISE
    steps = [forward_and_steps(given, inputs, [9, 10, 11])[:, -3:] for given in (on_engines, routed)]
    assert (steps[0] - steps[1]).abs().max() < NOISE
