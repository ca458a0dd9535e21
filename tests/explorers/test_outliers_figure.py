"""The live figures of lesson 05: each control over its whole range, and what they show against NumPy alone."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from mpl_toolkits.mplot3d import Axes3D
from torch import nn

from qlab import samples
from qlab.explorers import landscape, outliers, outliers_figure
from qlab.explorers.colors import GREY, VERMILION
from qlab.explorers.outliers_figure import CLIP, FLOAT, FP8, INTEGER, KEEP, ZERO
from qlab.outliers import GRANULARITIES
from tests.explorers.checks import (
    assert_compute_draws_nothing,
    assert_pairs_meet,
    assert_refuses,
    assert_same_whichever_way,
    assert_words,
    between,
    figures,
    own,
    pairwise,
    pictures_along,
    read_only,
    sweep,
    values,
    without_pixels,
)

THRESHOLDS = [2.0 ** place for place in between(-2, 12)]
PRODUCTS = samples.products()
PLACES = list(PRODUCTS)
TREATMENTS = (KEEP, CLIP, ZERO, FLOAT)
MAKERS = {"outliers": outliers, "landscape": landscape}
START = {
    "outliers": {"place": PLACES[0], "granularity": "tensor", "number_format": INTEGER, "bits": 8, "treatment": KEEP,
                 "threshold": 6, "without_token_0": False},
    "landscape": {"place": PLACES[0]},
}
SETTINGS = [
    ("outliers", {}), ("landscape", {}),
    ("outliers", {"place": (11, "down_in"), "granularity": "group", "bits": 4, "treatment": FLOAT, "threshold": 3}),
    ("outliers", {"place": (29, "mlp_in"), "granularity": "channel", "bits": 3, "treatment": CLIP, "threshold": 2}),
    ("outliers", {"place": (11, "down_in"), "number_format": FP8, "treatment": ZERO, "threshold": 3,
                  "without_token_0": True}),
]
CONTROLS = [(name, setting, control) for name, setting in SETTINGS for control in START[name]
            if (control != "threshold" or setting) and (control != "bits" or "number_format" not in setting)]
WHITE, ORANGE = [255, 255, 255, 255], [230, 159, 0, 255]


VALUES = {"place": PLACES, "granularity": list(GRANULARITIES), "number_format": [INTEGER, FP8], "bits": [*range(2, 9)],
          "treatment": list(TREATMENTS), "threshold": list(THRESHOLDS), "without_token_0": [False, True]}
ALL_PAIRS = sorted(pairwise(VALUES), key=lambda setting: PLACES.index(setting["place"]))  # few new backgrounds
OWN_PAIRS = list(pairwise({name: VALUES[name] for name in ("granularity", "treatment", "number_format",
                                                            "without_token_0")}))
shared, put = figures(MAKERS, START)
_, put_another = figures(MAKERS, START)


# NumPy alone


def rows_of(x, granularity, group_size):
    """What shares a scale as rows, and the way back."""
    rows = {"tensor": lambda: x.reshape(1, -1), "token": lambda: x, "channel": lambda: x.T,
            "group": lambda: x.reshape(-1, group_size)}[granularity]()
    return rows, lambda v: np.broadcast_to(v, rows.shape).T if granularity == "channel" else np.broadcast_to(
        v, rows.shape).reshape(x.shape)


def integers(x, granularity, bits, group_size):
    """x̂, |q − z| and step of each value, in float32."""
    rows, back = rows_of(x, granularity, group_size)
    alpha, beta = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    s = np.where(beta > alpha, (beta - alpha) / np.float32(2**bits - 1), np.float32(1))
    z = (-(2 ** (bits - 1)) - np.rint(alpha / s)).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    s, z = (back(v[:, None]) for v in (s, z))
    code = (np.rint(x / s) + z).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - z
    return s * code, np.abs(code), s


def eight_bit_floats(x, granularity, group_size):
    """x̂ by ml_dtypes, the seven bits below the sign, and the step at 0."""
    rows, back = rows_of(x, granularity, group_size)
    largest = np.abs(rows).max(1, keepdims=True)
    s = back(np.where(largest > 0, largest / np.float32(448), np.float32(1)))
    stored = (x / s).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return s * stored.astype(np.float32), stored.view(np.uint8) & 127, s / np.float32(512)


def directly(x, *, granularity, number_format, bits, treatment, threshold, without_token_0, group_size=64, **_):
    """x̂, code and step of each value, what the treatment touches, what is quantized and what stays in float."""
    large = {KEEP: np.zeros(x.shape, bool), FLOAT: np.broadcast_to((np.abs(x) >= threshold).any(0), x.shape)}.get(
        treatment, np.abs(x) >= threshold)
    ahead = np.arange(len(x))[:, None] < without_token_0 + np.zeros((1, x.shape[1]))
    small = np.where(large, np.sign(x) * np.float32(threshold) if treatment == CLIP else np.float32(0), x)
    small = np.where(ahead, np.float32(0), small)
    x_hat, code, s = (eight_bit_floats(small, granularity, group_size) if number_format == FP8 else
                      integers(small, granularity, bits, group_size))
    in_float = ahead | large if treatment == FLOAT else ahead
    return np.where(in_float, x, x_hat), code, s, large | ahead, small, in_float


def output_errors(x, w, x_hat, first):
    """In percent, of each token from ``first`` on that has an output; [0] if there is none."""
    x, x_hat = x[first:], x_hat[first:]
    y, y_hat = ((torch.tensor(a).double() @ torch.tensor(w).double().T).numpy() for a in (x, x_hat))  # in one thread
    size, wrong = (np.sqrt((a**2).sum(1)) for a in (y, y_hat - y))
    return 100 * wrong[size > 0] / size[size > 0] if (size > 0).any() else np.zeros(1)


def axes_of(explorer):
    """The heat map, the magnitudes and the bars."""
    axes = explorer.figure.axes
    return [next(a for a in axes if words in (a.get_ylabel(), a.get_title()))
            for words in ("token", "|x|", "error of the output")]


def assert_reads_and_shows(explorer, x, w, group_size=64):
    setting = {name: control.value for name, control in explorer.controls.items()}
    granularity, treatment = setting["granularity"], setting["treatment"]
    x_hat, code, s, touched, small, kept = directly(x, **setting, group_size=group_size)
    first, most = int(setting["without_token_0"]), 126 if setting["number_format"] == FP8 else 2 ** setting["bits"] - 1
    errors = {each: output_errors(x, w, directly(x, **setting | {"granularity": each}, group_size=group_size)[0], first)
              for each in GRANULARITIES}
    noise = np.sum((x.astype(np.float64) - x_hat) ** 2)
    ordinary = (x != 0) & ~touched
    readout = dict(explorer.readout)
    assert readout.pop("scale_leaves_the_sum") == {"channel": "no", "group": "of each group's part"}.get(
        granularity, "yes")
    assert readout == pytest.approx({
        "output_error_percent": errors[granularity].mean(), "worst_token_percent": errors[granularity].max(),
        "sqnr_db": 10 * np.log10(np.sum(x[first:].astype(np.float64) ** 2) / noise) if noise else np.inf,
        "others_to_zero_percent": 100 * np.mean(code[ordinary] == 0) if ordinary.any() else 0,
        "treated_percent": 100 * touched.mean(),
    }, rel=1e-3, abs=1e-4)

    heat, profile, bars = axes_of(explorer)
    pool = -(-x.shape[1] // 800)
    colors = np.asarray(heat.images[0].get_array())
    columns = [slice(start, start + pool) for start in range(0, x.shape[1], pool)]
    assert colors.shape == (len(x), len(columns), 4)
    orange = np.stack([kept[:, column].any(1) for column in columns], axis=1)
    white = np.stack([(code[:, column] == 0).all(1) for column in columns], axis=1) & ~orange
    np.testing.assert_array_equal((colors == ORANGE).all(2), orange)
    np.testing.assert_array_equal((colors == WHITE).all(2), white)
    largest = np.stack([code[:, column].max(1) for column in columns], axis=1) / most
    order = np.argsort(largest, axis=None)
    darkness = -colors[..., :3].astype(int).sum(2).ravel()[order]
    rising = darkness[~orange.ravel()[order]]
    assert (np.diff(rising) >= -3).all()  # viridis is rounded to bytes
    assert heat.images[0].get_extent() == [0, x.shape[1], len(x), 0]

    least, coarsest = [line for line in profile.lines if line.get_animated()][:2]
    empty = ~small.any(0)
    steps = s[first:] if len(x) > 1 else s
    for line, ends in ((least, steps.min(0)), (coarsest, steps.max(0))):
        np.testing.assert_allclose(line.get_ydata()[::2], np.where(empty, np.nan, ends / 2), rtol=1e-6)
        np.testing.assert_array_equal(line.get_ydata()[::2], line.get_ydata()[1::2])
        np.testing.assert_array_equal(line.get_xdata(), np.arange(x.shape[1] + 1).repeat(2)[1:-1])
    at = [line for line in profile.lines if line.get_animated()][2]
    assert at.get_visible() == (treatment != KEEP)
    if treatment != KEEP:
        assert list(at.get_ydata()) == [setting["threshold"]] * 2
    peaks, typical = [line for line in profile.lines if not line.get_animated()]
    np.testing.assert_array_equal(peaks.get_ydata()[1::3], np.abs(x).max(0))
    np.testing.assert_allclose(typical.get_ydata(), np.median(np.abs(x), axis=0), rtol=1e-6)
    low, high = profile.get_ylim()
    assert 0 < low < np.abs(x).max() < high

    *lines, worst = bars.lines
    for line, text, (each, of_tokens) in zip(lines, bars.texts, errors.items(), strict=True):
        start, end = line.get_xdata()
        assert (start, end) == pytest.approx((0.03, np.clip(of_tokens.mean(), 0.03, 300)), rel=3e-3)
        assert to_rgba(line.get_color()) == to_rgba(VERMILION if each == granularity else GREY)
        assert text.get_fontweight() == ("bold" if each == granularity else "normal")
        assert float(text.get_text().removesuffix(" %")) == pytest.approx(of_tokens.mean(), rel=0.051, abs=1e-4)
    np.testing.assert_allclose(worst.get_xdata(), np.clip([e.max() for e in errors.values()], 0.03, 300), rtol=3e-3)
    assert list(worst.get_ydata()) == [0, 1, 2, 3]


# what ships


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    pictures = pictures_along(put(name, setting), control, redrawn=["place"])
    if control == "threshold":  # far above the largest value it lies outside of the picture
        largest = np.abs(PRODUCTS[shared(name).controls["place"].value][0]).max()
        pictures = pictures[:np.searchsorted(THRESHOLDS, 3 * largest)]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("setting", ALL_PAIRS, ids=lambda setting: " ".join(map(str, setting.values())))
def test_outliers_reads_and_shows_what_numpy_computes(setting):
    assert_reads_and_shows(put("outliers", setting), *PRODUCTS[setting["place"]])


def test_each_value_meets_each_other():
    assert_pairs_meet(ALL_PAIRS, VALUES)
    assert len(ALL_PAIRS) < 250
    assert {name: sweep(control) for name, control in shared("outliers").controls.items()} == VALUES


@pytest.mark.parametrize("name, setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    assert_same_whichever_way(shared(name), put_another(name, setting))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    fresh = MAKERS[name]()
    assert values(fresh) == START[name]
    assert_words(fresh)
    if name == "outliers":
        assert [label.get_text() for label in axes_of(fresh)[2].get_yticklabels()] == list(GRANULARITIES)


@pytest.mark.parametrize("name", MAKERS)
def test_compute_draws_nothing(name):
    assert_compute_draws_nothing(put(name, {}), [{"place": place} for place in PLACES])


def test_a_threshold_needs_a_treatment():
    explorer = put("outliers", {})
    threshold = explorer.controls["threshold"]
    assert threshold.disabled
    for treatment in (CLIP, ZERO, FLOAT):
        explorer.controls["treatment"].value = treatment
        assert not threshold.disabled
        explorer.controls["treatment"].value = KEEP
        assert threshold.disabled
    kept = explorer.readout, explorer.png()
    for value in THRESHOLDS:
        explorer.set(threshold=value)
        assert (explorer.readout, explorer.png()) == kept


def test_bits_are_those_of_integers():
    explorer = put("outliers", {"number_format": FP8})
    assert explorer.controls["bits"].disabled
    kept = explorer.readout, explorer.png()
    explorer.set(bits=3)
    assert (explorer.readout, explorer.png()) == kept
    explorer.set(number_format=INTEGER)
    assert not explorer.controls["bits"].disabled


@pytest.mark.usefixtures("unseen")
def test_what_outliers_do_and_what_helps():
    def error(**setting):
        return put("outliers", setting).readout["output_error_percent"]

    assert error() > 3 * error(granularity="channel")
    assert error(treatment=FLOAT) < 0.5 * error()
    assert error(number_format=FP8) < 0.6 * error()  # an uneven grid is half of the cure
    massive = {"place": (11, "down_in")}
    assert error(**massive, number_format=FP8) < 0.05 * error(**massive)
    assert error(**massive, without_token_0=True) < 0.1 * error(**massive)
    put("outliers", massive)
    assert put("outliers", massive).readout["others_to_zero_percent"] > 80
    assert put("outliers", massive | {"granularity": "token"}).readout["others_to_zero_percent"] < 20
    assert error(**massive, treatment=ZERO, threshold=64) > 1  # of token 0 nothing is left
    finer = {granularity: error(**massive, granularity=granularity) for granularity in ("token", "channel", "group")}
    assert max(finer.values()) < 0.05 * error(**massive)
    assert min(finer, key=finer.get) == "group"


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bits_to_start_with(bits):
    explorer = outliers({PLACES[0]: PRODUCTS[PLACES[0]]}, bits)
    assert explorer.controls["bits"].value == bits
    assert explorer.readout == put("outliers", {"bits": bits}).readout


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("place", PLACES)
def test_landscape_reads_and_shows_the_magnitudes(place, monkeypatch):
    drawn, plot = [], Axes3D.plot_surface
    monkeypatch.setattr(Axes3D, "plot_surface", lambda axes, *grid, **more: drawn.append(grid) or plot(
        axes, *grid, **more))
    explorer = landscape()
    explorer.set(place=place)
    size = np.abs(PRODUCTS[place][0])
    token, channel = np.unravel_index(size.argmax(), size.shape)
    median = np.sort(size, axis=None)[(size.size - 1) // 2]
    assert explorer.readout == pytest.approx({
        "largest": size.max(), "at_token": token, "at_channel": channel, "median": median,
        "largest_to_median": size.max() / median})
    assert_surface(explorer.figure.axes[0], drawn[-1], size)
    ticks = explorer.figure.axes[0].get_zticks()
    assert len(ticks) > 1
    assert [float(label.get_text()) for label in explorer.figure.axes[0].get_zticklabels()] == pytest.approx(10**ticks)


def assert_surface(axes, grid, size):
    """Every corner of the surface is the largest value of its part, on a logarithmic axis; the smallest are flat."""
    floor = np.float32(max(min(3 * np.sort(size, axis=None)[(size.size - 1) // 2], size.max() / 10), 1e-6 * size.max()))
    size = np.log10(np.maximum(size, floor))
    channels, tokens, heights = map(np.asarray, grid)
    assert (channels == channels[0]).all() and (tokens.T == tokens[:, 0]).all()
    rows, columns = tokens[:, 0], channels[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, len(size), 0, size.shape[1])
    assert max(len(rows), len(columns)) <= 201
    for (i, top), (j, left) in itertools.product(enumerate(rows[:-1]), enumerate(columns[:-1])):
        assert heights[i, j] == pytest.approx(size[top:rows[i + 1], left:columns[j + 1]].max(), abs=1e-5)
    np.testing.assert_array_equal(heights[-1], heights[-2])
    np.testing.assert_array_equal(heights[:, -1], heights[:, -2])
    (surface,) = axes.collections
    assert len(surface.get_facecolor()) == (len(rows) - 1) * (len(columns) - 1)  # no row and no column is skipped
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, size.shape[1]), (0, len(size)))
    assert axes.get_zlim() == pytest.approx((np.log10(floor), size.max() + np.log10(1.05)), abs=1e-5)


# places of one's own


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, channels, outputs", [
    (7, 100, 5), (1, 64, 3), (1, 1, 1), (9, 1, 2), (3, 65, 1), (500, 8, 4), (2, 801, 1), (2, 1601, 1), (4, 128, 1),
])
def test_other_shapes(tokens, channels, outputs):
    x, w = own(tokens, channels, outputs)
    explorer = outliers({(3, "o_in"): (x, w)}, bits=4)
    with without_pixels():
        for setting in OWN_PAIRS:
            explorer.set(**setting, threshold=1)
            assert_reads_and_shows(explorer, x, w, group_size=64 if channels % 64 == 0 else channels)
    explorer.set()
    assert not explorer.errors


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, channels", [(7, 100), (1, 64), (1, 1), (9, 1), (500, 8), (201, 401), (200, 200)])
def test_landscapes_of_other_shapes(tokens, channels, monkeypatch):
    drawn, plot = [], Axes3D.plot_surface
    monkeypatch.setattr(Axes3D, "plot_surface", lambda axes, *grid, **more: drawn.append(grid) or plot(
        axes, *grid, **more))
    x, w = own(tokens, channels)
    x[tokens * 3 // 5, channels // 2] = 1000  # a needle
    explorer = landscape({(3, "o_in"): (x, w)})
    assert (explorer.readout["at_token"], explorer.readout["at_channel"]) == (tokens * 3 // 5, channels // 2)
    assert_surface(explorer.figure.axes[0], drawn[-1], np.abs(x))


@pytest.mark.filterwarnings("error")
def test_constant_columns_and_tokens_of_zeros():
    x, w = own(6, 64)
    x[:, 3], x[:, 5], x[:, 9], x[2] = 4.5, -0.25, 0, 0
    explorer = outliers({(0, "attn_in"): (x, w)})
    for granularity, treatment in itertools.product(GRANULARITIES, TREATMENTS):
        explorer.set(granularity=granularity, treatment=treatment, threshold=4)
        assert_reads_and_shows(explorer, x, w)
    constant = np.float32([[1, -2, 0, 0.5]] * 3)
    explorer = outliers({(0, "attn_in"): (constant, np.eye(4))})
    explorer.set(granularity="channel")
    assert explorer.readout["output_error_percent"] == pytest.approx(0, abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_everything_is_treated():
    x, w = own(6, 128)
    x += 10 * np.sign(x)
    explorer = outliers({(0, "attn_in"): (x, w)})
    for granularity in GRANULARITIES:
        explorer.set(granularity=granularity, treatment=ZERO, threshold=8)
        assert explorer.readout == pytest.approx({
            "output_error_percent": 100, "worst_token_percent": 100, "sqnr_db": 0, "others_to_zero_percent": 0,
            "treated_percent": 100, "scale_leaves_the_sum": explorer.readout["scale_leaves_the_sum"]})
        assert_reads_and_shows(explorer, x, w)
        explorer.set(treatment=FLOAT)
        assert explorer.readout["output_error_percent"] == 0
        assert explorer.readout["sqnr_db"] == np.inf
        assert_reads_and_shows(explorer, x, w)
        explorer.set(treatment=CLIP)
        assert_reads_and_shows(explorer, x, w)


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MAKERS)
def test_other_kinds_of_arrays(name):
    kinds = {
        "float32": np.array, "torch": torch.tensor, "torch float64": lambda a: torch.tensor(a, dtype=torch.float64),
        "float64": lambda a: a.astype(np.float64), "list": np.ndarray.tolist, "read-only": read_only,
        "parameter": lambda a: nn.Parameter(torch.tensor(a)), "columns first": np.asfortranarray,
    }
    x, w = own(6, 100)
    explorer = MAKERS[name]({(0, kind): (convert(x), convert(w)) for kind, convert in kinds.items()})
    expected, picture = explorer.readout, explorer.png()
    for kind in kinds:
        explorer.set(place=(0, kind))
        for key, value in expected.items():  # sums in the order of memory
            assert explorer.readout[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
        assert kind == "columns first" or explorer.png() == picture


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_data_is_left_alone_and_may_change_later(kind):
    x, w = map(kind, own(6, 64))
    kept = [a.tolist() for a in (x, w)]
    explorer = outliers({(0, "attn_in"): (x, w), (1, "attn_in"): (x, w)})
    explorer.set(treatment=CLIP, threshold=0.5)
    before = explorer.readout
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(w, kept[1])
    x *= 3
    w *= 2
    explorer.set(place=(1, "attn_in"))
    assert explorer.readout == before


@pytest.mark.parametrize("control, value", [("granularity", "row"), ("threshold", 5000), ("treatment", "drop"),
                                            ("bits", 9), ("number_format", "FP4")])
def test_a_bad_setting_is_told(control, value):
    assert_refuses(put("outliers", {}), control, value)


@pytest.mark.usefixtures("unseen")
def test_few_pixels_do_not_hide_a_code():
    assert outliers_figure._MOST_COLUMNS < 1536  # so that the pairs above meet pooled columns
    x, w = np.zeros((2, 1000), np.float32), np.ones((1, 1000), np.float32)
    x[0, 501], x[1, 998] = 1, 0.5
    explorer = outliers({(0, "attn_in"): (x, w)})
    colors = np.asarray(axes_of(explorer)[0].images[0].get_array())
    assert np.argwhere((colors != WHITE).any(2)).tolist() == [[0, 250], [1, 499]]
