"""The live figure of gradients through a staircase against autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from qlab import qat as quantizers
from qlab.explorers import qat
from qlab.explorers.qat_figure import LSQ, PACT
from tests.explorers.checks import assert_same_whichever_way, assert_words, figures, pictures_along, values

MAKERS = {"qat": qat}
START = {"qat": {"scheme": LSQ, "bits": 3, "s": 0.5, "alpha": 2.0, "x": 0.65}}
SETTINGS = [{}, {"scheme": PACT, "bits": 4, "alpha": 1.3, "x": 0.9}]
CONTROLS = [(setting, control) for setting in SETTINGS for control in START["qat"]
            if (control, setting.get("scheme", LSQ)) not in [("s", PACT), ("alpha", LSQ)]]

shared, put = figures(MAKERS, START)


@pytest.mark.parametrize("setting, control", CONTROLS)
def test_a_control_over_its_whole_range(setting, control):
    pictures = pictures_along(put("qat", setting), control, redrawn=["scheme", "bits"])
    assert len(set(pictures)) == len(pictures)


def test_words_and_that_the_picture_does_not_depend_on_the_way_there():
    fresh = qat()
    assert values(fresh) == START["qat"]
    assert_words(fresh)
    for setting in SETTINGS:
        fresh.set(**START["qat"] | setting)
        assert_same_whichever_way(shared("qat"), fresh)


def round_ste(u):
    return (u.round() - u).detach() + u


def ends(scheme, bits, s, alpha):
    return (0, alpha) if scheme == PACT else (-s * min(2 ** (bits - 1), 127), s * (2 ** (bits - 1) - 1))


def formulas(scheme, bits, s, alpha, x):
    """x̂ and its gradients by x and by s or α, out of autograd; float64 tensors of the shape of ``x``."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    p = torch.full_like(x, s if scheme == LSQ else alpha).requires_grad_()
    if scheme == LSQ:
        most = 2 ** (bits - 1) - 1
        x_hat = round_ste((x / p).clamp(-min(most + 1, 127), most)) * p
    else:
        y = torch.where(x < p, x.clamp(min=0), p)
        s = p.detach() / (2**bits - 1)
        x_hat = round_ste(y / s) * s
    return x_hat.detach(), *torch.autograd.grad(x_hat.sum(), (x, p))


def trained(scheme, bits, s, alpha, x):
    """The same by way of qlab.qat, in float32."""
    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    if scheme == LSQ:
        quantizer, share = quantizers.LSQ(bits, s, n=1), 1 / math.sqrt(2 ** (bits - 1) - 1)
        p = quantizer.scale = nn.Parameter(torch.full((len(x),), s))  # one for each x, to see each gradient
    else:
        quantizer, share = quantizers.PACT(bits, alpha), 1
        p = quantizer.alpha = nn.Parameter(torch.full((len(x),), alpha))
    x_hat = quantizer(x)
    by_x, by_p = torch.autograd.grad(x_hat.sum(), (x, p))
    return x_hat.detach(), by_x, by_p / share


def curve_at(line, x):
    """Heights of a line that has gaps, at places that are not its corners."""
    xs, ys = (np.asarray(values, float) for values in line.get_data())
    found = np.full(len(x), np.nan)
    for i in range(len(xs) - 1):
        inside = (xs[i] < x) & (x < xs[i + 1])
        assert not (inside & ~np.isnan(found)).any(), "two heights at one place"
        found[inside] = np.interp(x[inside], xs[i:i + 2], ys[i:i + 2])
    return found


SCALES = st.sampled_from([1 / 64, 0.02, 0.1, 0.3125, 0.5, 0.77, 1.0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=st.sampled_from([LSQ, PACT]), bits=st.integers(2, 8), s=SCALES, alpha=st.floats(0.25, 3),
       near=st.sampled_from(["anywhere", "low", "high"]), steps=st.floats(-1, 1))
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="high", steps=0.3)  # outside, though it rounds to the last code
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="low", steps=-0.3)
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="high", steps=0.0)
@example(scheme=PACT, bits=3, s=0.5, alpha=1.0, near="high", steps=0.0)
@example(scheme=PACT, bits=3, s=0.5, alpha=1.0, near="low", steps=0.0)
def test_qat_reads_the_gradients_of_autograd(unseen, *, scheme, bits, s, alpha, near, steps):
    step = s if scheme == LSQ else alpha / (2**bits - 1)
    low, high = ends(scheme, bits, s, alpha)
    x = min(max({"anywhere": 0, "low": low, "high": high}[near] + steps * (3 if near == "anywhere" else step), -3), 3)
    explorer = put("qat", {"scheme": scheme, "bits": bits, "s": s, "alpha": alpha, "x": x})
    x_hat, by_x, by_p = (value.item() for value in formulas(scheme, bits, s, alpha, [x]))
    readout = explorer.readout
    assert readout["x_hat"] == pytest.approx(x_hat, abs=1e-12)
    assert readout["straight_through"] == by_x
    assert readout["gradient_by_s" if scheme == LSQ else "gradient_by_alpha"] == pytest.approx(by_p, abs=1e-9)
    assert readout["code"] * step == pytest.approx(x_hat, abs=1e-9)
    heights = [line.get_ydata()[0] for axes in explorer.figure.axes for line in axes.lines if line.get_marker() == "o"]
    assert heights == pytest.approx([x_hat, by_x, by_p], abs=1e-9)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("scheme", [LSQ, PACT])
@pytest.mark.parametrize("bits, s, alpha", [
    (2, 0.7, 2.5), (3, 0.5, 2.0), (4, 0.3, 0.9), (8, 0.015625, 3.0), (8, 0.5, 1.0),
])
def test_the_curves_of_qat(scheme, bits, s, alpha):
    explorer = put("qat", {"scheme": scheme, "bits": bits, "s": s, "alpha": alpha})
    above, middle, below = explorer.figure.axes
    x = np.linspace(-2.9987, 2.9971, 4001)
    stairs, ones, by_p = (value.numpy() for value in formulas(scheme, bits, s, alpha, x))
    moving = [[line for line in axes.lines if line.get_animated() and line.get_linestyle() != "None"]
              for axes in (above, middle, below)]
    (x_hat, _), (jumps, true, straight_through, _), (gradient, _) = moving
    np.testing.assert_allclose(curve_at(x_hat, x), stairs, atol=1e-6)
    np.testing.assert_allclose(curve_at(straight_through, x), ones)
    np.testing.assert_allclose(curve_at(gradient, x), by_p, atol=1e-6)
    np.testing.assert_array_equal(curve_at(true, x), 0)
    for theirs, ours in zip(trained(scheme, bits, s, alpha, x), (stairs, ones, by_p), strict=True):
        assert np.mean(np.abs(theirs.numpy() - ours) < 1e-4) > 0.995  # float32 rounds ties and ends its own way

    places = np.unique(np.asarray(jumps.get_xdata())[np.isfinite(jumps.get_xdata())])
    crossed = x[1:][np.diff(stairs) != 0]
    assert np.sum((x[0] < places) & (places < x[-1])) == len(crossed)
    assert all(np.abs(places - place).min() < 2 * (x[1] - x[0]) for place in crossed)
    low, high = ends(scheme, bits, s, alpha)
    for axes in (above, middle, below):
        left, right = [patch for patch in axes.patches if patch.get_animated()]
        assert (left.get_x() + left.get_width() if low > -3 else low) == pytest.approx(low)
        assert (right.get_x() if high < 3 else high) == pytest.approx(high)
    assert below.get_ylabel() == ("∂x̂/∂s" if scheme == LSQ else "∂x̂/∂α")
    assert explorer.readout["range"] == f"{low:.4g} … {high:.4g}".replace("-", "−")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.integers(2, 8), s=SCALES, steps=st.floats(-200, 200))
def test_the_squared_error_asks_for_a_smaller_step_inside_and_a_larger_one_outside(unseen, bits, s, steps):
    explorer = put("qat", {"bits": bits, "s": s})
    explorer.set(x=min(max(steps * s, -3), 3))
    readout, x = explorer.readout, explorer.controls["x"].value
    slope = (readout["x_hat"] - x) * readout["gradient_by_s"]
    if readout["straight_through"]:
        assert slope == pytest.approx(s * (round(x / s) - x / s) ** 2, abs=1e-9)
    else:
        assert slope < 0


@pytest.mark.usefixtures("unseen")
def test_the_true_derivative_does_not_exist_at_a_jump():
    explorer = put("qat", {"s": 0.5, "bits": 3})
    for x, at_a_jump in ((0.25, True), (0.26, False), (-1.75, True), (1.25, True), (1.75, False), (-2.25, False)):
        explorer.set(x=x)
        assert (explorer.readout["true_derivative"] != 0) == at_a_jump


@pytest.mark.usefixtures("unseen")
def test_one_parameter_is_learned_at_a_time():
    explorer = put("qat", {})
    assert (explorer.controls["s"].disabled, explorer.controls["alpha"].disabled) == (False, True)
    explorer.controls["scheme"].value = PACT
    assert (explorer.controls["s"].disabled, explorer.controls["alpha"].disabled) == (True, False)


@pytest.mark.parametrize("bits", [1, 9, 4.5, "4", None])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        qat(bits)
