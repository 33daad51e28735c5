"""Task files for lmms-eval: all that a task names is there, and its data are the questions of the study."""

import ast
import inspect
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

import reroute_fx
from reroute_fx.errors import ConfigError, InputError
from reroute_fx.evals.tasks import SHAPES_REFER, SHAPES_YES_NO, paper_tasks, write_tasks
from reroute_fx.grounding.questions import collect
from reroute_fx.grounding.scenes import SIDE

COUNT = 5


class TaskLoader(yaml.SafeLoader):
    """As lmms-eval reads task files; functions stay names."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "new"
    names = write_tasks(folder, COUNT, seed=1)
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(names)
    return folder


def rows(folder, name):
    """The rows that a task's file leads to, read from where it says."""
    task = yaml.load((folder / f"{name}.yaml").read_text(), TaskLoader)
    files = task["dataset_kwargs"]["data_files"]
    return datasets.load_dataset(task["dataset_path"], data_files=files, split=task["test_split"])


def functions_offered():
    """Names in `task_functions`, which imports lmms-eval and so is read as text."""
    source = (Path(inspect.getfile(reroute_fx)).parent / "evals" / "task_functions.py").read_text()
    (offered,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return set(ast.literal_eval(offered))


def test_every_function_that_a_task_names_is_there(folder):
    offered, named = functions_offered(), set()
    for path in folder.glob("*.yaml"):
        task = yaml.load(path.read_text(), TaskLoader)
        assert task["task"] == path.stem
        assert task["output_type"] == "generate_until"
        aggregations = [metric["aggregation"] for metric in task["metric_list"]]
        calls = [value for value in task.values() if str(value).startswith("utils.")]
        named |= {name.removeprefix("utils.") for name in [*aggregations, *calls]}
    assert named == offered
    assert "reroute_fx.evals.task_functions" in (folder / "utils.py").read_text()


def test_referring_expressions_are_the_study_s(folder):
    found = rows(folder, SHAPES_REFER)
    for row, (here, question) in zip(found, collect("test", 1, COUNT, "refer"), strict=True):
        assert question.text == f"Where is the {row['answer'][0]}?"
        x, y, width, height = row["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx([value * SIDE for value in question.box])
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(here.picture))


def test_yes_no_questions_are_the_study_s(folder):
    found = rows(folder, SHAPES_YES_NO)
    for row, (here, question) in zip(found, collect("test", 1, COUNT, "yes/no"), strict=True):
        assert (row["question"], row["answer"]) == (question.text, question.answer)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(here.picture))


def test_families_have_tasks_of_their_own(folder):
    """lmms-eval's where boxes are asked for as it does, ours where not; twelve in the paper's table."""
    written = {path.stem for path in folder.glob("*.yaml")}
    for family, own in (("llava", 0), ("qwen2_5_vl", 8), ("qwen3_vl", 8)):
        assert len(paper_tasks(family)) == 12
        assert len(written & set(paper_tasks(family))) == own
    with pytest.raises(ConfigError, match="family is 'gemma'; expected one of"):
        paper_tasks("gemma")


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"folder is .*, a file"):
        write_tasks(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "mine"
