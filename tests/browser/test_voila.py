"""A lesson as an app: ``voila notebooks/03…`` shows its text and live figures, and no code."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Error

from tests.browser.lab import find_chromium

if not importlib.util.find_spec("voila"):
    pytest.skip("voila is not installed", allow_module_level=True)
if not find_chromium() and not os.environ.get("CI"):
    pytest.skip("no Chromium: install it, or name it in QLAB_CHROMIUM", allow_module_level=True)

pytestmark = pytest.mark.long
LESSON = Path(__file__).parents[2] / "notebooks" / "03_clipping_and_calibration.ipynb"


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """As far as the first figure and the answer to the questions about it."""
    notebook = nbformat.read(LESSON, as_version=4)
    first = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("live = clipping("))
    notebook.cells = notebook.cells[:first + 4]
    path = tmp_path_factory.mktemp("app") / LESSON.name
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def app(lesson, browser, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("voila") / "log"
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-m", "voila", lesson, "--no-browser", "--Voila.ip=127.0.0.1",
                                   f"--port={port}"], stdout=file, stderr=subprocess.STDOUT)
    page = browser.new_page()
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(Error):
                page.goto(f"http://127.0.0.1:{port}/", timeout=180_000)
                break
            time.sleep(0.1)
        page.locator(".jupyter-widgets img").first.wait_for(timeout=120_000)
        yield page
    finally:
        page.close()
        server.terminate()
        server.wait(20)


def test_the_figures_are_live(app):
    image = app.locator(".jupyter-widgets img").first.element_handle()
    before = image.get_attribute("src")
    app.locator(".noUi-handle").nth(1).press("ArrowLeft")
    app.wait_for_function("([image, before]) => image.src !== before", arg=[image, before], timeout=30_000)


def test_there_is_text_and_no_code(app, lesson):
    shown = app.inner_text("body")
    assert "Move the range" in shown
    assert "your code here" not in shown
    assert "exercises.check" not in shown
    assert app.locator("details").count() == lesson.read_text().count("<details>") > 0
