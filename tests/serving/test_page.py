"""The page at `/` in a real browser: a picture in, a streamed answer and the kept tokens out."""

import os

import pytest
import serving_models as served
from chromium import browser, needs_browser

SCREENS = {"desk": (1200, 900), "phone": (360, 740)}


@pytest.mark.full("a browser takes seconds; the gate reads the page")
@needs_browser
def test_a_picture_in_and_an_answer_out(tmp_path):
    path = tmp_path / "picture.png"
    served.picture(1, (64, 64)).save(path)
    with served.running() as (_, port), browser(tmp_path / "profile") as page:
        page.call("Page.enable")
        page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        page.wait("document.querySelectorAll('#tier option').length === 2")
        page.choose_file("#picture", path)
        page.evaluate("$('question').value = 'Is it?'; $('tier').value = '64'; $('tokens').value = 10")
        page.evaluate("$('ask').click()")
        page.wait("'done' in document.body.dataset")
        ids = served.alone(served.prompt("Is it?", served.picture(1, (64, 64))), "64", 10)
        answer = page.evaluate("$('answer').textContent")
        assert answer == served.processor().tokenizer.decode(ids, skip_special_tokens=True)
        assert page.evaluate("$('error').textContent") == ""
        captions = page.evaluate("[...document.querySelectorAll('figcaption')].map(each => each.textContent)")
        assert captions == ["before layer 1: 4 of 16"]
        # A token that waits is dark: 12 of 16.
        dark = page.evaluate(
            "(() => { const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += Math.max(d[i], d[i + 1], d[i + 2]) "
            "< 70; return n / (d.length / 4); })()"
        )
        assert 0.6 < dark < 0.85
        for name, (width, height) in SCREENS.items():
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(tmp_path / f"{name}.png")
            if "SCREENSHOTS" in os.environ:
                page.screenshot(type(tmp_path)(os.environ["SCREENSHOTS"]) / f"{name}.png")
        path.write_bytes(b"no picture")
        page.choose_file("#picture", path)
        page.evaluate("$('ask').click()")
        page.wait("$('error').textContent !== ''")
        assert page.evaluate("$('error').textContent") == "The picture can't be read."


def test_the_page_loads_nothing_from_elsewhere():
    text = (served.PAGE).read_text()
    assert "http" not in text
    assert "innerHTML" not in text
