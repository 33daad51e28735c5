"""The README and the pages of `docs/`: every block of code is run or says why not, and what they list is there.

The small model of the demo stands in for weights that can't be downloaded, and models are compiled for `eager` where a
page doesn't say for what.
"""

import logging
import os
import re
import shlex
from pathlib import Path
from unittest import SkipTest

import pytest
import transformers
from suite_tiers import share
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from test_rooms import FLOORS
from typer.testing import CliRunner

import reroute_fx
from reroute_fx import methods, passes
from reroute_fx.command_line.main import app
from reroute_fx.grounding.scenes import scene
from reroute_fx.loading.models_by_name import CHECKPOINT, load_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
START = DOCS / "index.md"
OTHERS = sorted({*DOCS.glob("*.md"), *ROOT.glob("*.md")} - {START})
SLOW = {"choosing.md", "command_line.md", "evaluation.md", "pictures.md", "profile.md"}
NAMED = "llava-hf/llava-1.5-7b-hf"
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))


def run_shell(example):
    """Commands of the project, in this process."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True) or [None]
        if command is None:
            continue
        assert command == "reroute-fx", f"{line!r} is not run here; say why in front of the block"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"


def refuse(example):
    raise AssertionError("a block of this language is not run; say why in front of it")


EVALUATORS = {"python": PythonEvaluator(), "sh": run_shell}


def code_blocks(document):
    """Every fenced block, whatever its language."""
    for region in FENCES(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = EVALUATORS.get(region.lexemes["language"].strip(), refuse)
        yield region


def run_page(path, namespace):
    """Run the blocks of a page, one after the other, on the names in `namespace`; how many were run and excused."""
    document = Sybil([SkipParser(), code_blocks], path=str(path.parent)).parse(path)
    document.namespace.update(namespace)
    run, excused = 0, 0
    for example in document.examples():
        if isinstance(example.parsed, tuple):
            action, reason = example.parsed
            assert action == "next", f"{path}:{example.line}: excuse each block by itself"
            assert reason, f"{path}:{example.line}: a block is excused without a reason"
            example.evaluate()
            continue
        try:
            example.evaluate()
            run += 1
        except SkipTest:
            excused += 1
    return document.namespace, run, excused


@pytest.fixture(scope="module")
def stand_ins():
    """What is downloaded is the model of the demo."""
    loaded = load_model("demo", "cpu", "float32")
    read_config = transformers.AutoConfig.from_pretrained

    def stand_in(thing):
        def from_pretrained(pretrained_model_name_or_path, **_):
            assert str(pretrained_model_name_or_path) in (NAMED, str(CHECKPOINT))
            return thing

        return from_pretrained

    def config_of(pretrained_model_name_or_path, **options):
        name = CHECKPOINT if pretrained_model_name_or_path == NAMED else pretrained_model_name_or_path
        return read_config(name, **options)

    compiled = reroute_fx.compile
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LlavaForConditionalGeneration", "AutoModelForImageTextToText"):
            patch.setattr(getattr(transformers, name), "from_pretrained", stand_in(loaded.model))
        patch.setattr(transformers.AutoProcessor, "from_pretrained", stand_in(loaded.processor))
        patch.setattr(transformers.AutoConfig, "from_pretrained", config_of)
        patch.setattr(reroute_fx, "compile", lambda *a, **k: compiled(*a, **{"backend": "eager", **k}))
        yield


@pytest.fixture(scope="module")
def start_page(stand_ins, tmp_path_factory):
    """What the first page leaves for the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(with_pictures(tmp_path_factory.mktemp("start")))
        return run_page(START, {})


@pytest.fixture
def a_desk(tmp_path, monkeypatch):
    """A folder with pictures to work in; what pages change in the process is undone."""
    monkeypatch.chdir(with_pictures(tmp_path))
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    before, root, ours = dict(os.environ), logging.getLogger(), logging.getLogger("reroute_fx")
    handlers, level = list(root.handlers), ours.level
    yield
    os.environ.clear()
    os.environ.update(before)
    root.handlers[:] = handlers
    ours.setLevel(level)


def with_pictures(folder):
    for number, name in enumerate(("cat", "dog")):
        scene("demo", number).picture.save(folder / f"{name}.jpg")
    return folder


def test_the_first_page_runs(start_page):
    names, run, excused = start_page
    assert (run, excused) == (2, 2)
    assert {"model", "processor", "routed", "prompt", "inputs", "torch", "reroute_fx"} <= names.keys()


@pytest.mark.parametrize(
    "page",
    share(
        [pytest.param(page, id=page.name) for page in OTHERS],
        [page.name for page in OTHERS if page.name not in SLOW],
        "10 s to 20 s each",
    ),
)
@pytest.mark.usefixtures("a_desk", "stand_ins")
def test_every_block_is_run_or_says_why_not(page, start_page):
    given = {} if page.name == "README.md" else start_page[0]
    _, run, excused = run_page(page, given)
    assert run + excused == len(re.findall(r"^```\w+$", page.read_text(), re.M))


@pytest.mark.parametrize(
    "block",
    [
        "```\nno language\n```\n",
        '```json\n{"x": 1}\n```\n',
        "```sh\nrm -rf folder\n```\n",
        "```sh\nreroute-fx prune\n```\n",
        "<!-- skip: next -->\n\n```sh\nmake demo\n```\n",
        "```python\nassert 1 + 1 == 3\n```\n",
    ],
)
def test_a_block_that_is_neither_run_nor_excused_is_found(block, tmp_path):
    (tmp_path / "page.md").write_text(block)
    with pytest.raises(AssertionError):
        run_page(tmp_path / "page.md", {})


def test_a_block_is_excused_by_a_reason(tmp_path):
    (tmp_path / "page.md").write_text('<!-- skip: next "no time" -->\n\n```sh\nmake demo\n```\n')
    assert run_page(tmp_path / "page.md", {})[1:] == (0, 1)


def test_the_architecture_has_every_floor_and_every_pass():
    page = (DOCS / "architecture.md").read_text()
    picture = page[page.index('<div class="floors"') : page.index("</section>\n</div>")]
    floors = [set(re.findall("<b>(.+?)</b>", floor)) for floor in picture.split("<div>")[1:]]
    assert floors == [set(names) for names in FLOORS]
    of_the_package = [
        step for step in passes.Pass.__subclasses__() if step.__module__.startswith("reroute_fx.")
    ]
    assert {
        step.__name__ for step in of_the_package if f"| [`{step.__name__}`](../passes/" not in page
    } == set()


def test_troubleshooting_and_the_reference_have_every_public_name():
    errors = {name for name in reroute_fx.__all__ if name.endswith("Error")} - {"RerouteError"}
    page = (DOCS / "troubleshooting.md").read_text()
    assert {name for name in errors if f"\n### `{name}`\n" not in page} == set()
    reference = (DOCS / "api.md").read_text().splitlines()
    public = set(reroute_fx.__all__) - {"passes", "kernels"}
    assert {name for name in public if f"::: reroute_fx.{name}" not in reference} == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
