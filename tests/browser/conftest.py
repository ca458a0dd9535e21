"""One browser and one JupyterLab for all browser tests of a worker: to start both costs as much as ten tests."""

import pytest

from tests.browser.lab import Desk, chromium, find_chromium, jupyterlab


@pytest.fixture(scope="package")
def browser():
    """A browser's context, for pages of one's own."""
    if not find_chromium():
        pytest.fail("no Chromium, and CI must not skip these tests")
    with chromium(height=1400) as page:
        yield page.context


@pytest.fixture(scope="package")
def desk(browser, tmp_path_factory):
    """A JupyterLab, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "1")  # ipywidgets' sets of traits come in an order that used to matter
        with jupyterlab(folder) as address:
            yield Desk(browser.pages[0], address, folder)
