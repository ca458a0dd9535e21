"""The page to keep: its numbers are those of independent sources, and it prints on one sheet."""

import html
import re

import ml_dtypes
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from qlab import exercises
from tests.browser.lab import CHROMIUM_FLAGS, find_chromium

PAGE = exercises.page_to_keep()
TYPES = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP8 E5M2": ml_dtypes.float8_e5m2,
         "FP8 E4M3": ml_dtypes.float8_e4m3fn, "FP6 E3M2": ml_dtypes.float6_e3m2fn,
         "FP6 E2M3": ml_dtypes.float6_e2m3fn, "FP4 E2M1": ml_dtypes.float4_e2m1fn}
MAX_1960 = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495}  # least errors of even levels for normal data, table II


def rows(heading):
    return PAGE.tables[heading][1:]


def test_formats_are_those_of_ml_dtypes():
    assert [name for name, *_ in rows("Formats")] == list(TYPES)
    for name, bits, fields, _, *numbers in rows("Formats"):
        known = ml_dtypes.finfo(TYPES[name])
        assert int(bits) == known.bits == sum(map(int, fields.split(",")))
        limits = [float(limit) for limit in (known.max, known.smallest_normal, known.smallest_subnormal)]
        np.testing.assert_allclose([float(number) for number in numbers[:3]], limits, rtol=1e-3)
        assert 2.0 ** -int(numbers[3].removeprefix("2^−")) == float(known.eps)


def test_even_data_has_the_decibels_of_its_steps_and_normal_data_nearly_those_of_the_best_even_levels():
    for bits, levels, code, *texts in rows("Decibels and bits"):
        even, covered, best = (float(text.split()[0]) for text in texts)
        assert even == pytest.approx(20 * np.log10(2 ** int(bits) - 1), abs=0.06)
        assert covered < best < even
        least = -10 * np.log10(MAX_1960.get(int(bits), 1e-9))
        assert best < least + 0.05 and (int(bits) not in MAX_1960 or best > least - 1)
        assert (int(levels), int(code)) == (2 ** int(bits), 2 ** (int(bits) - 1) - 1)


def test_the_best_calibrator_is_that_of_the_other_table():
    found = {name: (end, float(db)) for name, _, end, db in rows("Calibrators")}
    assert max(db for _, db in found.values()) == found["MSE"][1]
    (of_4_bits,) = (row[-1] for row in rows("Decibels and bits") if row[0] == "4")
    assert of_4_bits == f"{found['MSE'][1]} dB ({found['MSE'][0]})"


def test_the_seven_numbers_of_lesson_02():
    text = " ".join(formula for _, formula in rows("Formulas"))
    assert re.findall(r"s = (0\.\d+)", text) == ["0.0850", "0.0721"] and "z = −23" in text
    assert "gives 6.02 dB" in text and "32 values: 4.5)" in text


def test_text_and_page_say_the_same():
    text, page = repr(PAGE), PAGE._repr_html_()
    for table in PAGE.tables.values():
        for row in table:
            assert all(cell in text for cell in row)
            assert "".join(f"<td>{html.escape(cell)}</td>" for cell in row) in page or row is table[0]
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.skipif(not find_chromium(), reason="no Chromium")
def test_it_prints_on_one_sheet(tmp_path):
    exercises.page_to_keep(tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        page = browser.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        printed = page.pdf(format="A4", prefer_css_page_size=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        browser.close()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
