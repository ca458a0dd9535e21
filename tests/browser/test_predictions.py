"""A prediction in a real browser: by mouse, by key and not at all, and what a screen reader gets of it."""

import pytest

from tests.browser.lab import set_theme, violations
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser

CELLS = (
    "from qlab import exercises, samples\nfrom qlab.explorers import clipping",
    'exercises.predict("sum in FP16", 256.0)',
    'with exercises.answer_to("sum in FP16"):\n    print("it stays at 256")',
    'live = clipping(samples.load("activations"), bits=4)\n'
    'exercises.predict("where the sum is least", 0.29, figure=live, veil=["curves"],\n'
    '                  when=lambda now: abs(now["beta"] - 0.52) < 0.03)',
    "live",
    'exercises.predict("bits for groups", 4.5)',
    "exercises.summary()",
)
FOCUSED = "() => document.activeElement.ariaLabel || document.activeElement.textContent"


@pytest.fixture(scope="module")
def page(desk):
    page = desk.show("predictions.ipynb", *CELLS)
    page.locator(".qlab-prediction").nth(2).wait_for()
    return page


def asked(page, place):
    prediction = page.locator(".qlab-prediction").nth(place)
    return prediction, prediction.locator("[role=alert]")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_unanswered_nothing_is_said_and_nothing_is_wrong_for_a_reader(page, theme):
    set_theme(page, theme)
    assert page.locator(".qlab-prediction [role=alert]").count() == 0
    assert page.get_by_text("Output, after your prediction").is_visible()
    assert page.get_by_text("it stays at 256", exact=True).is_hidden()
    assert violations(page) == []
    set_theme(page, "Light")


def test_by_key_wrong_and_then_right(page):
    prediction, verdict = asked(page, 0)
    prediction.locator("button").first.focus()
    for option in ("(a) a little off", "(b) about half"):
        assert page.evaluate(FOCUSED) == option
        page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    verdict.get_by_text("✗ Not (b) about half.").wait_for()
    page.get_by_text("it stays at 256", exact=True).wait_for()
    assert page.evaluate(FOCUSED) == "(b) about half"  # the focus stays where the hand is
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    verdict.get_by_text("✓ Right: (c) not even 300.").wait_for()


def test_by_mouse_with_a_figure_that_has_to_be_moved(page):
    prediction, verdict = asked(page, 1)
    live = Figure(page, page.locator(".jp-OutputArea-output", has=page.locator("img")).first, "live")
    veiled = live.pixels()
    prediction.get_by_role("button", name="near one half").click()
    verdict.get_by_text("Committed to (c)").wait_for()
    committed = live.wait_for_change(veiled)
    live.output.get_by_role("button", name="MSE").click()
    live.wait_for_change(committed)
    verdict.get_by_text("✗ Not (c)").wait_for()
    prediction.get_by_role("button", name="below a third").click()
    verdict.get_by_text("✓ Right: (b)").wait_for()


def test_a_number_is_typed(page):
    prediction, verdict = asked(page, 2)
    field = prediction.get_by_label("Your number")
    field.fill("a half")
    field.press("Enter")
    verdict.get_by_text("choice must be a number").wait_for()
    field.fill("0.5")
    prediction.get_by_role("button", name="Commit").click()
    verdict.get_by_text("✗ Not 0.5.").wait_for()
    field.fill("4.5")
    field.press("Enter")
    verdict.get_by_text("✓ Right: 4.5.").wait_for()
