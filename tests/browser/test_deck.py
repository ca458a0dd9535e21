"""Every slide of ``jupyter nbconvert --to slides`` fits, with its folded answers open; none is for the desk.

reveal.js and MathJax come from a network that tests do not have. Neither is needed for the measure: a slide is a
<section> of a fixed width, and reveal.js scales all of them alike. Formulas are measured as their TeX; what MathJax
makes of one was up to 58 pixels higher.
"""

import os
import re
from pathlib import Path

import pytest
from nbconvert import SlidesExporter

from tests.browser.lab import find_chromium

if not find_chromium() and not os.environ.get("CI"):
    pytest.skip("no Chromium: install it, or name it in QLAB_CHROMIUM", allow_module_level=True)

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WIDTH, HEIGHT = 1400, 788  # what the README gives to nbconvert
MARGIN, FORMULA = 20, 60
THEME = """section section { width: 1400px; line-height: 1.3; } h1, h2, h3 { margin: 0 0 20px; line-height: 1.2; }
.reveal h1 { font-size: 3.77em; } .reveal h2 { font-size: 2.11em; } .reveal h3 { font-size: 1.55em; }
.reveal p { margin: 20px 0; line-height: 1.3; } .reveal table td, .reveal table th { padding: 0.2em 0.5em; }
.reveal pre { margin: 20px auto; line-height: 1.2em; }
.reveal section img { margin: 20px 0; max-width: 95%; max-height: 95%; }"""
MEASURE = """() => { document.querySelectorAll('details').forEach(folded => folded.open = true);
  return Array.from(document.querySelectorAll('section section')).map(slide => ({
    height: slide.scrollHeight, formula: slide.textContent.includes('$$'),
    hidden: Math.max(0, ...Array.from(slide.querySelectorAll('pre, table, img'),
      part => part.scrollWidth - part.clientWidth)),
    missing: Array.from(slide.querySelectorAll('img')).filter(image => !image.naturalWidth).length,
    text: slide.innerText.trim().slice(0, 60) })); }"""


@pytest.fixture(scope="module")
def page(browser):
    page = browser.new_page()
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    page.route("**/*", lambda route: route.abort() if route.request.url.startswith("http") else route.continue_())
    yield page
    page.close()


@pytest.fixture(scope="module")
def exporter():
    return SlidesExporter(exclude_input_prompt=True, exclude_output_prompt=True)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_no_slide_is_cut(page, exporter, lesson):
    deck, _ = exporter.from_filename(lesson)
    assert "<strong>Read on.</strong>" not in deck
    assert "<strong>Predict" in deck or "00 Start here" in deck
    deck = re.sub(r"<script\b.*?</script>", "", deck, flags=re.DOTALL)
    page.set_content(deck)
    page.add_style_tag(content=THEME)
    slides = page.evaluate(MEASURE)
    assert len(slides) > 5
    assert not [slide for slide in slides if slide["height"] + FORMULA * slide["formula"] > HEIGHT - MARGIN]
    assert not [slide for slide in slides if slide["hidden"] > 1 or slide["missing"]]
