"""The live figures of lesson 03: each control over its whole range, each chip, numbers against direct computations."""

import itertools
from functools import partial

import numpy as np
import pytest

from qlab import affine, calibration, samples
from qlab.explorers import clipping, drift
from qlab.explorers.calibration import CALIBRATORS
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

ACTIVATIONS, NEW_ACTIVATIONS = samples.load("activations"), samples.load("new_activations")
REACH = float(np.abs(ACTIVATIONS).max())
MAKERS = {"clipping": partial(clipping, ACTIVATIONS), "drift": partial(drift, ACTIVATIONS, NEW_ACTIVATIONS)}
START = {
    "clipping": {"linked": True, "alpha": -REACH, "beta": REACH, "bits": 4, "log": True, "view": "all"},
    "drift": {"gain": 1.0, "bits": 8, "calibrator": "min-max", "data": "new"},
}
SETTINGS = [
    ("clipping", {}), ("clipping", {"linked": False, "bits": 8, "alpha": -0.4, "log": False, "view": "crowd"}),
    ("drift", {}), ("drift", {"bits": 4, "gain": 1.6, "calibrator": "MSE", "data": "calibration"}),
]
CONTROLS = [(name, setting, control) for name, setting in SETTINGS for control in START[name]]

shared, put = figures(MAKERS, START)


def clipping_directly(x, alpha, beta, bits, linked):
    """What `clipping` reads out, by way of qlab.affine alone."""
    params = affine.range_params(alpha, beta, bits, symmetric=linked)
    x_hat, parts = affine.fake_quantize(x, params), affine.error_split(x, params)
    levels = affine.dequantize(np.array([params.qmin, params.qmax]), params)
    return {
        "alpha": alpha, "beta": beta, "mse": affine.mse(x, x_hat), "rounding": parts.rounding,
        "clipping": parts.clipping, "sqnr_db": affine.sqnr_db(x, x_hat), "scale": float(params.scale),
        "clipped_percent": 100 * np.mean((x < levels[0]) | (x > levels[1])), "zero_point": int(params.zero_point),
    }


def assert_reads_directly(explorer, x):
    now = values(explorer)
    direct = clipping_directly(x, *(now[name] for name in ("alpha", "beta", "bits", "linked")))
    assert explorer.readout == pytest.approx(direct, rel=1e-6, abs=1e-7 * direct["mse"])


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    pictures = pictures_along(put(name, setting), control, redrawn=["linked", "log", "view"], skips=has_no_range)
    assert pictures[0] != pictures[-1]
    assert len(set(pictures)) >= 0.7 * len(pictures)


@pytest.mark.parametrize("name, setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    fresh = MAKERS[name]()
    fresh.set(**setting)
    assert_same_whichever_way(shared(name), fresh)


@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    explorer = MAKERS[name]()
    assert values(explorer) == START[name]
    assert_words(explorer)
    assert bool(explorer.chips) == (name == "clipping")


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_reads_what_affine_computes(bits, linked):
    explorer = put("clipping", {"linked": linked, "bits": bits})
    for end in (0.05, 0.4, 0.93, explorer.controls["beta"].max):
        explorer.set(beta=end)
        assert_reads_directly(explorer, ACTIVATIONS)
    explorer.set(alpha=-0.21)
    assert_reads_directly(explorer, ACTIVATIONS)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", [2, np.int64(8)])
def test_bits_to_start_with(bits):
    for explorer, name in ((clipping(ACTIVATIONS, bits=bits), "clipping"),
                           (drift(ACTIVATIONS, NEW_ACTIVATIONS, bits=bits), "drift")):
        assert explorer.controls["bits"].value == bits
        assert explorer.readout == put(name, {"bits": int(bits)}).readout


@pytest.mark.usefixtures("unseen")
def test_linked_ends_mirror_each_other():
    explorer = put("clipping", {})
    for control, value in (("beta", 0.5), ("alpha", -0.7), ("beta", 0.1)):
        explorer.controls[control].value = value
        assert values(explorer)[control] == value
        assert values(explorer)["alpha"] == -values(explorer)["beta"] == explorer.readout["alpha"]
    explorer.set(linked=False)
    explorer.controls["alpha"].value = -0.9
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (-0.9, 0.1)
    explorer.controls["linked"].value = True
    assert values(explorer)["alpha"] == -values(explorer)["beta"]


@pytest.mark.parametrize("linked, last", [(True, ("beta", 0.0)), (True, ("alpha", 0.0)), (False, ("beta", 0.0))])
def test_clipping_without_a_range(linked, last):
    explorer = put("clipping", {"linked": linked})
    if not linked:
        explorer.set(alpha=0.0)
    picture = explorer.png()
    control, value = last
    explorer.controls[control].value = value
    step = explorer.controls[control].step
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (-step if linked else 0, step)
    assert explorer.png() != picture
    assert_reads_directly(explorer, ACTIVATIONS)

    explorer.controls["beta"].value = 0.5
    assert not message(explorer)
    assert explorer.png() != picture
    assert_reads_directly(explorer, ACTIVATIONS)


@pytest.mark.parametrize("linked", [True, False])
def test_chips_land_on_the_calibrators_ranges(linked):
    explorer = MAKERS["clipping"]()  # not the shared one: what a chip marks stays marked
    explorer.set(linked=linked, log=linked, view="all" if linked else "crowd")
    symmetric = {"symmetric": linked}
    ranges = {
        "min-max": calibration.minmax(ACTIVATIONS, **symmetric),
        "99.9 %": calibration.percentile(ACTIVATIONS, 99.9, **symmetric),
        "MSE": calibration.mse(ACTIVATIONS, 4, **symmetric),
        "KL": calibration.entropy(ACTIVATIONS, 4),
        "ACIQ": calibration.aciq(ACTIVATIONS, 4),
    }
    assert list(explorer.chips) == list(ranges)
    betas, errors, pictures = [], {}, []
    for chip, (alpha, beta) in ranges.items():
        explorer.chips[chip].click()
        assert_sound(explorer)
        wider = max(-alpha, beta)
        assert explorer.readout["alpha"] == pytest.approx(max(-wider if linked else alpha, -REACH))
        assert explorer.readout["beta"] == pytest.approx(min(wider if linked else beta, REACH))
        assert_reads_directly(explorer, ACTIVATIONS)
        betas.append(explorer.readout["beta"])
        errors[chip] = explorer.readout["mse"]
        pictures.append(explorer.png())
    assert np.diff(sorted(betas)).min() > REACH / 400  # a step of the slider
    assert min(errors, key=errors.get) == "MSE"
    assert len(set(pictures)) == len(ranges)


def test_clipping_of_a_million_values():
    x = np.random.default_rng(0).standard_t(5, 1_000_000).astype(np.float32)
    explorer = clipping(x, bits=6)
    explorer.set(linked=False, beta=4.0)
    explorer.set(alpha=-5.0)
    assert_sound(explorer)
    assert_reads_directly(explorer, x)


@pytest.mark.parametrize("x", [
    np.maximum(ACTIVATIONS, 0), np.minimum(ACTIVATIONS, 0), ACTIVATIONS.astype(np.float64) * 1e6, ACTIVATIONS * 1e-6,
    np.float32([3.0]), [0.1, -0.2, 0.7], np.float32([0] * 9999 + [5]),
], ids=["ReLU", "negative", "large float64", "tiny", "one value", "list", "sparse"])
def test_clipping_of_unusual_data(x):
    explorer = clipping(x)
    reach = float(np.abs(x).max())
    explorer.set(beta=0.6 * reach)
    assert_sound(explorer)
    assert_reads_directly(explorer, np.asarray(x))
    with without_pixels():
        for linked, chip in itertools.product((True, False), ("min-max", "MSE")):
            explorer.set(linked=linked)
            explorer.press(chip)
            assert not message(explorer)
            assert not any(map(np.isnan, explorer.readout.values()))  # infinite, if the grid holds each value


def test_drift_of_data_that_the_grid_holds():
    steps = np.arange(256, dtype=np.float32)
    explorer = drift(steps, steps)
    assert explorer.readout["static_sqnr_db"] == explorer.readout["dynamic_sqnr_db"] == np.inf
    assert explorer.readout["lost_db"] == 0
    explorer.set(bits=7)
    assert_sound(explorer)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("calibrated_on, new", [
    ([3.0, 3.0], [1.0, 3.0]), ([-3.0], [2.0, -1.0]), ([2.0, 5.0], [1.0, 6.0]), ([-5.0, -2.0], [-1.0]),
])
def test_drift_of_data_on_one_side_of_0(calibrated_on, new):
    explorer = drift(calibrated_on, new, bits=4)
    for calibrator in CALIBRATORS:
        for data in ("calibration", "new"):
            explorer.set(calibrator=calibrator, data=data)
            assert not any(map(np.isnan, explorer.readout.values()))  # infinite, if the grid holds each value
            assert explorer.readout["alpha"] <= 0 <= explorer.readout["beta"]
    explorer.set(calibrator="min-max")
    alpha, beta, x = min(*calibrated_on, 0), max(*calibrated_on, 0), np.array(new)
    x_hat = affine.fake_quantize(x, affine.range_params(alpha, beta, 4))
    assert (explorer.readout["alpha"], explorer.readout["beta"]) == (alpha, beta)
    assert explorer.readout["static_sqnr_db"] == pytest.approx(affine.sqnr_db(x, x_hat), abs=1e-4)
    assert explorer.readout["outside_percent"] == 100 * np.mean((x < alpha) | (x > beta))


@pytest.mark.parametrize("name", MAKERS)
def test_a_profile_in_place_of_data(name):
    function, profiles = MAKERS[name].func, map(calibration.ErrorProfile, MAKERS[name].args)
    explorer, expected = function(*profiles), put(name, {})
    assert (explorer.readout, explorer.png()) == (expected.readout, expected.png())


@pytest.mark.parametrize("make_it", [
    clipping, partial(drift, ACTIVATIONS), lambda bad, **bits: drift(bad, ACTIVATIONS, **bits),
], ids=["clipping", "drift new", "drift calibrated_on"])
@pytest.mark.parametrize("x, bits, part", [
    ([0.5, np.nan], 4, "NaN"), ([0.5, np.inf], 4, "infinite"), ([], 4, "empty"), (np.zeros(9), 4, "zeros"),
    (["a"], 4, "real numbers"), (ACTIVATIONS, 9, "bits"), (ACTIVATIONS, 1, "bits"), (ACTIVATIONS, 4.5, "bits"),
    (ACTIVATIONS, "4", "bits"), (ACTIVATIONS, 8.0, r"bits must be an integer from 2 to 8, got 8\.0"),
    (ACTIVATIONS, True, "bits must be an integer from 2 to 8, got True"),
], ids=["NaN", "infinity", "empty", "zeros", "text", "9 bits", "1 bit", "4.5 bits", "bits as text", "8.0 bits", "bool"])
def test_bad_data(make_it, x, bits, part):
    with pytest.raises(ValueError, match=part):
        make_it(x, bits=bits)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("calibrator", ["min-max", "99.9 %"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gain", [0.25, 0.8, 1.0, 1.9, 2.5, 4.0])
def test_drift_reads_what_affine_computes(gain, bits, calibrator):
    explorer = put("drift", {"bits": bits, "calibrator": calibrator, "gain": gain})
    arriving = np.float32(gain) * NEW_ACTIVATIONS

    def sqnr_db(alpha, beta):
        return affine.sqnr_db(arriving, affine.fake_quantize(arriving, affine.range_params(alpha, beta, bits)))

    def calibrated(x):
        return calibration.minmax(x) if calibrator == "min-max" else calibration.percentile(x, 99.9)

    alpha, beta = calibrated(ACTIVATIONS)
    static, dynamic = sqnr_db(alpha, beta), sqnr_db(*calibrated(arriving))
    assert explorer.readout == pytest.approx({
        "gain": gain, "alpha": alpha, "beta": beta, "static_sqnr_db": static, "dynamic_sqnr_db": dynamic,
        "lost_db": dynamic - static, "outside_percent": 100 * np.mean((arriving < alpha) | (arriving > beta)),
    }, rel=1e-5, abs=1e-4)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_data_of_its_own_calibration_has_not_drifted(calibrator):
    explorer = put("drift", {"data": "calibration", "calibrator": calibrator})
    assert explorer.readout["lost_db"] == 0
    explorer.controls["gain"].value = 2.0
    assert explorer.readout["lost_db"] > 3
