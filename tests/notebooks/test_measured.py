"""The comparison of measured numbers finds what has changed, and lets pass what an interval allows."""

import pytest

from tests.notebooks.measured import differences

BEFORE = "tokens  KL 0.0139 [0.0127, 0.0153]  perplexity × 1.005 [0.996, 1.015] not resolved\n360 of 1,024: 35.2 %"


@pytest.mark.parametrize("old, new", [
    ("0.0139 [0.0127, 0.0153]", "0.0141 [0.0130, 0.0155]"), ("1.005", "1.009"), ("35.2", "35.3"), ("360", "361"),
    ("1.015] not resolved", "1.014] higher"), ("tokens  KL", "tokens KL"),
])
def test_what_passes(old, new):
    assert old in BEFORE
    assert not differences(BEFORE, BEFORE.replace(old, new))


@pytest.mark.parametrize("old, new", [
    ("0.0139 [", "0.0159 ["), ("0.0127", "0.0110"), ("1.015]", "1.030]"), ("35.2", "38.2"), ("1,024", "1,124"),
    ("tokens", "groups"), ("0.0139 [0.0127, 0.0153]", "0.0139"), ("× 1.005 [0.996, 1.015]", "× 1.005 [1.016, 1.030]"),
])
def test_what_does_not(old, new):
    assert old in BEFORE
    assert differences(BEFORE, BEFORE.replace(old, new))
