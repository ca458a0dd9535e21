"""Every live figure: each control over its whole range, each chip, and the numbers against direct computations."""

from functools import lru_cache, partial

import matplotlib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qlab.explorers
import qlab.live
from qlab import affine, calibration, samples
from qlab.explorers import clipping, drift, granularity, mapping
from qlab.explorers.affine import DATA_CHIPS, SEVEN
from qlab.explorers.calibration import CALIBRATORS
from tests.explorers.checks import (
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    go_to,
    message,
    picture_at,
    sweep,
    values,
)

ACTIVATIONS, NEW_ACTIVATIONS = samples.load("activations"), samples.load("new_activations")
WEIGHTS = samples.load("weights")
MAKERS = {
    "clipping": partial(clipping, ACTIVATIONS),
    "drift": partial(drift, ACTIVATIONS, NEW_ACTIVATIONS),
    "granularity": partial(granularity, WEIGHTS),
    "mapping": partial(mapping, [-1.72, 0.31, 2.28, 0.04, 3.43, -0.77]),
}
SETTINGS = {  # of the other controls
    "clipping": [{}, {"linked": False, "bits": 8, "alpha": -0.4, "log": False, "view": "crowd"}],
    "drift": [{}, {"bits": 4, "gain": 1.6, "calibrator": "MSE", "data": "calibration"}],
    "granularity": [{}, {"per": "group", "group_size": 64, "bits": 3, "scheme": "zero-point"}],
    "mapping": [{}, {"scheme": "zero-point", "bits": 4, "narrow": True}, {"bits": 3, "alpha": -1.1, "beta": 2.9}],
}
WITH_CHIPS = ("clipping", "mapping")
WITH_SETTINGS = [(name, setting) for name, settings in SETTINGS.items() for setting in range(len(settings))]


def make(name, setting=0):
    explorer = MAKERS[name]()
    explorer.set(**SETTINGS[name][setting])
    return explorer


@lru_cache
def shared(name, setting):
    explorer = make(name, setting)
    return explorer, values(explorer)


def put(name, setting):
    explorer, start = shared(name, setting)
    go_to(explorer, start)
    return explorer


def has_no_range(explorer, control, value):
    """Where no hand gets to: α less than a step below β."""
    if control not in ("alpha", "beta"):
        return False
    if "linked" in explorer.controls and explorer.controls["linked"].value:
        return value == 0
    alpha, beta = (value if name == control else explorer.controls[name].value for name in ("alpha", "beta"))
    return alpha > beta - explorer.controls["alpha"].step


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
    tested_by_themselves = {"float_bits", "digits_ptq", "qat", "training_run", "watch", "watch_rotation",  # files of
                            "landscape", "outliers", "smoothing", "rotation", "rotation_2d"}  # their own
    assert set(MAKERS) == set(SETTINGS) == set(qlab.explorers.__all__) - tested_by_themselves


@pytest.mark.parametrize("control, value", [("bits", 3), ("scheme", "zero-point"), ("beta", 2.0)])
def test_another_control_moves_on_after_bad_text(control, value):
    explorer, expected = mapping(), mapping()
    explorer.controls["data"].value = "seven"
    assert "got 'seven'" in message(explorer).replace("&#x27;", "'")
    explorer.controls[control].value = value
    expected.controls[control].value = value
    assert not message(explorer)
    assert (explorer.readout, explorer.png(), values(explorer)) == (expected.readout, expected.png(), values(expected))


@pytest.mark.parametrize("name, setting", WITH_SETTINGS)
def test_each_control_over_its_whole_range(name, setting):
    explorer = put(name, setting)
    for label in [label for label, control in explorer.controls.items() if not getattr(control, "disabled", False)]:
        put(name, setting)
        steps, pictures = sweep(explorer.controls[label]), []
        assert len(steps) > 1
        for value in steps:
            if not has_no_range(explorer, label, value):
                pictures.append(picture_at(explorer, label, value))
        assert pictures[0] != pictures[-1]
        # α > 0 and β < 0 are widened to 0; the scheme "α, β" starts from the range in use.
        some_alike = name == "mapping" and label in ("alpha", "beta", "scheme")
        assert len(set(pictures)) >= (0.5 if some_alike else 0.7) * len(steps)


@pytest.mark.parametrize("name, setting", WITH_SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    assert_same_whichever_way(put(name, setting), make(name, setting))


@pytest.mark.parametrize("name, setting", [pair for pair in WITH_SETTINGS if pair[0] in WITH_CHIPS])
def test_each_chip(name, setting):
    explorer = make(name, setting)  # not the shared one: what a chip marks stays marked
    start = values(explorer)
    for chip in explorer.chips:
        go_to(explorer, start)
        before = explorer.png()
        explorer.press(chip)
        assert_sound(explorer)
        assert explorer.png() != before


@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    assert_words(put(name, 0))
    assert bool(put(name, 0).chips) == (name in WITH_CHIPS)


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("bits", [2, 4, np.int64(8)])
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
    assert explorer.readout["lost_db"] == 0
    explorer.set(bits=7)
    assert_sound(explorer)


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


@pytest.mark.parametrize("name", ["clipping", "drift"])
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
    (ACTIVATIONS, "4", "bits"), (ACTIVATIONS, 8.0, r"bits must be an integer from 2 to 8, got 8\.0"),
    (ACTIVATIONS, True, "bits must be an integer from 2 to 8, got True"),
], ids=["NaN", "infinity", "empty", "zeros", "text", "9 bits", "1 bit", "4.5 bits", "bits as text", "8.0 bits", "bool"])
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


@pytest.fixture(scope="module")
def shared_mapping():
    return mapping()


@pytest.fixture(scope="module")
def shared_granularity():
    return granularity(WEIGHTS)


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


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["absmax", "zero-point", "α, β"])
def test_mapping_reads_the_textbooks_formulas(shared_mapping, scheme, bits, narrow):
    explorer = shared_mapping
    explorer.set(scheme=scheme, bits=bits, narrow=narrow)
    for x in ([1, 2, 3], [-0.3, -0.11], list(SEVEN)):
        explorer.set(data=str(x))
        assert_maps_directly(explorer, x)
    explorer.set(alpha=-3.4, beta=7.7)
    assert_maps_directly(explorer, SEVEN)
    explorer.set(beta=-1.0)  # widened to hold 0
    assert_maps_directly(explorer, SEVEN)


def test_mapping_of_the_lecture_notes():
    explorer = mapping()
    assert explorer.readout["codes"] == "64 36 -89 0 -23 -54 127"
    assert explorer.readout["mse"] == pytest.approx(2.98e-4, abs=5e-7)
    explorer.set(scheme="zero-point")
    assert explorer.readout["codes"] == "53 20 -128 -23 -50 -86 127"
    assert explorer.readout["mse"] == pytest.approx(2.72e-4, abs=5e-7)


DECIMALS = st.lists(st.decimals(-500, 500, places=2).map(float), min_size=1, max_size=12)


@settings(max_examples=40)
@given(x=DECIMALS.filter(any), bits=st.integers(2, 8), scheme=st.sampled_from(["absmax", "zero-point"]))
@example(x=[-0.01], bits=2, scheme="zero-point")
def test_mapping_of_typed_numbers(shared_mapping, x, bits, scheme):
    shared_mapping.set(data=" ".join(map(str, x)))
    shared_mapping.set(bits=bits, scheme=scheme)
    assert_maps_directly(shared_mapping, x)


@pytest.mark.parametrize("text", [
    "1.5,-2,.25", "[1.5, -2, 0.25]", "  1.5   -2.0\t25e-2 ", "(1.5, −2, 0.25)", "[[1.5], [-2], [0.25]]", "1.5 -2 0.25,",
])
def test_ways_to_type(shared_mapping, text):
    shared_mapping.set(data="9")
    shared_mapping.controls["data"].value = text
    assert_maps_directly(shared_mapping, [1.5, -2, 0.25])


@pytest.mark.parametrize("text, part", [
    ("1 2 abc", "data must be numbers separated by commas or spaces, got 'abc'"), ("1;2", "'1;2'"),
    ("", "at least one"), ("[ ]", "at least one number, got '\\[ \\]'"), ("1 nan", "finite numbers, got 'nan'"),
    ("-inf 3", "'-inf'"), ("1e999", "'1e999'"), ("1e31 2", "1e-30 to 1e\\+30, got 1e\\+31"),
    ("1e-31", "1e-31"), ("7 values", "'values'"),
])
def test_bad_text(text, part):
    explorer = mapping()
    picture, readout = explorer.png(), explorer.readout
    explorer.controls["data"].value = text
    assert [type(error) for error in explorer.errors] == [ValueError]
    assert message(explorer)
    with pytest.raises(ValueError, match=part):
        explorer.set(data=text)
    assert (explorer.png(), explorer.readout) == (picture, readout)
    explorer.press("ties: absmax at 4 bits")
    assert not message(explorer)


def test_data_chips():
    explorer = MAKERS["mapping"]()
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


def test_a_hand_on_alpha_chooses_the_range():
    explorer = mapping()
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


@pytest.mark.parametrize("in_time", [True, False])
def test_rounded_answers_of_the_browser_do_not_choose_the_range(in_time, monkeypatch):
    monkeypatch.setattr(qlab.live, "_ANSWER_SECONDS", 60 if in_time else -1)
    explorer = mapping()
    alpha, beta = explorer.controls["alpha"], explorer.controls["beta"]
    alpha.set_state({"value": -4.0})  # as the browser tells of a hand
    assert values(explorer)["scheme"] == "α, β"
    for scheme, low, high in (("zero-point", -7.59, 10.8), ("absmax", -10.8, 10.8)):
        explorer.controls["scheme"].value = scheme
        readout = explorer.readout
        for control, value in ((alpha, low), (beta, high), (alpha, low)):
            control.set_state({"value": round(value / control.step) * control.step})
        assert (values(explorer)["scheme"], explorer.readout) == (scheme, readout)
    alpha.set_state({"value": -10.7})
    assert values(explorer)["scheme"] == "α, β"
    assert not explorer.errors


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


@pytest.mark.parametrize("scheme", ["absmax", "zero-point", "α, β"])
@pytest.mark.parametrize("narrow", [False, True])
def test_mapping_of_zeros(scheme, narrow):
    explorer = mapping([0, 0, 0])
    explorer.set(scheme=scheme, narrow=narrow)
    assert explorer.readout["mse"] == 0
    assert explorer.readout["sqnr_db"] == np.inf
    assert explorer.readout["zero_point"] == 0
    assert scheme == "α, β" or explorer.readout["scale"] == 1


def test_a_range_of_mapping_keeps_a_width():
    explorer = mapping()
    explorer.set(alpha=-2.0, beta=5.0)
    explorer.controls["alpha"].value = 6.0
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (pytest.approx(4.9), 5.0)
    assert_maps_directly(explorer, SEVEN)
    explorer.controls["beta"].value = -3.0
    assert values(explorer)["beta"] == pytest.approx(5.0)
    explorer.set(scheme="α, β", alpha=3.0, beta=3.0)
    assert (values(explorer)["alpha"], values(explorer)["beta"]) == (pytest.approx(2.9), 3.0)
    assert not explorer.errors


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


@pytest.mark.parametrize("scheme", ["absmax", "zero-point", "α, β"])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_picture_of_a_mapping(shared_mapping, bits, scheme):
    explorer = shared_mapping
    explorer.set(data=str(list(SEVEN)), narrow=False)
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
               for line in above.lines if line.get_color() in (qlab.live.BLUE, qlab.live.VERMILION)}
    for color, some in ((qlab.live.BLUE, ~clipped), (qlab.live.VERMILION, clipped)):
        xs, ys = threads[color]
        np.testing.assert_allclose(xs[:, :2], np.stack([x[some], x_hat[some]], axis=1), atol=1e-6)
        np.testing.assert_allclose(code_at(xs[:, 2]), codes[some], atol=1e-5)
        assert (ys[:, [0, 2]] == [1, 0]).all()
        assert np.isnan(xs[:, 3]).all()

    all_codes = np.arange(read["qmin"], read["qmax"] + 1)
    levels = read["scale"] * (all_codes - read["zero_point"])
    (grid,) = [line for line in above.lines if line.get_color() == qlab.live.GREY]
    xs = grid.get_xdata().reshape(all_codes.size, -1)  # a row for each level; the last column is a gap
    np.testing.assert_allclose(xs[:, 0], levels, atol=1e-6)
    np.testing.assert_allclose(code_at(xs[:, -2]), all_codes, atol=1e-5)

    steps = (x - x_hat) / read["scale"]
    below = {line.get_color(): line.get_data() for line in explorer.figure.axes[1].lines
             if line.get_animated() and line.get_marker() == "None"}
    ends = np.reshape(below[qlab.live.BLUE], (2, -1, 3))[:, :, 1]  # of the stems
    np.testing.assert_allclose(ends, [x[~clipped], steps[~clipped]], atol=1e-5)
    xs, ys = np.reshape(below[qlab.live.GREY], (2, -1, 3))[:, :, :2]  # of the sawtooth
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


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["absmax", "zero-point"])
@pytest.mark.parametrize("per, group_size, scales", [
    ("tensor", 32, 1), ("channel", 32, 192), ("group", 16, 6912), ("group", 192, 576),
])
def test_granularity_reads_what_affine_computes(shared_granularity, *, per, group_size, scales, scheme, bits):
    explorer = shared_granularity
    explorer.set(per=per, group_size=group_size, scheme=scheme, bits=bits)
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


def test_what_a_row_would_have_with_its_own_scale():
    explorer = granularity(WEIGHTS, bits=8)
    middle = explorer.figure.axes[1]
    expected = middle.collections[0].get_paths()[0].vertices[:, 0]
    explorer.set(per="channel")
    now = middle.lines[0].get_xdata()
    assert np.all(np.diff(now) <= 0.03)  # the rows with the largest weights come first
    assert all(np.abs(expected - x).min() < 0.03 for x in now)
    assert expected.max() == pytest.approx(1 / np.sqrt(12), rel=1e-6)


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
    assert_sound(explorer) if w.size > 1 else None


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
