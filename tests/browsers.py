"""A real browser for the tests of pages."""

import contextlib
import os
import shutil


def chromium() -> str:
    """The program of an installed browser, or the one that CHROMIUM names."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    assert found, "this test drives a real browser: install chromium or google-chrome"
    return found


@contextlib.contextmanager
def tab(width: int, height: int = 900, scheme: str = "light"):
    """A page of a browser window of this size, for a light or a dark screen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
        browser.close()
