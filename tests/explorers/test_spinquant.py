"""The live figures of lesson 07: each control over its whole range, and what they show against NumPy alone."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from matplotlib.colors import to_rgba

from qlab import samples
from qlab.explorers import rotation, rotation_2d, watch_rotation
from qlab.explorers import spinquant as rotations
from qlab.explorers.colors import GREY, VERMILION
from qlab.explorers.spinquant import (
    BUILT_IN,
    DIAGONAL,
    FOLDED,
    HADAMARD,
    NO_AXIS,
    NONE,
    ONE_AXIS,
    RANDOM_HADAMARD,
    RANDOM_ORTHOGONAL,
    WEIGHTS,
)
from qlab.spinquant import (
    ProxyInputs,
    hadamard,
    learn_rotation,
    proxy_loss,
    random_hadamard,
    random_orthogonal,
)
from tests.explorers.checks import (
    assert_compute_draws_nothing,
    assert_pairs_meet,
    assert_refuses,
    assert_same_whichever_way,
    assert_words,
    figures,
    in_a_cell,
    own,
    pairwise,
    pictures_along,
    values,
    without_pixels,
)

PRODUCTS = samples.products()
PLACES = list(PRODUCTS)
GAINS = samples.gains()
CLOUDS = (NO_AXIS, ONE_AXIS, DIAGONAL)
MAKERS = {"rotation_2d": rotation_2d, "rotation": rotation}
START = {
    "rotation_2d": {"theta": 0, "bits": 4, "outlier": ONE_AXIS},
    "rotation": {"place": PLACES[0], "rotate": NONE, "seed": 0, "bits": 4, "granularity": "token",
                 "weights": "float"},
}
SETTINGS = [
    ("rotation_2d", {}), ("rotation_2d", {"theta": 30, "bits": 7, "outlier": DIAGONAL}),
    ("rotation", {}), ("rotation", {"place": PLACES[2], "rotate": RANDOM_HADAMARD, "granularity": "tensor", "seed": 4}),
    ("rotation", {"place": PLACES[3], "rotate": RANDOM_ORTHOGONAL, "bits": 3, "weights": "4 bits"}),
]
CONTROLS = [(name, setting, control) for name, setting in SETTINGS for control in START[name]]


shared, put = figures(MAKERS, START)
_, put_another = figures(MAKERS, START)


@pytest.fixture(scope="module", autouse=True)
def each_random_rotation_is_made_once():
    """A QR decomposition for each place and seed takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotations, "random_hadamard", lru_cache(random_hadamard))
        patch.setattr(rotations, "random_orthogonal", lru_cache(random_orthogonal))
        yield


# both


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    pictures = pictures_along(put(name, setting), control, redrawn=["place"])
    # The bars of the random ones show the seed, whatever is selected; 8 bits of weights can look like float.
    assert len(set(pictures)) >= len(pictures) - (control == "weights")


@pytest.mark.parametrize("name, setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    assert_same_whichever_way(shared(name), put_another(name, setting))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    explorer = MAKERS[name]()
    assert values(explorer) == START[name]
    assert_words(explorer)


@pytest.mark.parametrize("name, changes", [
    ("rotation_2d", [{"outlier": cloud} for cloud in CLOUDS]),
    ("rotation", [{"rotate": rotate} for rotate in BUILT_IN]),
])
def test_compute_draws_nothing(name, changes):
    assert_compute_draws_nothing(put(name, {}), changes)


# two dimensions


def turn(theta):
    c, s = np.cos(np.deg2rad(theta)), np.sin(np.deg2rad(theta))
    return np.array([[c, s], [-s, c]])


def panels(explorer):
    """Grid, square, axis, levels and tokens of the rotated and of the original coordinates; points of shape (n, 2)."""
    return [dict(zip(("grid", "square", "axis", "levels", "tokens"), (line.get_xydata() for line in axes.lines),
                     strict=True)) for axes in explorer.figure.axes[:2]]


def tokens_of(outlier):
    return panels(put("rotation_2d", {"outlier": outlier}))[0]["tokens"]


def rounded(x, bits):
    top = 2 ** (bits - 1) - 1
    step = np.abs(x).max() / top
    return step * np.rint(x / step)


def rows(points):
    """As a set, so that the order does not matter."""
    return {tuple(point) for point in np.round(points, 6) + 0.0}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("theta", [0, 1, 17, 45, 60, 89, 90])
@pytest.mark.parametrize("outlier", CLOUDS)
def test_2d_reads_and_shows_what_numpy_computes(outlier, theta):
    x = tokens_of(outlier)
    for bits in range(2, 9):
        explorer = put("rotation_2d", {"theta": theta, "bits": bits, "outlier": outlier})

        def error(angle, bits=bits):
            return np.sqrt(np.sum((x @ turn(angle) - rounded(x @ turn(angle), bits)) ** 2) / np.sum(x**2))

        y, top = x @ turn(theta), 2 ** (bits - 1) - 1
        assert explorer.readout == pytest.approx({
            "theta": theta, "max": np.abs(y).max(), "kurtosis": scipy.stats.kurtosis(y, axis=None, fisher=False),
            "error_percent": 100 * error(theta), "without_rotation_percent": 100 * error(0)}, rel=1e-6)

        turned, back = panels(explorer)
        corner, step = np.abs(y).max(), np.abs(y).max() / top
        np.testing.assert_allclose(turned["tokens"], y, atol=1e-9)
        assert rows(turned["levels"]) == rows(rounded(y, bits))
        np.testing.assert_allclose(np.abs(turned["square"]), corner)
        assert len(rows(turned["square"])) == 4
        assert rows(turned["axis"] / np.linalg.norm(turned["axis"], axis=1)[:, None]) == rows(
            np.array([[1, 0], [-1, 0]]) @ turn(theta))
        ends = turned["grid"][~np.isnan(turned["grid"]).any(1)]
        if bits > 6:
            assert not ends.size
        else:
            levels = step * np.arange(-top, top + 1)
            wanted = [(v, side * corner) for v in levels for side in (-1, 1)]
            assert rows(ends) == rows(np.array(wanted + [point[::-1] for point in wanted]))
        for name, points in turned.items():
            np.testing.assert_allclose(back[name], points @ turn(theta).T, atol=1e-9)
        np.testing.assert_allclose(back["tokens"], x, atol=1e-9)

        curves = explorer.figure.axes[2]
        one, *lines, now, marker = curves.lines
        assert list(one.get_ydata()) == [1, 1]
        ratios = (error, lambda a: np.abs(x @ turn(a)).max(),
                  lambda a: scipy.stats.kurtosis(x @ turn(a), axis=None, fisher=False))
        for line, of in zip(lines, ratios, strict=True):
            for angle in (0, 20, theta, 90):
                assert line.get_xdata()[angle] == angle
                assert line.get_ydata()[angle] == pytest.approx(of(angle) / of(0), rel=1e-6)
            low, high = curves.get_ylim()
            assert low < line.get_ydata().min() <= line.get_ydata().max() < high
        assert list(now.get_xdata()) == [theta] * 2
        assert marker.get_xydata() == pytest.approx(np.array([[theta, lines[0].get_ydata()[theta]]]))


@pytest.mark.usefixtures("unseen")
def test_clouds():
    none, one, diagonal = map(tokens_of, CLOUDS)
    assert none.shape == (400, 2)
    assert one.mean(0) == pytest.approx([0, 0], abs=1e-9)
    np.testing.assert_allclose(diagonal, one @ turn(45), atol=1e-12)
    assert np.sum(none**2) == pytest.approx(np.sum(one**2))
    assert one.std(0) == pytest.approx([5, 1], rel=0.1)
    assert none.std(0)[0] == pytest.approx(none.std(0)[1], rel=0.1)
    for axes in shared("rotation_2d").figure.axes[:2]:
        assert max(np.abs(cloud @ turn(theta)).max() for cloud in (none, one, diagonal) for theta in range(0, 91, 5)) \
            < axes.get_xlim()[1] == axes.get_ylim()[1] == -axes.get_xlim()[0] == -axes.get_ylim()[0]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("outlier", CLOUDS)
def test_a_quarter_turn_exchanges_the_channels(outlier, bits):
    none, quarter = (put("rotation_2d", {"theta": theta, "bits": bits, "outlier": outlier}).readout
                     for theta in (0, 90))
    for readout in (none, quarter):
        assert readout["error_percent"] == pytest.approx(readout["without_rotation_percent"], rel=1e-9)
    for key in ("max", "kurtosis", "error_percent"):
        assert quarter[key] == pytest.approx(none[key], rel=1e-9)
    if outlier != NO_AXIS:  # the clouds are 45° apart
        other = ONE_AXIS if outlier == DIAGONAL else DIAGONAL
        turned = put("rotation_2d", {"theta": 45, "bits": bits, "outlier": other}).readout
        for key in ("max", "kurtosis", "error_percent"):
            assert turned[key] == pytest.approx(none[key], rel=1e-9)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", range(4, 9))
def test_no_rotation_is_best_for_all_data(bits):
    def ratio(outlier):
        readout = put("rotation_2d", {"theta": 45, "bits": bits, "outlier": outlier}).readout
        return readout["error_percent"] / readout["without_rotation_percent"]

    assert ratio(ONE_AXIS) < 0.8
    assert ratio(DIAGONAL) > 1.25
    assert 0.9 < ratio(NO_AXIS) < 1.1


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("outlier", CLOUDS)
def test_the_best_angle(outlier, bits):
    explorer = put("rotation_2d", {"theta": 10, "bits": bits, "outlier": outlier})
    explorer.press("best θ")
    assert explorer.controls["bits"].value == bits
    theta = explorer.controls["theta"].value
    assert theta == int(theta)
    x = tokens_of(outlier)
    errors = [np.linalg.norm(y - rounded(y, bits)) for y in (x @ turn(angle) for angle in range(91))]
    assert errors[int(theta)] <= min(errors) * (1 + 1e-9)


# a real layer


@lru_cache(16)
def matrix(rotate, n, seed):
    if rotate in (NONE, FOLDED):
        return np.eye(n)
    if rotate == HADAMARD:
        return hadamard(n, torch.float64).numpy() / np.sqrt(n)
    make = rotations.random_hadamard if rotate == RANDOM_HADAMARD else rotations.random_orthogonal
    return make(n, seed).double().numpy()


def quantized(x, bits, granularity):
    """x̂ and the step of each token, or of each of its groups."""
    if granularity == "group":
        x_hat, s = quantized(x.reshape(-1, x.shape[1] if x.shape[1] % 32 else 32), bits, "token")
        return x_hat.reshape(x.shape), s
    parts = x.reshape(1, -1) if granularity == "tensor" else x
    alpha, beta = np.minimum(parts.min(1), 0)[:, None], np.maximum(parts.max(1), 0)[:, None]
    s = np.where(beta > alpha, (beta - alpha) / (2**bits - 1), 1)
    z = -np.rint(alpha / s)
    return s * ((np.rint(x / s) + z).clip(0, 2**bits - 1) - z), s


def product(a, b):
    return (torch.tensor(a) @ torch.tensor(b)).numpy()  # in one thread


def rounded_rows(w, weights):
    return np.stack([rounded(row, WEIGHTS[weights]) if row.any() else row for row in w]) if WEIGHTS[weights] else w


def assert_reads_and_shows(explorer, x, w, matrices, gain=1):
    """``matrices``: of each rotation; where ``gain`` is, they turn x / gain."""
    setting = {name: control.value for name, control in explorer.controls.items()}
    x, w = x.astype(np.float64), w.astype(np.float64)
    y = product(x, w.T)
    size = np.linalg.norm(y, axis=1)
    errors = {}
    for name, r in matrices.items():
        own_gain = 1 if name == NONE else gain
        turned = product(x / own_gain, r)
        x_hat, s = quantized(turned, setting["bits"], setting["granularity"])
        w_hat = rounded_rows(product(w * own_gain, r), setting["weights"])
        wrong = np.linalg.norm(product(x_hat, w_hat.T) - y, axis=1)
        errors[name] = 100 * wrong[size > 0] / size[size > 0]
        if name == setting["rotate"]:
            now, now_hat, steps = turned, x_hat, s
    mean = {name: error.mean() for name, error in errors.items()}
    constant = now.min() == now.max()
    assert explorer.readout == pytest.approx({
        "max": np.abs(now).max(), "kurtosis": np.nan if constant else scipy.stats.kurtosis(now, None, fisher=False),
        "output_error_percent": mean[setting["rotate"]], "worst_token_percent": errors[setting["rotate"]].max(),
        "without_rotation_percent": mean[NONE],
        "to_zero_percent": 100 * np.mean(now_hat[now != 0] == 0)}, rel=5e-3, abs=1e-3, nan_ok=True)

    profile, histogram, bars = explorer.figure.axes
    before, after, *halves = profile.lines
    np.testing.assert_allclose(before.get_ydata()[1::3], np.abs(x).max(0), rtol=1e-6)
    low, high = profile.get_ylim()
    assert 0 < low < np.abs(now).max() < high
    np.testing.assert_allclose(after.get_ydata(), np.abs(now).max(0), rtol=1e-4, atol=1e-6 * np.abs(x).max())
    np.testing.assert_array_equal(after.get_xdata(), np.arange(x.shape[1]) + 0.5)
    line, curve = histogram.lines
    for half in (*halves, line):
        heights = half.get_ydata()[~np.isnan(half.get_ydata())]
        assert heights == pytest.approx([steps.min() / 2] * 2 + [steps.max() / 2] * 2, rel=1e-4)
    counts, edges = curve.get_xdata()[::2], np.append(curve.get_ydata()[::2], curve.get_ydata()[-1])
    assert len(edges) == 61
    of_now, of_before = (np.histogram(np.abs(a), edges)[0] for a in (now, x))
    assert np.abs(counts - of_now.clip(0.7)).sum() <= 4 + 1e-3 * x.size  # float32 moves some over an edge
    (area,) = histogram.collections
    corners = area.get_paths()[0].vertices
    for lower, upper, count in zip(edges, edges[1:], of_before, strict=False):
        inside = corners[(corners[:, 1] >= lower * 0.999) & (corners[:, 1] <= upper * 1.001), 0]
        assert inside == pytest.approx(inside) and (np.abs(inside - max(count, 0.7)) <= 2).any()
    assert histogram.get_ylim() == profile.get_ylim()
    assert counts.max() < histogram.get_xlim()[1]

    assert_bars(bars, setting["rotate"], errors, matrices)


def assert_bars(bars, rotate, errors, matrices):
    """All have a bar and a diamond."""
    mean = {name: error.mean() for name, error in errors.items()}
    *lines, worst = bars.lines
    for line, text, name in zip(lines, bars.texts, matrices, strict=True):
        end = np.clip(mean[name], 0.03, 300)
        assert tuple(line.get_xdata()) == pytest.approx((0.03, end), rel=5e-3)
        chosen = name == rotate
        assert to_rgba(line.get_color()) == to_rgba(VERMILION if chosen else GREY)
        assert text.get_fontweight() == ("bold" if chosen else "normal")
        label, value = text.get_text().split(": ")
        assert label == name
        assert float(value.removesuffix(" %")) == pytest.approx(mean[name], rel=0.056, abs=1e-3)
    largest = np.clip([error.max() for error in errors.values()], 0.03, 300)
    np.testing.assert_allclose(worst.get_xdata(), largest, rtol=5e-3)
    assert list(worst.get_ydata()) == list(range(len(matrices)))


def of_place(place, rotate, seed):
    """At the input of o, each of nine heads is turned."""
    n = PRODUCTS[place][0].shape[1]
    return np.kron(np.eye(n // 64), matrix(rotate, 64, seed)) if place[1] == "o_in" else matrix(rotate, n, seed)


VALUES = {"place": PLACES, "rotate": BUILT_IN, "seed": (0, 4, 9), "bits": range(2, 9),
          "granularity": ("tensor", "token", "group"), "weights": list(WEIGHTS)}
ALL_PAIRS = sorted(pairwise(VALUES), key=lambda setting: PLACES.index(setting["place"]))  # few new backgrounds


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("setting", ALL_PAIRS, ids=lambda setting: " ".join(map(str, setting.values())))
def test_rotation_reads_and_shows_what_numpy_computes(setting):
    x, w = PRODUCTS[setting["place"]]
    matrices = {name: of_place(setting["place"], name, setting["seed"]) for name in BUILT_IN}
    assert_reads_and_shows(put("rotation", setting), x, w, matrices, GAINS.get(setting["place"], 1))


def test_each_value_meets_each_other():
    assert_pairs_meet(ALL_PAIRS, VALUES)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rotate", BUILT_IN)
def test_a_rotation_keeps_lengths_and_products(place, rotate):
    explorer = put("rotation", {"place": place})
    x, w = PRODUCTS[place]
    turned = explorer._compute(**START["rotation"] | {"place": place, "rotate": rotate, "seed": 4}).turned
    r = of_place(place, rotate, 4)
    y = product(x, w.T)
    x = x if rotate == NONE else x / GAINS.get(place, 1)
    largest = np.abs(x).max()
    np.testing.assert_allclose(turned.x.norm(dim=1).numpy(), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(product(turned.x.double().numpy(), r.T), x, atol=1e-5 * largest)
    np.testing.assert_allclose((turned.x @ turned.w.T).numpy(), y, atol=1e-5 * np.abs(y).max())


@pytest.mark.usefixtures("unseen")
def test_only_random_rotations_have_a_seed():
    explorer = put("rotation", {})
    seed = explorer.controls["seed"]
    assert seed.disabled
    for name in (RANDOM_HADAMARD, RANDOM_ORTHOGONAL):
        explorer.controls["rotate"].value = name
        assert not seed.disabled
        explorer.set(place=PLACES[3], bits=5)
        assert not seed.disabled
        explorer.controls["rotate"].value = NONE
        assert seed.disabled
        explorer.set(rotate=name)
        explorer.set(rotate=HADAMARD)
        assert seed.disabled
    for name in (NONE, HADAMARD):
        readouts = []
        for value in (0, 5, 9):
            explorer.set(rotate=name, seed=value)
            readouts.append(explorer.readout)
        assert readouts[0] == readouts[1] == readouts[2]


@pytest.mark.usefixtures("unseen")
def test_what_rotations_do_and_what_they_do_not():
    def error(**setting):
        return put("rotation", setting).readout["output_error_percent"]

    for place, rotate in itertools.product(PLACES, BUILT_IN[2:]):
        assert error(place=place, rotate=rotate) < 0.8 * error(place=place)
        assert error(place=place, rotate=rotate) < 0.5 * error(place=place) or place[1] == "o_in"
        assert error(place=place, rotate=rotate, granularity="group") > 0.55 * error(place=place, granularity="group")
    massive = {"place": (11, "down_in"), "granularity": "tensor", "bits": 8}
    assert all(error(**massive, rotate=rotate) > 90 for rotate in BUILT_IN)
    coarse = {"place": (29, "mlp_in"), "weights": "4 bits", "bits": 8}
    assert error(**coarse, rotate=FOLDED) > 1.3 * error(**coarse)
    assert error(**coarse, rotate=HADAMARD) < error(**coarse)
    norms = np.linalg.norm(PRODUCTS[12, "attn_in"][0] / GAINS[12, "attn_in"], axis=1)
    np.testing.assert_allclose(norms, 24, rtol=1e-3)  # √576: what a norm gives before its gains


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bits_to_start_with(bits):
    explorer = rotation({PLACES[0]: PRODUCTS[PLACES[0]]}, bits)
    assert explorer.controls["bits"].value == bits
    assert explorer.readout == put("rotation", {"bits": bits}).readout


# places and rotations of one's own


@pytest.mark.long
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, channels, outputs", [(7, 64, 5), (1, 16, 3), (300, 8, 4), (3, 256, 1), (9, 2, 2)])
def test_powers_of_two(tokens, channels, outputs):
    x, w = own(tokens, channels, outputs)
    explorer = rotation({(3, "mlp_in"): (x, w)})
    h = scipy.linalg.hadamard(channels) / np.sqrt(channels)
    matrices = {name: h if name == HADAMARD else matrix(name, channels, 2) for name in BUILT_IN}
    with without_pixels():
        for rotate, granularity in itertools.product(BUILT_IN, ("tensor", "token")):
            explorer.set(rotate=rotate, granularity=granularity, seed=2, bits=5)
            assert_reads_and_shows(explorer, x, w, matrices)
    explorer.set()
    assert not explorer.errors


def test_where_no_hadamard_matrix_fits():
    with pytest.raises(ValueError, match=r"places\[\(3, 'mlp_in'\)\] must have .* such as 96 or 128, got 100"):
        rotation({(4, "mlp_in"): own(2, 8), (3, "mlp_in"): own(7, 100)})


@pytest.mark.filterwarnings("error")
def test_constant_channels_and_tokens_of_zeros():
    x, w = own(6, 64)
    x[:, 3], x[:, 5], x[:, 9], x[2] = 4.5, -0.25, 0, 0
    explorer = rotation({(0, "attn_in"): (x, w)})
    for rotate, granularity in itertools.product(BUILT_IN, ("tensor", "token")):
        explorer.set(rotate=rotate, granularity=granularity)
        assert_reads_and_shows(explorer, x, w, {name: matrix(name, 64, 0) for name in BUILT_IN})


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_data_is_left_alone_and_may_change_later(kind):
    x, w = map(kind, own(6, 64))
    kept = [np.asarray(a).copy() for a in (x, w)]
    explorer = rotation({(0, "attn_in"): (x, w), (1, "attn_in"): (x, w)})
    explorer.set(rotate=HADAMARD)
    before = explorer.readout
    for a, b in zip((x, w), kept, strict=True):
        np.testing.assert_array_equal(a, b)
    x *= 3
    w *= 2
    explorer.set(place=(1, "attn_in"))
    assert explorer.readout == before


def test_all_of_a_token_in_one_channel_stays_in_the_picture():
    x, w = own(20, 64)
    x[0] = 10 * hadamard(64)[5]  # which the rotation puts into channel 5
    explorer = rotation({(0, "attn_in"): (x, w)})
    explorer.set(rotate=HADAMARD)
    assert explorer.readout["max"] == pytest.approx(80, rel=1e-5)
    profile, histogram, _ = explorer.figure.axes
    assert profile.lines[1].get_ydata().max() < profile.get_ylim()[1]
    assert histogram.lines[1].get_xdata()[-20:].max() >= 1


@pytest.mark.filterwarnings("error")
def test_heads_of_ones_own():
    x, w = own(6, 128)
    explorer = rotation({(3, "o_in"): (x, w)})
    matrices = {name: np.kron(np.eye(2), matrix(name, 64, 0)) for name in BUILT_IN}
    for rotate, weights in itertools.product(matrices, WEIGHTS):
        explorer.set(rotate=rotate, weights=weights)
        assert_reads_and_shows(explorer, x, w, matrices)


@pytest.mark.parametrize("name, control, value", [
    ("rotation", "rotate", "learned"), ("rotation", "granularity", "channel"), ("rotation", "bits", 9),
    ("rotation", "weights", "16 bits"),
    ("rotation", "seed", 10), ("rotation_2d", "theta", 91), ("rotation_2d", "theta", -1), ("rotation_2d", "bits", 1),
    ("rotation_2d", "outlier", "both"),
])
def test_a_bad_setting_is_told(name, control, value):
    assert_refuses(put(name, {}), control, value)


# a rotation is learned


EYE = torch.eye(4)
SPREAD = torch.tensor([9.0, 1.0, 1.0, 1.0])
INPUTS, HELD_OUT = (ProxyInputs(torch.randn(200, 4, generator=torch.Generator().manual_seed(seed)) * SPREAD,
                                torch.ones(200)) for seed in (0, 1))


def measure(rotation):
    rotation = EYE if rotation is None else rotation
    return proxy_loss(rotation, HELD_OUT), (HELD_OUT.x @ rotation).abs().max()


def measured(rotation):
    return dict(zip(("held_out", "output_error_percent"), map(float, measure(rotation)), strict=True))


def learning():
    return learn_rotation(INPUTS, start=EYE, steps=12)


@lru_cache
def unwatched():
    return list(learning())


def assert_as_unwatched(run, measured_at):
    expected = [{"step": 0, **measured(None)}]
    for step in unwatched():
        deviation = np.abs(step.rotation.T.numpy() @ step.rotation.numpy() - np.eye(4)).max()
        expected.append({"step": step.step, "loss": step.loss, "orthogonality": pytest.approx(deviation, abs=1e-6)})
        if step.step in measured_at:
            expected[-1] |= measured(step.rotation)
    assert run.history == expected
    assert not run.explorer.errors

    last = run.history[-1]
    assert run.explorer.readout == {name: pytest.approx(value, rel=1e-3) for name, value in last.items()}
    left, right = run.explorer.figure.axes
    for line, name in ((left.lines[1], "loss"), (left.lines[2], "held_out"), (right.lines[1], "output_error_percent")):
        points = [(record["step"], record[name]) for record in run.history if name in record]
        np.testing.assert_allclose(line.get_xydata(), points, rtol=1e-6)
    for axes, name in ((left, "held_out"), (right, "output_error_percent")):
        assert list(axes.lines[0].get_ydata()) == [run.history[0][name]] * 2
    assert left.get_xlim() == right.get_xlim() == (0, 12)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("every, measured_at", [(1, range(13)), (5, [5, 10, 12]), (100, [12])])
@pytest.mark.parametrize("plain", [True, False])
def test_watching_a_rotation_changes_nothing(plain, every, measured_at):
    run, seen = watch_rotation(learning(), measure, every=every), []
    assert len(run) == 12
    if plain:
        seen.extend(run)
    else:
        in_a_cell(run, seen.append)
    assert len(run) == 0
    for ours, theirs in zip(seen, unwatched(), strict=True):
        assert ours.step == theirs.step
        assert torch.equal(ours.rotation, theirs.rotation)
    assert_as_unwatched(run, measured_at)
    assert run.history[-1]["held_out"] < run.history[0]["held_out"]


@pytest.mark.usefixtures("unseen")
def test_the_present_rotation_is_measured():
    seen = []
    run = watch_rotation(learning(), lambda rotation: (float(seen.append(rotation) or 1), 2.0), every=4)
    list(run)
    assert seen[0] is None
    for present, step in zip(seen[1:], (4, 8, 12, 12), strict=True):
        assert torch.equal(present, unwatched()[step - 1].rotation)


def test_the_picture_of_a_rotation_follows():
    run, pictures = watch_rotation(learning(), measure, every=4), []
    for step in run:
        pictures.append(run.explorer.png())
        assert run.explorer.readout["step"] == step.step // 4 * 4
    assert len(set(pictures)) == 4  # before the first measurement, and after each of three


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("how", ["click", "call"])
def test_stop_learning_and_go_on(plain, how):
    run, seen = watch_rotation(learning(), measure, every=5), []
    button = run.explorer.widget.children[0].children[0]

    def stop_at_7(step):
        seen.append(step.step)
        assert not button.disabled
        if step.step == 7:
            button.click() if how == "click" else run.stop()

    for last in (7, 12):
        if plain:
            for step in run:
                stop_at_7(step)
        else:
            in_a_cell(run, stop_at_7)
        assert seen == list(range(1, last + 1))
        assert len(run) == 12 - last
        assert button.disabled
        assert run.explorer.readout["step"] == last
    assert_as_unwatched(run, [5, 7, 10, 12])


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("every", [0, -1, 1.5, True, "1", None])
def test_bad_every(every):
    with pytest.raises(ValueError, match=f"every must be an integer of at least 1, got {every!r}"):
        watch_rotation(learning(), measure, every=every)


@pytest.mark.usefixtures("unseen")
def test_steps_without_a_length():
    with pytest.raises(ValueError, match=r"steps must have a length.*got generator"):
        watch_rotation((step for step in learning()), measure)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0])
def test_a_loss_that_diverges_is_told(loss):
    steps = unwatched()[:3]
    run = watch_rotation([*steps[:2], steps[2]._replace(loss=loss)], measure)
    assert [next(run).step, next(run).step] == [1, 2]
    with pytest.raises(ValueError, match=r"loss must be at least 0 and finite, got .* at step 3"):
        next(run)
    assert [record["step"] for record in run.history] == [0, 1, 2]


@pytest.mark.usefixtures("unseen")
def test_an_error_of_a_measurement_is_raised():
    with pytest.raises(ZeroDivisionError):
        watch_rotation(learning(), lambda rotation: 1 / 0)
    run = watch_rotation(learning(), lambda rotation: (1, 1) if rotation is None else 1 / 0, every=2)
    next(run)
    with pytest.raises(ZeroDivisionError):
        next(run)
