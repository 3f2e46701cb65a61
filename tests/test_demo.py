"""The page: what its buttons do, through gradio's client as another program would use it, and in a browser."""

import os
import socket

import numpy as np
import pytest
from browsers import tab
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from uae_jax import demo  # noqa: E402
from uae_jax.command_line import CommandParser  # noqa: E402
from uae_jax.data import scenes  # noqa: E402
from uae_jax.evaluation.similarities import Similarities  # noqa: E402
from uae_jax.stages.weights import BUILTIN  # noqa: E402

FLAGS = ["--checkpoint", "start", "--steps", "2", "--max_new_tokens", "12"]


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


@pytest.mark.slow
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
        demo.main(["--port", "0", "--checkpoint", str(BUILTIN / "dit")])
    with pytest.raises(SystemExit, match="error: --clip=.*dinov2 holds a dinov2 model"):
        demo.main([*FLAGS, "--port", "0", "--clip", str(BUILTIN / "dinov2")])


@pytest.mark.slow
def test_the_page_works_in_a_browser(address, picture, tmp_path):
    """A picture is uploaded, captioned, redrawn and compared; the caption is edited and drawn again; an error is
    shown.
    """
    from playwright.sync_api import expect

    file = tmp_path / "scene.png"
    picture.save(file)
    with tab(1200, 1000) as page:
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.click("#write")
        expect(page.get_by_text("choose an image first")).to_be_visible(timeout=60_000)
        page.set_input_files("#picture input[type=file]", file)
        expect(page.locator("#picture img")).to_be_visible(timeout=30_000)
        page.click("#both")
        expect(page.locator("#drawn img")).to_be_visible(timeout=60_000)
        said = page.locator("#caption textarea").input_value()
        assert said and set(said.split()) & {"circle", "square", "triangle", "cross", "background"}
        for name in ("clip", "dinov2"):
            expect(page.get_by_role("gridcell", name=name)).to_be_visible()
        first = page.locator("#drawn img").get_attribute("src")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.fill("#caption textarea", "large red circle")
        page.click("#draw")
        expect(page.locator("#drawn img")).not_to_have_attribute("src", first, timeout=60_000)
        page.click("#show")
        expect(page.locator("#picture img")).to_be_visible(timeout=30_000)
        assert not problems


@pytest.mark.slow
def test_buttons_are_in_reach_on_a_phone(address, picture):
    with tab(390, 844) as page:
        page.goto(address)
        box = page.locator("#both").bounding_box(timeout=60_000)
        assert box and box["y"] + box["height"] < 844 and box["height"] >= 40
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        page.locator(".gallery-item, .gallery button, tr.tr-body").first.click()
        page.locator("#picture img").wait_for(timeout=30_000)


def test_a_port_in_use_is_said_before_a_model_is_read(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"error: cannot serve at 127.0.0.1:{port} .*; choose another --port"):
            demo.main(["--port", str(port), "--checkpoint", str(tmp_path / "no_model")])


def test_the_start_model_is_named_and_stands_beside_the_trained_one(page, model, picture):
    assert "not trained yet" in model.warning and not page.compares
    with pytest.raises(ValueError, match="has none from before its training"):
        page.before(picture, 0)
    both = demo.Page(model, page.similarities, lambda: model)
    text, drawn = both.before(picture, 3)
    assert text == f"not trained yet: {model.caption([picture], sample_ids=[3])[0]}"
    assert drawn.tobytes() == model.reconstruct([picture], sample_ids=[3])[0].image.tobytes()
    blocks = demo.build(both, "built-in")
    names = {function.api_name for function in blocks.fns.values()}
    assert {"scene", "caption", "draw", "reconstruct", "before"} <= names
