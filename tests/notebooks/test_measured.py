"""The comparison of measured numbers finds what has changed, and lets pass what an interval allows."""

import pytest

from tests.notebooks.measured import differences

BEFORE = """tokens  KL 0.0139 [0.0127, 0.0153]  perplexity × 1.005 [0.996, 1.015] not resolved  same top-1 69.2 %
360 of 1,024: 35.2 %"""


@pytest.mark.parametrize("old, new", [
    ("0.0139 [0.0127, 0.0153]", "0.0141 [0.0130, 0.0155]"), ("1.005", "1.009"), ("35.2", "35.3"), ("360", "361"),
    ("1.015] not resolved", "1.014] higher"), ("tokens  KL", "tokens KL"), ("69.2", "63.0"),
    ("0.0139 [0.0127, 0.0153]", "0.0165 [0.0152, 0.0190]"),
])
def test_what_passes(old, new):
    assert old in BEFORE
    assert not differences(BEFORE, BEFORE.replace(old, new))


@pytest.mark.parametrize("old, new", [
    ("0.0139 [0.0127, 0.0153]", "0.0165 [0.0154, 0.0190]"), ("0.0127", "0.0070"), ("1.015]", "1.080]"),
    ("35.2", "38.2"), ("1,024", "1,124"), ("69.2", "61.0"), ("same top-1 69.2 %", "same top-1 69.2"),
    ("tokens", "groups"), ("0.0139 [0.0127, 0.0153]", "0.0139"), ("× 1.005 [0.996, 1.015]", "× 1.005 [1.016, 1.030]"),
])
def test_what_does_not(old, new):
    assert old in BEFORE
    assert differences(BEFORE, BEFORE.replace(old, new))
