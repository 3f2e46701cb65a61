"""The report and the page of pairs in a real browser: on a phone and on a desk, light and dark."""

import json
import os
import pathlib

import numpy as np
import pytest
from browsers import tab
from PIL import Image

from runs import make_run
from uae_jax import evaluate
from uae_jax.stages.weights import BUILTIN
from uae_jax.training.report import write_report

LONG = "a red circle , top left small green square , " * 20
WIDER = "() => document.documentElement.scrollWidth"
# texts whose own box is so narrow that a word would be one letter a line
NARROW = """() => [...document.querySelectorAll('td, p, blockquote, figcaption, li')].filter(
  e => e.innerText.trim().length > 12 && e.offsetParent && e.clientWidth > 0 && e.clientWidth < 60).map(
  e => e.innerText)"""
COVERED = """() => [...document.querySelectorAll('.loop > *')].map(e => e.getBoundingClientRect()).flatMap(
  (a, i, all) => all.slice(i + 1).filter(b => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 &&
  b.top < a.bottom - 1)).length"""
# words that stand on two lines; a hyphen may end one
BROKEN = """() => [...document.querySelectorAll('td, th, p, b, small')].flatMap(e => [...e.childNodes]).filter(
  n => n.nodeType === 3).flatMap(n => [...n.data.matchAll(/[^\\s-]+/g)].filter(word => {
  const range = document.createRange(); range.setStart(n, word.index); range.setEnd(n, word.index + word[0].length);
  return new Set([...range.getClientRects()].map(b => b.top)).size > 1 }).map(word => word[0]))"""
GROUND = "() => getComputedStyle(document.body).backgroundColor"


def keep(page, name):
    """A screenshot for a person, where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=pathlib.Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of four stages with long captions."""
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir)
    for path in (workdir / "samples").glob("*_after/samples.json"):
        samples = json.loads(path.read_text())
        path.write_text(json.dumps([{**samples[0], "caption": LONG}]))
    return write_report(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_can_be_read(report, width, scheme):
    with tab(width, scheme=scheme) as page:
        page.goto(report.as_uri())
        keep(page, f"report_{width}_{scheme}")
        assert page.evaluate(WIDER) <= width
        assert page.evaluate(NARROW) == [] and page.evaluate(COVERED) == 0 and page.evaluate(BROKEN) == []
        ground = [int(part) for part in page.evaluate(GROUND).strip("rgb()").split(",")]
        assert (np.mean(ground) > 200) == (scheme == "light")
        shown = page.locator(".curves img").first.evaluate("image => image.currentSrc")
        light = page.locator(".curves img").first.get_attribute("src")
        assert (shown == light) == (scheme == "light")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_of_pairs_can_be_read(width, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("ref", "gen"):
        (tmp_path / folder).mkdir()
        for index in range(3):
            image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
            image.save(tmp_path / folder / f"a_file_with_a_name_that_is_longer_than_most_{index}.png")
    flags = {f"{folder}_dir": tmp_path / folder for folder in ("ref", "gen")}
    flags |= dict(output=tmp_path / "scores.json", clip=BUILTIN / "clip")
    evaluate.main(["unified_bench", *(f"--{name}={value}" for name, value in flags.items())])
    with tab(width) as page:
        page.goto((tmp_path / "report.html").as_uri())
        keep(page, f"bench_{width}")
        assert page.evaluate(WIDER) <= width and page.evaluate(NARROW) == []


def test_narrow_screens_have_a_layout_of_their_own(report):
    """The quick sibling of the browser: cells say what they are once the heading is gone, and wide tables scroll."""
    page = report.read_text()
    assert "@media (max-width: 760px)" in page and "prefers-color-scheme: dark" in page
    assert page.count("data-label=") == 4 * 4 + 1 + 5 and page.count('class="wide"') == 1
    assert 'name="viewport"' in page and "overflow-x: auto" in page
