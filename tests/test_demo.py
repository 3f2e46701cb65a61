"""The page: what its buttons do, through gradio's client as another program would use it, and in a browser."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from uae_jax import demo  # noqa: E402
from uae_jax.command_line import CommandParser  # noqa: E402
from uae_jax.data import scenes  # noqa: E402
from uae_jax.evaluation.similarities import Similarities  # noqa: E402
from uae_jax.stages.weights import BUILTIN  # noqa: E402

FLAGS = ["--steps", "2", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def model():
    parser = CommandParser()
    demo.add_arguments(parser)
    return demo.load_model(parser.parse_args(FLAGS), inputs=1)


@pytest.fixture(scope="module")
def page(model):
    return demo.Page(model, Similarities(model))


@pytest.fixture(scope="module")
def address(page):
    """Where the page is served."""
    blocks = demo.build(page, "built-in")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=demo.STYLE, server_name="127.0.0.1")
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(scenes.draw(scenes.scene_at("test", 0)))


def test_similarities_are_those_of_the_encoders(model, picture):
    compare = Similarities(model)
    same, other = compare(picture, picture), compare(picture, np.zeros((40, 50, 3), np.uint8))
    assert set(same) == {"clip", "dinov2"} and all(value == pytest.approx(1, abs=1e-5) for value in same.values())
    assert all(-1 <= value < 0.99 for value in other.values())
    again = Similarities(model, {"longclip": BUILTIN / "clip", "dinov2": BUILTIN / "dinov2"})
    assert list(again.encoders) == ["longclip", "dinov2", "clip"]
    found = again(picture, np.zeros((40, 50, 3), np.uint8))
    assert found["dinov2"] == pytest.approx(other["dinov2"], abs=1e-6)
    with pytest.raises(ValueError, match="--dinov3=.*clip holds a clip model"):
        Similarities(model, {"dinov3": BUILTIN / "clip"})


def test_the_page_captions_draws_and_compares(page, model, picture):
    text, drawn, rows = page.reconstruct(picture, 3)
    result = model.reconstruct([picture], sample_ids=[3])[0]
    assert text == result.caption and drawn.tobytes() == result.image.tobytes()
    assert [name for name, _ in rows] == ["clip", "dinov2"]
    edited, _ = page.draw(picture, "large red circle", 3)
    assert edited.tobytes() != drawn.tobytes() and page.draw(None, "large red circle", 3)[1] == []
    with pytest.raises(ValueError, match="choose an image first"):
        page.caption(None, 0)
    with pytest.raises(ValueError, match="write a text first"):
        page.draw(picture, "  ", 0)


def test_another_program_can_use_the_page(address, page, picture, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False, download_files=str(tmp_path))
    file = tmp_path / "scene.png"
    picture.save(file)
    text, drawn, table = client.predict(handle_file(file), 3, api_name="/reconstruct")
    expected_text, expected, rows = page.reconstruct(picture, 3)
    assert text == expected_text and Image.open(drawn).convert("RGB").tobytes() == expected.tobytes()
    assert table["headers"] == list(demo.HEADERS) and table["data"] == rows
    shown = Image.open(client.predict(0, api_name="/scene"))
    assert shown.convert("RGB").tobytes() == picture.tobytes()
    with pytest.raises(AppError, match="longer than 12 tokens"):
        client.predict(None, "red " * 13, 0, api_name="/draw")


def test_wrong_flags_are_one_line():
    with pytest.raises(SystemExit, match="error: .*dit holds no `llm` folder"):
        demo.main(["--checkpoint", str(BUILTIN / "dit")])
    with pytest.raises(SystemExit, match="error: --clip=.*dinov2 holds a dinov2 model"):
        demo.main([*FLAGS, "--clip", str(BUILTIN / "dinov2")])


@pytest.mark.slow
def test_the_page_works_in_a_browser(address, picture, tmp_path):
    """A picture is uploaded, captioned, redrawn and compared; the caption is edited and drawn again; an error is
    shown.
    """
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser_path, "this test drives a real browser: install chromium or google-chrome"
    from playwright.sync_api import expect, sync_playwright

    file = tmp_path / "scene.png"
    picture.save(file)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1200, height=1000))
        problems = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(address)
        tab.click("#write")
        expect(tab.get_by_text("choose an image first")).to_be_visible(timeout=60_000)
        tab.set_input_files("#picture input[type=file]", file)
        expect(tab.locator("#picture img")).to_be_visible(timeout=30_000)
        tab.click("#both")
        expect(tab.locator("#drawn img")).to_be_visible(timeout=60_000)
        said = tab.locator("#caption textarea").input_value()
        assert said and set(said.split()) & {"circle", "square", "triangle", "cross", "background"}
        for name in ("clip", "dinov2"):
            expect(tab.get_by_role("gridcell", name=name)).to_be_visible()
        first = tab.locator("#drawn img").get_attribute("src")
        tab.screenshot(path=tmp_path / "page.png", full_page=True)
        tab.fill("#caption textarea", "large red circle")
        tab.click("#draw")
        expect(tab.locator("#drawn img")).not_to_have_attribute("src", first, timeout=60_000)
        tab.click("#show")
        expect(tab.locator("#picture img")).to_be_visible(timeout=30_000)
        assert not problems
        browser.close()
