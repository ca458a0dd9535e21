"""The exercises on the straight-through estimator: what is right, and the misconceptions that their checks know."""

import math

import numpy as np
import pytest
import torch

from qlab import affine, qat
from tests.exercises.checks import asked, check


def rounded(x, s, low, high):
    return torch.round(x / s).clip(low, high) * s


def half_away_ste(x, s, low, high):
    u = (x / s).detach()
    return x + ((torch.sign(u) * (abs(u) + 0.5).floor()).clip(low, high) * s - x).detach()


class Staircase(torch.autograd.Function):
    """x̂, with the gradient by x that ``inside`` makes of x / s and the two ends, times the one that comes; and by s."""

    @staticmethod
    def forward(ctx, x, s, low, high, inside):  # noqa: PLR0917
        u, codes = x / s, torch.round(x / s).clip(low, high)
        ctx.save_for_backward(inside(u, low, high), codes - u * ((low < u) & (u < high)))
        return rounded(x, s, low, high)

    @staticmethod
    def backward(ctx, gradient):
        by_x, by_s = ctx.saved_tensors
        return by_x * gradient, (by_s * gradient).sum(), None, None, None


def staircase(inside):
    return lambda *arguments: Staircase.apply(*arguments, inside)


def one_inside(u, low, high):
    return ((low < u) & (u < high)).float()


MISTAKES = [
    ("straight_through", rounded, "no gradient arrives"),
    ("straight_through", staircase(lambda u, low, high: 0 * u), "no gradient arrives"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach(), "does not depend on x"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach().numpy(), "does not depend on x"),
    ("straight_through", torch.no_grad()(rounded), "does not depend on x"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach().requires_grad_(), "does not depend on x"),
    ("straight_through", lambda x, *rest: (rounded(x, *rest) - x).detach() + x, "clip is inside of detach()"),
    ("straight_through", staircase(lambda u, low, high: 0 * u + 1), "clip is inside of detach()"),
    ("straight_through", lambda x, s, low, high: (x / s).clip(low, high) + (
        rounded(x, s, low, high) - (x / s).clip(low, high)).detach(), "1 / s inside"),
    ("straight_through", lambda x, s, low, high: qat.round_ste(x / s).clip(low, high), "integer codes q"),
    ("straight_through", lambda x, s, low, high: rounded(x, s, low, high) / s, "integer codes q"),
    ("straight_through", lambda x, s, low, high: s * qat.round_ste(x / s), "Nothing is clipped"),
    ("straight_through", lambda x, s, low, high: x.clip(s * low, s * high), "not rounded"),
    ("straight_through", lambda x, s, low, high: s.detach() * qat.round_ste((x / s.detach()).clip(low, high)),
     "none arrives at s"),
    ("straight_through", lambda x, s, low, high: affine.fake_quantize(x, affine.QParams(s, 0, low, high)).detach()
     + one_inside((x / s).detach(), low, high) * (x - x.detach()), "none arrives at s"),
    ("straight_through", lambda x, s, low, high: x.clip(low * s, high * s) + (
        rounded(x, s, low, high) - x.clip(low * s, high * s)).detach(), "From inside the range none arrives at s"),
    ("straight_through", lambda x, s, low, high: s * round((x / s).clip(low, high)), "torch has its own"),
    ("straight_through", half_away_ste, "A half goes away from 0"),
    ("straight_through", lambda x, s, low, high: torch.floor(x / s + 0.5).clip(low, high) * s, "A half goes up"),
]
RIGHT = [
    ("straight_through", lambda x, s, low, high: s * qat.round_ste((x / s).clip(low, high))),
    ("straight_through", lambda x, s, low, high: s * qat.round_ste(x / s).clip(low, high)),  # rint first
    ("straight_through", lambda x, s, low, high: torch._fake_quantize_learnable_per_tensor_affine(
        x, s.reshape(1), torch.zeros(1), low, high)),
    ("straight_through", staircase(one_inside)),
]
STEPS = [  # wrong in a way that no misconception explains, and the step that is told at the second failure
    ("straight_through", lambda x, s, low, high: 3 * x, "way forward"),
    ("straight_through", staircase(lambda u, low, high: 3 * one_inside(u, low, high)), "Look at the way back"),
    ("straight_through", lambda x, s, low, high: staircase(one_inside)(x, s.detach(), low, high) + 3 * (s - s.detach()),
     "Look at s"),
]
FIRST_CASES = [  # how the first case of a check is told
    ("straight_through", "For x̂ where x = [-3.0, -0.75, -0.25, 0.2, 0.25, 0.75, 1.2, 9.0], s = 0.5, qmin = -4, "
                         "qmax = 3: expected [-2, -1, 0, 0, 0, 1, 1, 1.5], "),
]


def test_straight_through_asks_for_values_and_gradients_where_all_agree():
    calls = asked("straight_through", staircase(one_inside))
    assert [(len(x), *rest) for x, *rest in calls] == 3 * [(8, 0.5, -4, 3)] + 2 * [(73_704, 0.11, -8, 7)]
    for x, s, low, high in calls:
        assert all(given.dtype == torch.float32 and given.requires_grad and given.is_leaf for given in (x, s))
        u = x.detach().double() / s
        assert (u > high).any()
        beyond = torch.maximum(low - u, u - high)
        assert ((beyond < -1e-3) | (beyond > 0.5 + 1e-3)).all()
    assert (calls[0][0] < -4 * 0.5).any()


def test_the_gradients_of_the_tiny_case_are_told():
    assert check("straight_through", rounded).text.startswith(
        "For the gradient of sum(x̂) with respect to x where x = [-3.0, -0.75, -0.25, 0.2, 0.25, 0.75, 1.2, 9.0], "
        "s = 0.5, qmin = -4, qmax = 3: expected [0, 1, 1, 1, 1, 1, 1, 0], "
        "your function gave [0, 0, 0, 0, 0, 0, 0, 0].\n")
    assert "your function gave 'no gradient'.\n" in check("straight_through", torch.no_grad()(rounded)).text


@pytest.mark.parametrize("numpys", [
    lambda x, s, low, high: s * np.clip(np.rint(x / s), low, high),
    lambda x, s, low, high: s * np.clip((x / s).round(), low, high),
])
def test_numpys_functions_are_told_of_torchs(numpys):
    text = check("straight_through", numpys).text
    assert "no gradient would arrive" in text and "torch.round and torch.clamp" in text


def test_an_exception_on_the_way_back_is_told():
    verdict = check("straight_through", staircase(lambda u, low, high: u[1:]))
    assert verdict.passed is False
    assert verdict.text.startswith("For the gradient of sum(x̂)")
    assert "your function raised RuntimeError: " in verdict.text


@pytest.mark.parametrize("nonsense", [
    lambda x: x.sum(), lambda x: x[1:], lambda x: (x,), lambda x: x.to(torch.complex64), lambda x: x.to_sparse(),
    lambda x: x.to("meta"), lambda x: x > 0, lambda x: x * math.nan, lambda x: x.double().numpy(), lambda x: x.zero_(),
    lambda x: torch.Tensor, lambda x: [x, x],
])
@pytest.mark.filterwarnings("error")
def test_other_tensors_are_wrong_not_a_crash(nonsense):
    assert check("straight_through", lambda x, *_: nonsense(x)).passed is False


def test_gradients_are_asked_for_even_where_they_are_switched_off():
    with torch.no_grad():
        assert check("straight_through", staircase(one_inside)).passed
        assert not torch.is_grad_enabled()
