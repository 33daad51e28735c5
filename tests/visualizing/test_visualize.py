"""What a person sees: a PNG for each prompt, and a page that steps through the stages in a real browser."""

import re
import subprocess

import numpy as np
import pytest
import torch
from chromium import BROWSER, needs_browser
from PIL import Image
from tiny_models import collate, llava_image, make_row, tiny_llava

import reroute_fx
from reroute_fx.errors import ConfigError, InputError


class Reader:
    """Answers every prompt with a box."""

    image_processor = None

    def batch_decode(self, tokens, skip_special_tokens):
        prompts = tokens.shape[1] > 8
        return ["Where is <it> & $why_$?" if prompts else " It is at [0.25, 0.25, 0.75, 0.75]."] * len(tokens)


@pytest.fixture(scope="module")
def routed():
    return reroute_fx.compile(tiny_llava(), 0.5, backend="eager")


@pytest.fixture(scope="module")
def inputs(routed):
    random = torch.Generator().manual_seed(3)
    rows = [
        make_row(random, [2] * count + [3], [llava_image(random) for _ in range(count)]) for count in (1, 2)
    ]
    return collate(routed, rows)


@pytest.fixture(scope="module")
def page(routed, inputs, tmp_path_factory):
    return routed.visualize(inputs, tmp_path_factory.mktemp("pictures") / "new", Reader(), max_new_tokens=8)


def test_a_picture_for_each_prompt(page):
    assert page.name == "index.html"
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"index.html", "prompt-0.png", "prompt-1.png"}
    with Image.open(page.parent / "prompt-0.png") as one, Image.open(page.parent / "prompt-1.png") as two:
        assert two.height > 1.5 * one.height  # two pictures
        colours = np.asarray(one.convert("RGB")).reshape(-1, 3)
        green, pink = (0, 200, 83), (255, 47, 214)
        assert min((colours == colour).all(1).sum() for colour in (green, pink)) > 50


@pytest.mark.full("5 s")
def test_unknown_answers_are_left_out(routed, inputs, tmp_path):
    text = routed.visualize(inputs, tmp_path).read_text()
    assert "Answer:" not in text
    assert 'class="step"' in text


def open_page(page, step, *options):
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *options,
        f"{page.as_uri()}#step-{step}",
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.full("20 s in a browser; what the page is made of is tested in the gate")
@needs_browser
def test_the_page_steps_through_the_stages(page, routed, tmp_path):
    shots = []
    stages = len(routed.routing_config.decision_layers)
    for step in range(stages + 1):
        document = open_page(page, step, "--dump-dom")
        assert document.count(f'data-step="{step}"') == 2
        visible = re.findall(r'<div class="step">\s*<p><span class="name">(.*?)</span>(.*?)</p>', document)
        assert len(visible) == 2
        layers = routed.routing_config.decision_layers
        expected = "the picture and the answer" if step == 0 else f"layers {layers[step - 1]} to "
        assert all(name.startswith(expected) for name, _ in visible)
        assert all("kept" in counts for _, counts in visible) == (step > 0)
        open_page(page, step, f"--screenshot={tmp_path / f'{step}.png'}", "--window-size=1000,900")
        with Image.open(tmp_path / f"{step}.png") as shot:
            shots.append(np.asarray(shot.convert("RGB")))
            assert len(np.unique(shots[-1].reshape(-1, 3), axis=0)) > 200
    for i, one in enumerate(shots):
        assert all((one != other).mean() > 0.005 for other in shots[:i])


@needs_browser
def test_the_page_says_what_was_asked_and_answered(page):
    document = open_page(page, 0, "--dump-dom")
    assert "<q>Where is &lt;it&gt; &amp; $why_$?</q>" in document
    assert "<strong>It is at [0.25, 0.25, 0.75, 0.75].</strong>" in document
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", document)  # one file, nothing to load


def test_refusals_before_anything_is_written(routed, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file; expected a folder"):
        routed.visualize(inputs, tmp_path / "file")
    random = torch.Generator().manual_seed(3)
    rows = [make_row(random, [2, 3], [llava_image(random)]), make_row(random, [4], [])]
    with pytest.raises(InputError, match=r"Rows \[1\] have no picture"):
        routed.visualize(collate(routed, rows), tmp_path / "new")
    unrouted = reroute_fx.compile(tiny_llava(), method="none", backend="eager")
    with pytest.raises(ConfigError, match="method is 'none', which routes nothing"):
        reroute_fx.visualize(unrouted, inputs, tmp_path / "new")
    assert not (tmp_path / "new").exists()
