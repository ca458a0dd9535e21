"""Every live figure: each control over its whole range, each chip, and the numbers against direct computations."""

from functools import partial

import ipywidgets as widgets
import numpy as np
import pytest

import qlab.explorers
from qlab import affine, calibration, samples
from qlab.explorers import clipping, drift
from qlab.explorers.ranges import CALIBRATORS

ACTIVATIONS, NEW_ACTIVATIONS = samples.load("activations"), samples.load("new_activations")
MAKERS = {"clipping": partial(clipping, ACTIVATIONS), "drift": partial(drift, ACTIVATIONS, NEW_ACTIVATIONS)}
SETTINGS = {  # of the other controls
    "clipping": [{}, {"linked": False, "bits": 8, "alpha": -0.4, "log": False, "view": "crowd"}],
    "drift": [{}, {"bits": 4, "gain": 1.6, "calibrator": "MSE", "data": "calibration"}],
}
WITH_SETTINGS = [(name, setting) for name, settings in SETTINGS.items() for setting in range(len(settings))]
CONTROLS = [(name, setting, control) for name, setting in WITH_SETTINGS for control in MAKERS[name]().controls]
CHIPS = [(name, setting, chip) for name, setting in WITH_SETTINGS for chip in MAKERS[name]().chips]


def make(name, setting=0):
    explorer = MAKERS[name]()
    explorer.set(**SETTINGS[name][setting])
    return explorer


def sweep(control):
    """The values that a hand can give to a control, from one end to the other."""
    if isinstance(control, widgets.FloatLogSlider):
        return (control.base ** np.linspace(control.min, control.max, 17)).tolist()
    if isinstance(control, widgets.IntSlider):
        return list(range(control.min, control.max + 1))
    if isinstance(control, widgets.FloatSlider):
        return np.linspace(control.min, control.max, 17).tolist()
    return [False, True] if isinstance(control, widgets.Checkbox) else list(control.options)


def has_no_range(name, explorer, control, value):
    """The one position that figures refuse: α = β = 0."""
    if name != "clipping" or control not in ("alpha", "beta") or value != 0:
        return False
    other = {"alpha": "beta", "beta": "alpha"}[control]
    return explorer.controls["linked"].value or explorer.controls[other].value == 0


def values(explorer):
    return {name: control.value for name, control in explorer.controls.items()}


def message(explorer):
    return "".join(child.value for child in explorer.widget.children
                   if isinstance(child, widgets.HTML) and 'role="alert"' in child.value)


def assert_sound(explorer):
    numbers = [value for value in explorer.readout.values() if not isinstance(value, str)]
    assert numbers
    assert all(np.isfinite(numbers))
    assert bytes(explorer.png()).startswith(b"\x89PNG")
    assert not message(explorer)


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


def test_every_explorer_is_tested():
    assert set(MAKERS) == set(SETTINGS) == set(qlab.explorers.__all__)


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    explorer = make(name, setting)
    steps, pictures = sweep(explorer.controls[control]), []
    assert len(steps) > 1
    for value in steps:
        if has_no_range(name, explorer, control, value):
            with pytest.raises(ValueError, match="alpha must be less than beta"):
                explorer.set(**{control: value})
            continue
        explorer.set(**{control: value})
        assert explorer.controls[control].value == pytest.approx(value)
        assert_sound(explorer)
        pictures.append(bytes(explorer.png()))
    assert pictures[0] != pictures[-1]
    assert len(set(pictures)) >= 0.7 * len(steps)


@pytest.mark.parametrize("name, setting", WITH_SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    travelled = make(name, setting)
    wanted = values(travelled)
    for control in travelled.controls.values():
        for value in sweep(control)[1:-1:3]:
            control.value = value
    travelled.set(**wanted)
    assert not travelled.errors
    assert travelled.png() == make(name, setting).png()
    assert travelled.readout == make(name, setting).readout


@pytest.mark.parametrize("name, setting, chip", CHIPS)
def test_a_chip(name, setting, chip):
    explorer = make(name, setting)
    before = explorer.png()
    explorer.press(chip)
    assert_sound(explorer)
    assert explorer.png() != before


@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    explorer = MAKERS[name]()
    assert explorer.title
    assert len(explorer.description) > 40
    assert all(f"{key}: " in repr(explorer) for key in explorer.readout)


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_reads_what_affine_computes(bits, linked):
    explorer = clipping(ACTIVATIONS, bits=bits)
    explorer.set(linked=linked)
    for end in (0.05, 0.4, 0.93, explorer.controls["beta"].max):
        explorer.set(beta=end)
        assert_reads_directly(explorer, ACTIVATIONS)
    explorer.set(alpha=-0.21)
    assert_reads_directly(explorer, ACTIVATIONS)


def test_linked_ends_mirror_each_other():
    explorer = clipping(ACTIVATIONS)
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
    explorer = clipping(ACTIVATIONS)
    explorer.set(linked=linked)
    if not linked:
        explorer.set(alpha=0.0)
    picture, readout = explorer.png(), explorer.readout
    control, value = last
    explorer.controls[control].value = value
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (0, 0)
    assert [type(error) for error in explorer.errors] == [ValueError]
    assert "alpha" in message(explorer)
    assert "beta" in message(explorer)
    assert (explorer.png(), explorer.readout) == (picture, readout)

    explorer.controls["beta"].value = 0.5
    assert not message(explorer)
    assert explorer.png() != picture
    assert_reads_directly(explorer, ACTIVATIONS)


@pytest.mark.parametrize("linked", [True, False])
def test_chips_land_on_the_calibrators_ranges(linked):
    explorer = clipping(ACTIVATIONS, bits=4)
    explorer.set(linked=linked)
    reach, symmetric = float(np.abs(ACTIVATIONS).max()), {"symmetric": linked}
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
        wider = max(-alpha, beta)
        assert explorer.readout["alpha"] == pytest.approx(max(-wider if linked else alpha, -reach))
        assert explorer.readout["beta"] == pytest.approx(min(wider if linked else beta, reach))
        assert_reads_directly(explorer, ACTIVATIONS)
        betas.append(explorer.readout["beta"])
        errors[chip] = explorer.readout["mse"]
        pictures.append(explorer.png())
    assert np.diff(sorted(betas)).min() > reach / 400  # a step of the slider
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
    for linked in (True, False):
        explorer.set(linked=linked)
        for chip in ("min-max", "MSE"):
            explorer.press(chip)
            assert not message(explorer)
            assert not any(map(np.isnan, explorer.readout.values()))  # infinite, if the grid holds each value


def test_drift_of_data_that_the_grid_holds():
    steps = np.arange(256, dtype=np.float32)
    explorer = drift(steps, steps)
    assert explorer.readout["static_sqnr_db"] == explorer.readout["dynamic_sqnr_db"] == np.inf
    explorer.set(bits=7)
    assert_sound(explorer)


@pytest.mark.parametrize("name", MAKERS)
def test_a_profile_in_place_of_data(name):
    arrays = [ACTIVATIONS, NEW_ACTIVATIONS][: 1 if name == "clipping" else 2]
    explorer = getattr(qlab.explorers, name)(*map(calibration.ErrorProfile, arrays))
    assert explorer.readout == MAKERS[name]().readout
    assert explorer.png() == MAKERS[name]().png()


@pytest.mark.parametrize("make_it", [
    clipping, partial(drift, ACTIVATIONS), lambda bad, **bits: drift(bad, ACTIVATIONS, **bits),
], ids=["clipping", "drift new", "drift calibrated_on"])
@pytest.mark.parametrize("x, bits, part", [
    ([0.5, np.nan], 4, "NaN"), ([0.5, np.inf], 4, "infinite"), ([], 4, "empty"), (np.zeros(9), 4, "zeros"),
    (["a"], 4, "real numbers"), (ACTIVATIONS, 9, "bits"), (ACTIVATIONS, 1, "bits"), (ACTIVATIONS, 4.5, "bits"),
    (ACTIVATIONS, "4", "bits"),
], ids=["NaN", "infinity", "empty", "zeros", "text", "9 bits", "1 bit", "4.5 bits", "bits as text"])
def test_bad_data(make_it, x, bits, part):
    with pytest.raises(ValueError, match=part):
        make_it(x, bits=bits)


@pytest.mark.parametrize("calibrator", ["min-max", "99.9 %"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gain", [0.25, 0.8, 1.0, 1.9, 2.5, 4.0])
def test_drift_reads_what_affine_computes(gain, bits, calibrator):
    explorer = drift(ACTIVATIONS, NEW_ACTIVATIONS, bits=bits)
    explorer.set(calibrator=calibrator)
    explorer.set(gain=gain)
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


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_data_of_its_own_calibration_has_not_drifted(calibrator):
    explorer = drift(ACTIVATIONS, NEW_ACTIVATIONS)
    explorer.set(data="calibration", calibrator=calibrator)
    assert explorer.readout["lost_db"] == 0
    explorer.controls["gain"].value = 2.0
    assert explorer.readout["lost_db"] > 3
