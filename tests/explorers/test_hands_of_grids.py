"""A hand in the pictures of lessons 01 to 03: what can be taken, where it stops, and that all agree afterwards."""

from functools import lru_cache, partial

import numpy as np
import pytest

from qlab import affine, samples
from qlab.explorers import clipping, drift, float_bits, granularity, mapping
from qlab.explorers.affine import SEVEN
from qlab.floats import decode
from tests.explorers.checks import assert_sound, values

ACTIVATIONS = samples.load("activations")
REACH = float(np.abs(ACTIVATIONS).max())
CLIPPING = partial(clipping, ACTIVATIONS)


def marks(explorer, name):
    """What the browser is told of a handle."""
    return [grip for grip in explorer._picture.grips if grip["name"] == name]


def share(explorer, axes, x, y):
    """A place of the data as the browser tells it: from the upper left corner, in shares of the picture."""
    across, up = axes.transData.transform((x, y)) / explorer.figure.bbox.size
    return [float(across), 1 - float(up)]


def middle(axes, between):
    low, high = between
    return 10 ** np.mean(np.log10([low, high])) if axes.get_yscale() == "log" else np.mean([low, high])


def drag(explorer, name, *stops, mark=0, which=0, start=None):
    """Take a mark of the ``which``-th handle of this name and move it over places (x, y) of its axes' data."""
    index, handle = [pair for pair in enumerate(explorer._handles) if pair[1].name == name][which]
    axes = handle.axes
    limits = axes.get_xlim(), axes.get_ylim()
    place = start or [middle(axes, limit) if at is None else np.mean(at)
                      for at, limit in zip(handle.marks(explorer._result)[mark], limits, strict=True)]
    at = [share(explorer, axes, *place), *(share(explorer, axes, x, middle(axes, limits[1]) if y is None else y)
                                           for x, y in stops)]
    number = getattr(drag, "number", 0) + 1
    drag.number = number
    for i, to in enumerate([*at, at[-1]]):
        explorer._picture.pointer = {"drag": number, "grip": [index, mark], "start": at[0], "at": to,
                                     "held": i < len(at)}
    assert not explorer.errors
    assert_sound(explorer)


@lru_cache
def undragged(make):
    return make()


def assert_as_undragged(explorer, make):
    """The picture and numbers are those of a figure that was never dragged and whose controls were set there."""
    other, now = undragged(make), values(explorer)
    if "data" in now:
        other.reset()  # new data set new limits
        if now["data"] != values(other)["data"]:
            other.set(data=now["data"])
    other.set(**now)
    assert (explorer.readout, explorer.png()) == (other.readout, other.png())


@pytest.fixture(scope="module")
def clipped():
    return CLIPPING()


@pytest.mark.parametrize("linked, name, stop, expected", [
    (True, "β", 0.5, (-0.5, 0.5)), (True, "α", -0.7, (-0.7, 0.7)), (True, "β", -1.0, (-REACH / 400, REACH / 400)),
    (False, "β", 0.5, (-REACH, 0.5)), (False, "α", -0.7, (-0.7, REACH)), (False, "α", 1.0, (0, REACH)),
    (False, "β", -1.0, (-REACH, 0)),
])
@pytest.mark.parametrize("which", [0, 1])
def test_the_ends_of_the_range(clipped, which, *, linked, name, stop, expected):
    clipped.set(linked=linked, alpha=-REACH, beta=REACH)
    drag(clipped, name, (-0.3, None), (stop, None), which=which)
    now = values(clipped)
    assert (now["alpha"], now["beta"]) == pytest.approx(expected, abs=REACH / 400)
    assert (clipped.readout["alpha"], clipped.readout["beta"]) == (now["alpha"], now["beta"])
    assert_as_undragged(clipped, CLIPPING)


@pytest.mark.parametrize("by, alpha", [(0.4, -0.6), (-0.5, -1.5), (9, 0.0), (-9, -1.75)])
def test_the_range_as_a_whole(clipped, by, alpha):
    clipped.reset()
    assert not marks(clipped, "the range")  # linked, and then as wide as the sliders
    clipped.set(linked=False)
    assert not marks(clipped, "the range")
    clipped.set(alpha=-1.0, beta=0.75)
    assert len(marks(clipped, "the range")) == 2
    drag(clipped, "the range", (by / 3, None), (by, None), start=(0.0, 100))
    now = values(clipped)
    assert now["alpha"] == pytest.approx(alpha, abs=REACH / 400)
    assert now["beta"] - now["alpha"] == pytest.approx(1.75, abs=REACH / 400)


@pytest.mark.parametrize("first, second", [("alpha", "beta"), ("beta", "alpha")])
def test_a_range_keeps_a_width(clipped, first, second):
    clipped.reset()
    clipped.set(linked=False)
    clipped.controls[first].value = 0.0
    clipped.controls[second].value = 0.0
    assert abs(values(clipped)[second]) == REACH / 400
    assert values(clipped)[first] == 0
    clipped.controls["linked"].value = True
    assert values(clipped)["beta"] == REACH / 400 == -values(clipped)["alpha"]
    assert_sound(clipped)


def test_calibrators_stand_at_their_errors():
    explorer = clipping(ACTIVATIONS)
    explorer.set(linked=False)
    for chip in explorer.chips:
        explorer.press(chip)
        (line,) = [line for line in explorer.figure.axes[1].lines
                   if not line.get_animated() and line.get_visible() and len(line.get_xdata()) == 2
                   and line.get_xdata()[1] == explorer.readout["beta"]]
        np.testing.assert_allclose(line.get_ydata(), explorer.readout["mse"], rtol=1e-9)
        assert line.get_xdata()[0] == explorer.readout["alpha"]


def test_a_hand_in_one_figure_leaves_another(clipped):
    clipped.reset()
    other = clipping(ACTIVATIONS)
    before = other.readout, other.png(), values(other)
    drag(clipped, "β", (0.9, None), (0.4, None))
    assert (other.readout, other.png(), values(other)) == before


def test_a_ghost_while_a_hand_holds_on(clipped):
    clipped.reset()
    beta = next(i for i, handle in enumerate(clipped._handles) if handle.name == "β")
    axes = clipped._handles[beta].axes
    at = [share(clipped, axes, x, 100) for x in (REACH, 0.6)]
    hold = {"drag": 0.5, "grip": [beta, 0], "start": at[0], "at": at[1]}
    before = clipped.readout["sqnr_db"]
    clipped._picture.pointer = hold | {"held": True}
    held, change = clipped.png(), clipped.readout["sqnr_db"] - before
    assert f"{change:+.2f}"[:3].replace("-", "−") in clipped._picture.numbers
    clipped._picture.pointer = hold | {"held": False}
    assert clipped.png() != held


@pytest.fixture(scope="module")
def mapped():
    return mapping()


def data(explorer):
    return [float(word) for word in values(explorer)["data"].split(",")]


@pytest.mark.parametrize("index, stops, expected", [(1, (0.4, 3.333), 3.33), (3, (-2.0,), -2.0),
                                                    (1, (9.0, -99.0), -16.2)])
def test_a_value_of_the_mapping(mapped, index, stops, expected):
    mapped.reset()
    drag(mapped, "a value", *((stop, 1) for stop in stops), mark=index)
    assert data(mapped) == [expected if i == index else v for i, v in enumerate(SEVEN)]
    assert mapped.readout["clipped"] == "0 of 7"
    assert mapped.controls["alpha"].max == 16.2
    if expected != -16.2:  # what is typed sets new limits
        assert_as_undragged(mapped, mapping)


def test_the_line_stands_still_under_the_largest_value(mapped):
    mapped.reset()
    for stop in (14.0, 2.0):
        drag(mapped, "a value", (13.0, 1), (stop, 1), mark=6)
        assert data(mapped)[6] == stop
        assert mapped.figure.axes[0].get_xlim() == (-16.2, 16.2)
        assert values(mapped)["beta"] == max(7.59, stop) == mapped.readout["scale"] * 127
    mapped.reset()
    assert values(mapped) == values(mapping())


@pytest.mark.parametrize("name, stop, expected", [("α", -4.0, (-4.0, 10.8)), ("β", 6.04, (-10.8, 6.0)),
                                                  ("α", 99.0, (10.7, 10.8)), ("β", -99.0, (-10.8, -10.7))])
def test_the_ends_of_the_mapping(mapped, name, stop, expected):
    mapped.reset()
    drag(mapped, name, (0.0, None), (stop, None))
    now = values(mapped)
    assert (now["alpha"], now["beta"]) == pytest.approx(expected)
    assert now["scheme"] == "α, β"
    assert_as_undragged(mapped, mapping)


def test_a_click_on_an_end_leaves_the_scheme(mapped):
    mapped.reset()
    mapped.set(scheme="zero-point")
    drag(mapped, "α")
    assert (values(mapped)["scheme"], values(mapped)["alpha"]) == ("zero-point", -7.59)


def test_steps_are_written_beside_clipped_values(mapped):
    mapped.reset()
    mapped.set(alpha=-8.0, beta=5.0)
    x_hat = mapped.readout["scale"] * (127 - mapped.readout["zero_point"])
    shown = [text.get_text() for text in mapped.figure.axes[1].texts if text.get_visible()]
    expected = [f"{(v - x_hat) / mapped.readout['scale']:+.{digits}f}" for v, digits in ((10.8, 0), (5.47, 1))]
    assert shown == [*expected, "α", "β"]


def test_many_values_are_not_taken():
    explorer = mapping(np.linspace(-1, 1, 1000))
    assert not marks(explorer, "a value")
    assert len(marks(explorer, "α")) == 1
    assert any("drawn of 1,000: 40 above, 500 below" in text.get_text() for text in explorer.figure.texts)


def test_what_is_under_the_pointer_of_the_mapping(mapped):
    mapped.reset()
    for axes, y in ((0, 0.97), (1, 0.3)):
        mapped._picture.pointer = {"hover": share(mapped, mapped.figure.axes[axes], 5.5, y)}
        assert mapped._picture.tip.splitlines()[:2] == ["x = 5.47", "x / s = 64.3231"]
    for axes, x, y in ((0, 5.47, 0.2), (1, 7.0, 0.3)):
        mapped._picture.pointer = {"hover": share(mapped, mapped.figure.axes[axes], x, y)}
        assert not mapped._picture.tip


@pytest.mark.parametrize("name, first, stops, expected", [
    ("FP4 E2M1", "1", (2.3, 3.4), "3"), ("FP4 E2M1", "1", (-99.0,), "−6"), ("FP8 E4M3", "−0", (100.0,), "104"),
    ("FP8 E5M2", "1", (99999.0,), "57344"),
])
def test_a_number_on_its_line(name, first, stops, expected):
    explorer = float_bits(first, name)
    assert not marks(explorer, "the power of two")
    drag(explorer, "the number", *((stop, 0) for stop in stops))
    assert explorer.readout["stored"] == expected
    assert values(explorer)["value"] == expected
    fmt = explorer.controls["code"].format
    assert decode(values(explorer)["code"], fmt) == float(expected.replace("−", "-"))
    assert_as_undragged(explorer, partial(float_bits, expected, name))


@pytest.mark.parametrize("name, stop, expected", [
    ("FP32", 0.0, -118.625 / 128), ("FP32", 20.0, -118.625 * 2**13), ("FP16", 150.0, -118.625 * 2**9),
    ("BF16", -159.0, -(2.0**-133)),
])
def test_a_power_in_its_reach(name, stop, expected):
    explorer = float_bits(-118.625, name)
    assert not marks(explorer, "the number")
    drag(explorer, "the power of two", (3.0, None), (stop, None))
    stored = float(decode(values(explorer)["code"], explorer.controls["code"].format))
    assert stored == expected if name != "BF16" else 2.0**-133 <= -stored <= 2.0**-132
    assert values(explorer)["hex"] == explorer.readout["hex"]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name, first", [("FP4 E2M1", "−0"), ("FP8 E4M3", "NaN"), ("FP8 E5M2", "inf"), ("FP32", "0"),
                                         ("FP32", "NaN"), ("FP64", "1e300")])
def test_what_has_no_place_is_not_taken(name, first):
    explorer = float_bits(first, name)
    assert len(explorer._picture.grips) == (first == "−0")


def test_all_digits_of_neighbours():
    explorer = float_bits("0.1", "FP6 E2M3")
    shown = [text.get_text() for text in explorer.figure.axes[1].texts]
    assert shown[:3] == ["0", "0.125", "0.25"]
    explorer.set(format="FP6 E3M2")
    shown = [text.get_text() for text in explorer.figure.axes[1].texts]
    assert shown[:3] == ["0.0625", "0.125", "0.1875"]
    assert set(shown[3:]) == {"← 0.0625 →"}
    explorer.set(format="FP64")
    assert all(len(text.get_text()) < 25 for text in explorer.figure.axes[1].texts)


@pytest.fixture(scope="module")
def drifting():
    return drift(ACTIVATIONS, samples.load("new_activations"))


@pytest.mark.parametrize("name, mark, start, stops, gain", [
    ("the gain", 0, (1.0, 20), (3.0, 2.0), 2.0), ("the gain", 0, (1.0, 20), (0.01,), 0.25),
    ("the data, times the gain", 1, (1.0, 20), (0.2, 1.5), 1.5),
    ("the data, times the gain", 0, (-1.0, 20), (-0.5,), 0.5),
    ("the data, times the gain", 1, (1.0, 20), (-3.0,), 0.25),
])
def test_the_gain(drifting, name, mark, *, start, stops, gain):
    drifting.reset()
    drag(drifting, name, *((stop, 20) for stop in stops), mark=mark, start=start)
    assert values(drifting)["gain"] == pytest.approx(gain, rel=0.02)
    assert drifting.readout["gain"] == values(drifting)["gain"]
    assert (drifting.readout["alpha"], drifting.readout["beta"]) == (ACTIVATIONS.min(), ACTIVATIONS.max())


@pytest.mark.parametrize("scheme", ["absmax", "zero-point"])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_what_shares_a_scale_under_the_pointer(per, scheme):
    w = np.random.default_rng(0).standard_normal((6, 64)) * np.arange(1, 7)[:, None]
    explorer = granularity(w, bits=3)
    explorer.set(per=per, scheme=scheme, group_size=16)
    order = np.argsort(-np.abs(w).max(axis=1))
    shares = {"tensor": w, "channel": w[order[2]], "group": w[order[2], 32:48]}[per]
    make = affine.absmax_params if scheme == "absmax" else affine.zero_point_params
    params, tensor = make(shares, 3), affine.absmax_params(w, 3)
    some = shares if per == "group" else w[order[2]]
    rms = np.sqrt(affine.mse(some, affine.fake_quantize(some, params)))
    where = ", inputs 32–47" if per == "group" else ""
    explorer._picture.pointer = {"hover": share(explorer, explorer.figure.axes[0], 40.5, 2.5)}
    assert explorer._picture.tip.splitlines() == [
        f"output channel {order[2]}{where}", f"largest |w| {np.abs(some).max():.4g}, scale {params.scale:.4g}",
        f"RMS error {rms / tensor.scale:.3f} steps of the per-tensor grid",
    ]
    explorer._picture.pointer = {"hover": share(explorer, explorer.figure.axes[1], 0.1, 2.5)}
    assert explorer._picture.tip.startswith(f"output channel {order[2]}\nlargest")
    explorer._picture.pointer = {"hover": share(explorer, explorer.figure.axes[2], 4, 20)}
    assert not explorer._picture.tip
