"""The live figures of lesson 02: each control over its whole range, each chip, numbers against direct computations."""

import itertools
import re
from functools import partial

import matplotlib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlab import affine, samples
from qlab.explorers import colors, granularity, mapping
from qlab.explorers.affine import DATA_CHIPS, SEVEN
from tests.explorers.checks import (
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    figures,
    has_no_range,
    message,
    pictures_along,
    values,
    without_pixels,
)

WEIGHTS = samples.load("weights")
SIX = [-1.72, 0.31, 2.28, 0.04, 3.43, -0.77]
MAKERS = {"mapping": partial(mapping, SIX), "granularity": partial(granularity, WEIGHTS)}
START = {
    "mapping": {"data": ", ".join(map(str, SIX)), "scheme": "absmax", "bits": 8, "alpha": -3.43, "beta": 3.43,
                "narrow": False, "value": 0},
    "granularity": {"per": "tensor", "group_size": 32, "bits": 4, "scheme": "absmax"},
}
SETTINGS = [
    ("mapping", {}), ("mapping", {"scheme": "zero-point", "bits": 4, "narrow": True}),
    ("mapping", {"bits": 3, "alpha": -1.1, "beta": 2.9}),
    ("granularity", {}), ("granularity", {"per": "group", "group_size": 64, "bits": 3, "scheme": "zero-point"}),
]
CONTROLS = [(name, setting, control) for name, setting in SETTINGS for control in START[name]
            if (control, "scheme" in setting or "alpha" in setting) != ("narrow", False)
            and (control, "per" in setting) != ("group_size", False)]  # these are disabled

shared, put_there = figures(MAKERS, START)


def put(name, setting):
    explorer = shared(name)
    if name == "mapping":
        explorer.set(data=START[name]["data"])  # new data sets new limits, and then the ends follow the scheme
        explorer.set(scheme="absmax")
        explorer.set(**{"bits": 8, "narrow": False, "value": 0} | setting)
        return explorer
    return put_there(name, setting)


def at_seven():
    """The shared figure as `mapping()` starts: with the lecture notes' numbers."""
    explorer = put("mapping", {})
    explorer.set(data=", ".join(map(str, SEVEN)))
    return explorer


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    pictures = pictures_along(put(name, setting), control, redrawn=["data"], skips=has_no_range)
    assert pictures[0] != pictures[-1]
    # α > 0 and β < 0 are widened to 0; the scheme "α, β" starts from the range in use.
    some_alike = name == "mapping" and control in ("alpha", "beta", "scheme")
    assert len(set(pictures)) >= (0.5 if some_alike else 0.7) * len(pictures)


@pytest.mark.parametrize("name, setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    fresh = MAKERS[name]()
    fresh.set(**setting)
    assert_same_whichever_way(shared(name), fresh)


def test_each_chip():
    for chip in shared("mapping").chips:
        explorer = put("mapping", {"scheme": "zero-point", "bits": 4, "narrow": True})
        before = explorer.png()
        explorer.press(chip)
        assert_sound(explorer)
        assert explorer.png() != before


@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    explorer = MAKERS[name]()
    assert values(explorer) == START[name]
    assert_words(explorer)
    assert bool(explorer.chips) == (name == "mapping")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.sampled_from(["absmax", "zero-point", "α, β"]), st.integers(2, 8), st.floats(0.5, 12))
def test_the_line_of_a_value(value, scheme, bits, beta):
    """Each step can be made from the one before it, and the last is the level of the quantizer."""
    with without_pixels():
        explorer = at_seven()
        explorer.set(bits=bits, value=value)
        explorer.set(**{"beta": beta} if scheme == "α, β" else {"scheme": scheme})
    numbers = explorer.readout
    words = numbers["line"].replace("−", "-").split(" → ")
    x, steps, rounded, moved, q, x_hat, error = (float(re.findall(r"[-+]?[\d.]+(?:e[-+]?\d+)?", word)[-1])
                                                 for word in words)
    assert x == SEVEN[value - 1]
    assert steps == pytest.approx(x / numbers["scale"], rel=1e-5)
    assert rounded == np.rint(x / numbers["scale"])
    assert moved == rounded + numbers["zero_point"]
    assert q == np.clip(moved, numbers["qmin"], numbers["qmax"]) == int(numbers["codes"].split()[value - 1])
    assert x_hat == pytest.approx(numbers["scale"] * (q - numbers["zero_point"]), rel=1e-5)
    assert error == pytest.approx((x - x_hat) / numbers["scale"], rel=0.01, abs=0.01)


def test_a_line_is_told_of_values_that_have_a_thread():
    explorer = at_seven()
    explorer.set(value=7)
    explorer.set(data="1, 2")
    assert values(explorer)["value"] == 2
    assert explorer.readout["line"].startswith("x = 2 → ")
    explorer.set(value=0)
    assert "line" not in explorer.readout
    assert mapping(np.linspace(-1, 1, 41)).controls["value"].disabled


@pytest.mark.parametrize("control, value", [("bits", 3), ("scheme", "zero-point"), ("beta", 2.0)])
def test_another_control_moves_on_after_bad_text(control, value):
    explorer = at_seven()
    explorer.controls[control].value = value
    expected = explorer.readout, explorer.png(), values(explorer)
    at_seven().controls["data"].value = "seven"
    assert "got 'seven'" in message(explorer).replace("&#x27;", "'")
    explorer.errors.clear()
    explorer.controls[control].value = value
    assert not message(explorer)
    assert (explorer.readout, explorer.png(), values(explorer) | {"data": expected[2]["data"]}) == expected


def mapping_directly(x, low, high, *, bits, narrow, symmetric):
    """The textbook's formulas in float64."""
    x, half = np.asarray(x, np.float64), 2 ** (bits - 1)
    qmin, qmax = -half + (narrow or symmetric), half - 1
    low, high = min(low, 0), max(high, 0)
    s = max(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    z = 0 if symmetric else qmin - round(low / s)
    q = np.clip(np.rint(x / s) + z, qmin, qmax)
    x_hat = s * (q - z)
    error = np.mean((x - x_hat) ** 2)
    return {
        "scale": s, "zero_point": z, "qmin": qmin, "qmax": qmax, "mse": error,
        "sqnr_db": 10 * np.log10(np.mean(x**2) / error) if error else np.inf,
        "clipped": np.sum(np.abs(x - x_hat) > 0.501 * s), "codes": q.astype(int).tolist(),
    }


def assert_maps_directly(explorer, x):
    now = values(explorer)
    absmax, free = now["scheme"] == "absmax", now["scheme"] == "α, β"
    low, high = (now["alpha"], now["beta"]) if free else (min(x), max(x))
    if absmax:
        low, high = -max(map(abs, x)), max(map(abs, x))
    direct = mapping_directly(x, low, high, bits=now["bits"], narrow=now["narrow"], symmetric=absmax)
    read = dict(explorer.readout)
    clipped, size = read.pop("clipped").replace(",", "").split(" of ")
    assert (int(clipped), int(size)) == (direct.pop("clipped"), len(x))
    codes = direct.pop("codes")
    assert read.pop("codes", None) == (" ".join(map(str, codes)) if len(x) <= 8 else None)
    assert read == pytest.approx(direct, rel=1e-6)
    if not free:
        assert (now["alpha"], now["beta"]) == (min(low, 0), max(high, 0))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["absmax", "zero-point", "α, β"])
def test_mapping_reads_the_textbooks_formulas(scheme, bits, narrow):
    explorer = shared("mapping")
    explorer.set(scheme=scheme, bits=bits, narrow=narrow)
    for x in ([1, 2, 3], [-0.3, -0.11], list(SEVEN)):
        explorer.set(data=str(x))
        assert_maps_directly(explorer, x)
    explorer.set(alpha=-3.4, beta=7.7)
    assert_maps_directly(explorer, SEVEN)
    explorer.set(beta=-1.0)  # widened to hold 0
    assert_maps_directly(explorer, SEVEN)


@pytest.mark.usefixtures("unseen")
def test_mapping_of_the_lecture_notes():
    explorer = mapping()
    assert explorer.readout["codes"] == "64 36 -89 0 -23 -54 127"
    assert explorer.readout["mse"] == pytest.approx(2.98e-4, abs=5e-7)
    explorer.set(scheme="zero-point")
    assert explorer.readout["codes"] == "53 20 -128 -23 -50 -86 127"
    assert explorer.readout["mse"] == pytest.approx(2.72e-4, abs=5e-7)


DECIMALS = st.lists(st.decimals(-500, 500, places=2).map(float), min_size=1, max_size=12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=DECIMALS.filter(any), bits=st.integers(2, 8), scheme=st.sampled_from(["absmax", "zero-point"]))
@example(x=[-0.01], bits=2, scheme="zero-point")
def test_mapping_of_typed_numbers(unseen, x, bits, scheme):
    explorer = shared("mapping")
    explorer.set(data=" ".join(map(str, x)))
    explorer.set(bits=bits, scheme=scheme)
    assert_maps_directly(explorer, x)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("text", [
    "1.5,-2,.25", "[1.5, -2, 0.25]", "  1.5   -2.0\t25e-2 ", "(1.5, −2, 0.25)", "[[1.5], [-2], [0.25]]", "1.5 -2 0.25,",
])
def test_ways_to_type(text):
    explorer = shared("mapping")
    explorer.set(data="9")
    explorer.controls["data"].value = text
    assert_maps_directly(explorer, [1.5, -2, 0.25])


@pytest.mark.parametrize("text, part", [
    ("1 2 abc", "data must be numbers separated by commas or spaces, got 'abc'"), ("1;2", "'1;2'"),
    ("", "at least one"), ("[ ]", "at least one number, got '\\[ \\]'"), ("1 nan", "finite numbers, got 'nan'"),
    ("-inf 3", "'-inf'"), ("1e999", "'1e999'"), ("1e31 2", "1e-30 to 1e\\+30, got 1e\\+31"),
    ("1e-31", "1e-31"), ("7 values", "'values'"),
])
def test_bad_text(text, part):
    explorer = put("mapping", {})
    picture, readout = explorer.png(), explorer.readout
    explorer.controls["data"].value = text
    assert [type(error) for error in explorer.errors] == [ValueError]
    explorer.errors.clear()
    assert message(explorer)
    with pytest.raises(ValueError, match=part):
        explorer.set(data=text)
    assert (explorer.png(), explorer.readout) == (picture, readout)
    explorer.errors.clear()
    explorer.press("ties: absmax at 4 bits")
    assert not message(explorer)


@pytest.mark.usefixtures("unseen")
def test_data_chips():
    explorer = put("mapping", {})
    wanted = {
        "seven numbers": "64 36 -89 0 -23 -54 127", "[1, 2, 3]": "42 85 127",
        "ties: absmax at 4 bits": "-4 -2 -2 0 0 2 2 7",
        "all ≥ 0": "0 0 2 3 0 4 6 7", "outlier": "-1 0 0 0 0 0 1 7",
    }
    assert set(wanted) == set(DATA_CHIPS) == set(explorer.chips)
    for chip, codes in wanted.items():
        explorer.press(chip)
        assert explorer.readout["codes"] == codes
    explorer.set(scheme="zero-point")
    explorer.press("[1, 2, 3]")
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (0, 3)
    explorer.press("ties: absmax at 4 bits")
    assert (explorer.readout["scale"], values(explorer)["scheme"], values(explorer)["alpha"]) == (1, "absmax", -7)


@pytest.mark.usefixtures("unseen")
def test_a_hand_on_alpha_chooses_the_range():
    explorer = at_seven()
    assert explorer.controls["narrow"].disabled
    explorer.controls["alpha"].value = -4.0
    assert values(explorer)["scheme"] == "α, β"
    assert not explorer.controls["narrow"].disabled
    assert_maps_directly(explorer, SEVEN)
    explorer.controls["scheme"].value = "zero-point"
    assert_maps_directly(explorer, SEVEN)
    explorer.controls["beta"].value = 4.0
    assert (values(explorer)["scheme"], values(explorer)["alpha"]) == ("α, β", -7.59)
    explorer.controls["scheme"].value = "absmax"
    assert_maps_directly(explorer, SEVEN)
    assert explorer.controls["narrow"].disabled
    explorer.controls["scheme"].value = "α, β"  # starts from the range in use
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (-10.8, 10.8)
    assert explorer.readout["qmin"] == -128


@pytest.mark.usefixtures("unseen")
def test_new_data_sets_new_limits():
    explorer = mapping()
    explorer.set(data="0.2 -0.4")
    for scheme, low in (("absmax", -0.4), ("zero-point", -0.4)):
        explorer.set(scheme=scheme)
        assert values(explorer)["alpha"] == low
    for name in ("alpha", "beta"):
        control = explorer.controls[name]
        assert (control.min, control.max) == pytest.approx((-0.6, 0.6))
        assert control.step <= 0.6 / 100
    explorer.set(alpha=-0.1, beta=0.3)
    explorer.set(data="400 -100")
    assert values(explorer)["scheme"] == "α, β"
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (-100, 400)
    assert explorer.controls["beta"].max == pytest.approx(600)


def test_mapping_of_zeros():
    explorer = put("mapping", {})
    explorer.set(data="0 0 0")
    for scheme, narrow in itertools.product(["absmax", "zero-point", "α, β"], [False, True]):
        explorer.set(scheme=scheme, narrow=narrow)
        assert explorer.readout["mse"] == 0
        assert explorer.readout["sqnr_db"] == np.inf
        assert explorer.readout["zero_point"] == 0
        assert scheme == "α, β" or explorer.readout["scale"] == 1


def test_a_range_of_mapping_keeps_a_width():
    explorer = at_seven()
    explorer.set(alpha=-2.0, beta=5.0)
    explorer.controls["alpha"].value = 6.0
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (pytest.approx(4.9), 5.0)
    assert_maps_directly(explorer, SEVEN)
    explorer.controls["beta"].value = -3.0
    assert values(explorer)["beta"] == pytest.approx(5.0)
    explorer.set(scheme="α, β", alpha=3.0, beta=3.0)
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (pytest.approx(2.9), 3.0)
    assert not explorer.errors


def test_the_picture_of_many_values():
    assert_sound(mapping(np.random.default_rng(0).standard_normal(100_000).astype(np.float32), bits=5))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("size", [9, 40, 41, 500, 501, 100_000])
def test_mapping_of_an_array(size):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    explorer = mapping(x.reshape(1, -1), bits=5)
    assert values(explorer)["data"] == (f"{size:,} values" if size > 40 else ", ".join(f"{v:.6g}" for v in x))
    for setting in ({}, {"scheme": "zero-point"}, {"alpha": -1.3, "beta": 2.1}):
        explorer.set(**setting)
        params = {
            "absmax": affine.absmax_params(x, 5), "zero-point": affine.zero_point_params(x, 5),
            "α, β": affine.range_params(*np.float32([-1.3, 2.1]), 5),
        }[values(explorer)["scheme"]]
        x_hat = affine.fake_quantize(x, params)
        assert explorer.readout["mse"] == affine.mse(x, x_hat)
        assert explorer.readout["sqnr_db"] == pytest.approx(affine.sqnr_db(x, x_hat))
        clipped = np.sum(np.abs(x - x_hat) > 0.501 * params.scale)
        assert explorer.readout["clipped"] == f"{clipped:,} of {size:,}"
        assert clipped or "alpha" not in setting
    assert sum(len(line(explorer, 1, marker).get_xdata()) for marker in "o^v") == min(size, 500)
    assert len(line(explorer, 0, "s").get_xdata()) == min(size, 40)
    explorer.press("seven numbers")
    explorer.set(data=f"{size:,} values" if size > 40 else "1 2")
    assert explorer.readout["clipped"].endswith(f" of {size:,}" if size > 40 else " of 2")


def line(explorer, axes, marker):
    moving = [line for line in explorer.figure.axes[axes].lines if line.get_animated()]
    (found,) = [line for line in moving if line.get_marker() == marker]
    return found


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("scheme", ["absmax", "zero-point", "α, β"])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_picture_of_a_mapping(bits, scheme):
    explorer = at_seven()
    explorer.set(scheme=scheme, bits=bits, **({"alpha": -4.0, "beta": 6.0} if scheme == "α, β" else {}))
    read, above = explorer.readout, explorer.figure.axes[0]
    to_data = above.transAxes + above.transData.inverted()
    (code_line,) = [line for line in above.lines if not line.get_animated() and line.get_marker() == "None"]
    left, right = (to_data.transform((x, 0))[0] for x in code_line.get_xdata())

    def code_at(x):
        return read["qmin"] + (read["qmax"] - read["qmin"]) * (np.asarray(x) - left) / (right - left)

    x = np.sort(SEVEN)
    order = np.argsort(SEVEN)
    codes = np.array(read["codes"].split(), int)[order]
    x_hat = read["scale"] * (codes - read["zero_point"])
    clipped = np.abs(x - x_hat) > 0.501 * read["scale"]
    assert read["clipped"] == f"{clipped.sum()} of 7"
    np.testing.assert_allclose(code_at(line(explorer, 0, "s").get_xdata()), codes, atol=1e-6)
    np.testing.assert_allclose(code_at(line(explorer, 0, "D").get_xdata()[-1]), read["zero_point"], atol=1e-6)
    threads = {line.get_color(): np.array(line.get_data()).reshape(2, -1, 4)
               for line in above.lines if line.get_color() in (colors.BLUE, colors.VERMILION)}
    for color, some in ((colors.BLUE, ~clipped), (colors.VERMILION, clipped)):
        xs, ys = threads[color]
        np.testing.assert_allclose(xs[:, :2], np.stack([x[some], x_hat[some]], axis=1), atol=1e-6)
        np.testing.assert_allclose(code_at(xs[:, 2]), codes[some], atol=1e-5)
        assert (ys[:, [0, 2]] == [1, 0]).all()
        assert np.isnan(xs[:, 3]).all()

    all_codes = np.arange(read["qmin"], read["qmax"] + 1)
    levels = read["scale"] * (all_codes - read["zero_point"])
    (grid,) = [line for line in above.lines if line.get_color() == colors.GREY]
    xs = grid.get_xdata().reshape(all_codes.size, -1)  # a row for each level; the last column is a gap
    np.testing.assert_allclose(xs[:, 0], levels, atol=1e-6)
    np.testing.assert_allclose(code_at(xs[:, -2]), all_codes, atol=1e-5)

    steps = (x - x_hat) / read["scale"]
    below = {line.get_color(): line.get_data() for line in explorer.figure.axes[1].lines
             if line.get_animated() and line.get_marker() == "None"}
    ends = np.reshape(below[colors.BLUE], (2, -1, 3))[:, :, 1]  # of the stems
    np.testing.assert_allclose(ends, [x[~clipped], steps[~clipped]], atol=1e-5)
    xs, ys = np.reshape(below[colors.GREY], (2, -1, 3))[:, :, :2]  # of the sawtooth
    np.testing.assert_allclose(xs - read["scale"] * ys, np.stack([levels, levels], axis=1), atol=1e-5)
    np.testing.assert_allclose((xs[1:, 0], xs[:-1, 1]), [levels[1:] - read["scale"] / 2] * 2, atol=1e-5)
    np.testing.assert_allclose(line(explorer, 1, "o").get_data(), [x[~clipped], steps[~clipped]], atol=1e-5)
    for marker, some in (("^", clipped & (steps > 0)), ("v", clipped & (steps < 0))):
        xs, ys = line(explorer, 1, marker).get_data()
        np.testing.assert_allclose(xs, x[some])
        assert (np.abs(ys) > 0.5).all()
        assert (np.abs(ys) < 0.8).all()

    shown = [text.get_text().replace("−", "-") for text in above.texts if text.get_visible()]
    labels = range(read["qmin"], read["qmax"] + 1) if bits <= 4 else (read["qmin"], read["qmax"])
    assert shown == [*map(str, labels), f"z = {read['zero_point']}"]
    places = [text.get_position()[0] for text in above.texts if text.get_visible()]
    np.testing.assert_allclose(code_at(places), [*labels, read["zero_point"]], atol=1e-5)


def shared_by(per, group_size):
    return {"tensor": {}, "channel": {"axis": 0}, "group": {"group_size": group_size}}[per]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["absmax", "zero-point"])
@pytest.mark.parametrize("per, group_size, scales", [
    ("tensor", 32, 1), ("channel", 32, 192), ("group", 16, 6912), ("group", 192, 576),
])
def test_granularity_reads_what_affine_computes(*, per, group_size, scales, scheme, bits):
    explorer = put("granularity", {"per": per, "group_size": group_size, "scheme": scheme, "bits": bits})
    find = affine.absmax_params if scheme == "absmax" else affine.zero_point_params
    w = WEIGHTS[np.argsort(-np.abs(WEIGHTS).max(axis=1), kind="stable")]
    w_hat = affine.fake_quantize(w, find(w, bits, **shared_by(per, group_size)))
    total_bits = bits * w.size + scales * (16 + (bits if scheme == "zero-point" else 0))
    assert explorer.readout == pytest.approx({
        "scales": scales, "bits_per_weight": total_bits / w.size, "mse": affine.mse(w, w_hat),
        "sqnr_db": affine.sqnr_db(w, w_hat), "memory_kb": total_bits / 8000,
    }, rel=1e-6)

    left, middle, right = explorer.figure.axes[:3]
    step = np.abs(w).max() / (2 ** (bits - 1) - 1)
    squares = ((w - w_hat) / step) ** 2
    (rows,) = middle.lines
    np.testing.assert_allclose(rows.get_xdata(), np.sqrt(squares.mean(axis=1)), rtol=1e-4)
    np.testing.assert_allclose(rows.get_ydata(), np.arange(192) + 0.5)
    patches = np.sqrt(squares.reshape(192, 36, 16).mean(axis=2))
    colors = matplotlib.colormaps["viridis"](patches / middle.get_xlim()[1])
    np.testing.assert_allclose(left.images[0].get_array() / 255, colors, atol=0.02)

    curves = dict(zip(("tensor", "channel", "group"), right.lines, strict=False))
    for unit, curve in curves.items():
        for i, b in enumerate(range(2, 9)):
            params = find(w, b, **shared_by(unit, group_size))
            cost = b + (16 + (b if scheme == "zero-point" else 0)) * params.scale.size / w.size
            db = affine.sqnr_db(w, affine.fake_quantize(w, params))
            np.testing.assert_allclose([curve.get_xdata()[i], curve.get_ydata()[i]], [cost, db], rtol=1e-6)
    (ring,) = right.lines[3:]
    assert np.ravel(ring.get_data()) == pytest.approx([total_bits / w.size, affine.sqnr_db(w, w_hat)])


@pytest.mark.usefixtures("unseen")
def test_what_a_row_would_have_with_its_own_scale():
    explorer = put("granularity", {"bits": 8})
    middle = explorer.figure.axes[1]
    expected = middle.collections[0].get_paths()[0].vertices[:, 0]
    explorer.set(per="channel")
    now = middle.lines[0].get_xdata()
    assert np.all(np.diff(now) <= 0.03)  # the rows with the largest weights come first
    assert all(np.abs(expected - x).min() < 0.03 for x in now)
    assert expected.max() == pytest.approx(1 / np.sqrt(12), rel=1e-6)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("columns, sizes, first", [
    (576, [16, 32, 64, 96, 192], 32), (100, [100], 100), (48, [16], 16), (32, [16], 16), (16, [16], 16), (1, [1], 1),
    (768, [16, 32, 64, 96, 128, 192, 256], 32),
])
def test_group_sizes(columns, sizes, first):
    explorer = granularity(np.random.default_rng(0).standard_normal((3, columns)))
    size = explorer.controls["group_size"]
    assert (list(size.options), size.value) == (sizes, first)
    assert size.disabled
    explorer.set(per="group")
    assert not size.disabled
    assert explorer.readout["scales"] == 3 * columns // first
    explorer.set(per="channel")
    assert size.disabled
    assert explorer.readout["scales"] == 3


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 128), (2, 1000), (381, 16), (1000, 130), (190, 7)])
def test_patches(shape):
    w = np.random.default_rng(0).laplace(size=shape)
    explorer = granularity(w)
    w = w[np.argsort(-np.abs(w).max(axis=1), kind="stable")]
    params = affine.absmax_params(w, 4)
    squares = ((w - affine.fake_quantize(w, params)) / params.scale) ** 2
    tall, wide = -(-shape[0] // 380), 16 if shape[1] >= 128 else 1
    wanted = [[np.sqrt(squares[i:i + tall, j:j + wide].mean()) for j in range(0, shape[1], wide)]
              for i in range(0, shape[0], tall)]
    colors = matplotlib.colormaps["viridis"](np.array(wanted) / explorer.figure.axes[1].get_xlim()[1])
    np.testing.assert_allclose(explorer.figure.axes[0].images[0].get_array() / 255, colors, atol=0.02)


@pytest.mark.parametrize("w", [
    WEIGHTS.astype(np.float64) * 1e20, WEIGHTS[:20] * 1e-20, WEIGHTS.T, np.eye(40)[:20] - 0.3, [[1, 2], [3, -4]],
    np.concatenate([WEIGHTS[:5], np.zeros((2, 576))]),
], ids=["large", "tiny", "transposed", "half-filled", "list", "rows of zeros"])
def test_granularity_of_unusual_weights(w):
    explorer = granularity(w)
    w = np.asarray(w)
    for per in ("channel", "group", "tensor"):
        explorer.set(per=per, bits=5)
        w_hat = affine.fake_quantize(w, affine.absmax_params(w, 5, **shared_by(per, values(explorer)["group_size"])))
        assert explorer.readout["mse"] == pytest.approx(affine.mse(w, w_hat))
        assert not np.isnan(explorer.readout["sqnr_db"])
        assert explorer.png().startswith(b"\x89PNG")


@pytest.mark.usefixtures("unseen")
def test_weights_that_the_grid_holds():
    explorer = granularity([[1.0, -1.0], [1.0, 1.0]])
    assert explorer.readout["sqnr_db"] == np.inf
    explorer.set(bits=2, per="channel")
    assert explorer.readout["mse"] == 0


@pytest.mark.parametrize("make_it, bad, bits, part", [
    (mapping, [0.5, np.nan], 8, "NaN"), (mapping, [0.5, np.inf], 8, "infinite"), (mapping, [], 8, "empty"),
    (mapping, ["a"], 8, "x must be an array of real numbers"), (mapping, [1e31], 8, r"1e-30 to 1e\+30, got 1e\+31"),
    (mapping, [1e-31], 8, "1e-31"), (mapping, [1.0], 9, "bits"), (mapping, [1.0], 1, "bits"),
    (mapping, [1.0], 4.5, "bits"), (mapping, [1.0], "4", "bits"),
    (granularity, WEIGHTS[0], 4, r"two dimensions .* got shape \(576,\)"),
    (granularity, WEIGHTS[None], 4, "dimensions"), (granularity, 3.0, 4, "dimensions"),
    (granularity, np.zeros((0, 4)), 4, "w must not be empty"),
    (granularity, [[1, np.nan]], 4, "NaN"), (granularity, [[np.inf, 1]], 4, "infinite"),
    (granularity, np.zeros((3, 3)), 4, "got 0"), (granularity, [["a"]], 4, "w must be an array of real numbers"),
    (granularity, WEIGHTS, 9, "bits"), (granularity, WEIGHTS, 1, "bits"), (granularity, WEIGHTS, 4.5, "bits"),
])
def test_bad_grids(make_it, bad, bits, part):
    with pytest.raises(ValueError, match=part):
        make_it(bad, bits=bits)
