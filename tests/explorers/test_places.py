"""Places in the language model, as all figures of lessons 05 to 07 take and name them."""

import numpy as np
import pytest

from qlab.explorers import landscape, outliers, rotation, smoothing
from tests.explorers.checks import own

pytestmark = pytest.mark.usefixtures("unseen")
FIGURES = [outliers, landscape, smoothing, rotation]


@pytest.mark.parametrize("make_it", FIGURES)
def test_the_places_that_ship_have_names(make_it):
    assert [label for label, _ in make_it().controls["place"].options] == [
        "layer 12, attention input", "layer 11, input of down", "layer 29, MLP input", "layer 12, input of o"]


def test_other_places_have_names():
    pair = own(3, 8)
    explorer = outliers({(1, "mlp_in"): pair, (7, "my site"): pair})
    assert [label for label, _ in explorer.controls["place"].options] == ["layer 1, MLP input", "layer 7, my site"]


X, W = own(4, 8)
HUGE = np.full((2, 2), 1e200)


@pytest.mark.parametrize("make_it", FIGURES)
@pytest.mark.parametrize("places, part", [
    ({}, "places must hold at least one pair"), ([(X, W)], "places must be a dict of .*got "),
    (3, "places must be a dict .* got 3"), ("text", "places must be a dict .* got 'text'"),
    (X, "places must be a dict"),
    ({3: (X, W)}, "places must be a dict"), ({(1, 2, 3): (X, W)}, "places must be a dict"),
    ({(0, "a"): (X, W, W)}, "places must be a dict"), ({(0, "a"): None}, "places must be a dict"),
    ({(0, "a"): (X[0], W)}, r"x \(tokens, channels\) .*got \(8,\) and \(5, 8\) at \(0, 'a'\)"),
    ({(0, "a"): (X, W[:, 0])}, r"got \(4, 8\) and \(5,\)"), ({(0, "a"): (X, W[:, :7])}, r"got \(4, 8\) and \(5, 7\)"),
    ({(0, "a"): (X[None], W)}, r"got \(1, 4, 8\)"), ({(0, "a"): (X[:0], W)}, r"x must not be empty, got .*\(0, 8\)"),
    ({(0, "a"): (X, W * np.nan)}, "w must be finite, got 40 NaN"), ({(0, "a"): (X + np.inf, W)}, "x must be finite"),
    ({(0, "a"): (["text"], W)}, "x must be an array of real numbers"), ({(0, "a"): (X + 1j, W)}, "real numbers"),
    ({(0, "a"): (0 * X, W)}, "not all 0.* at "), ({(0, "a"): (X, 0 * W)}, "not all 0, got one of at most 0"),
    ({(0, "a"): (HUGE, np.ones((1, 2)))}, "finite and not all 0"),
    ({(0, "a"): (X, W), (1, "b"): (X, W[0])}, r"at \(1, 'b'\)"),
])
def test_bad_places(make_it, places, part):
    with pytest.raises(ValueError, match=part):
        make_it(places)


@pytest.mark.parametrize("make_it", [outliers, smoothing, rotation])
@pytest.mark.parametrize("bits", [1, 9, 4.5, "4", None])
def test_bad_bits(make_it, bits):
    with pytest.raises(ValueError, match=f"bits must be an integer from 2 to 8, got {bits!r}"):
        make_it({(0, "a"): (X, W)}, bits)
