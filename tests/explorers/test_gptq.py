"""The live figures of lesson 08: each control over its whole range, and what they show against `qlab.gptq`."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlab import samples
from qlab.affine import dequantize, fake_quantize, sqnr_db
from qlab.explorers import clip_search, compensation
from qlab.explorers.gptq import BY_SIZE, RANGES, ROW, SHARES, STORED
from qlab.gptq import compensated, factor, hessian, weight_params
from tests.explorers.checks import (
    assert_compute_draws_nothing,
    assert_pairs_meet,
    assert_refuses,
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    figures,
    own,
    pairwise,
    pictures_along,
    values,
)
from tests.explorers.test_hands_of_grids import drag, share

W, X, HELD_OUT = samples.part_of_o()
W, X, HELD_OUT = W[:16, :32], X[:, :32], {name: other[:, :32] for name, other in HELD_OUT.items()}
GATE = samples.products()[29, "mlp_in"][0], samples.products()[29, "mlp_in"][1][:24]
START = {
    "compensation": {"columns": 0, "bits": 4, "group": ROW, "damping": 0.01, "order": STORED, "tokens": 2048,
                     "ranges": "min-max"},
    "clip_search": {"share": 1.0, "bits": 4, "group": ROW},
}
OPTIONS = {"columns": (0, 1, 19, 32), "bits": (2, 4), "group": [ROW, 16], "damping": (1e-4, 1.0),
           "order": [STORED, BY_SIZE], "tokens": (16, 2048), "ranges": list(RANGES)}
SETTINGS = {"compensation": [{"columns": 20}, {"columns": 13, "bits": 3, "group": 16, "order": BY_SIZE, "tokens": 64}],
            "clip_search": [{"share": 0.8}, {"share": 0.5, "bits": 3, "group": 64}]}
MAKERS = {"compensation": lambda: compensation(W, X, HELD_OUT), "clip_search": lambda: clip_search(*GATE[::-1])}
shared, put = figures(MAKERS, START)


def percent(x, w, w_hat):
    """The error of x wᵀ, in float64."""
    x, w, w_hat = (np.asarray(a, np.float64) for a in (x, w, w_hat))
    return 100 * np.linalg.norm(x @ (w - w_hat).T) / np.linalg.norm(x @ w.T)


def directly(setting, columns=None, w=W, x=X):
    """What GPTQ does with the first columns, without the figure."""
    known = factor(hessian(torch.tensor(x[:setting["tokens"]]).double()), damping=setting["damping"],
                   act_order=setting["order"] == BY_SIZE)
    size = None if setting["group"] == ROW else setting["group"]
    return known.order, compensated(torch.tensor(w), known, setting["bits"], group_size=size, ranges=setting["ranges"],
                                    columns=setting["columns"] if columns is None else columns)


# both


@pytest.mark.parametrize("name, control", [(name, control) for name, start in START.items() for control in start])
def test_a_control_over_its_whole_range(name, control):
    pictures = pictures_along(put(name, SETTINGS[name][control != "bits"]), control, redrawn=["bits"])
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("name", START)
def test_the_picture_does_not_depend_on_the_way_there(name):
    fresh = MAKERS[name]()
    fresh.set(**SETTINGS[name][1])
    assert_same_whichever_way(shared(name), fresh)


@pytest.mark.parametrize("name, make", [("compensation", compensation), ("clip_search", clip_search)])
def test_words(name, make):
    explorer = make()  # of what ships
    assert values(explorer) == START[name]
    assert_words(explorer)


def test_compute_draws_nothing():
    assert_compute_draws_nothing(put("compensation", {}), [{"columns": 9}, {"tokens": 32}, {"group": 16}, {"bits": 5}])
    assert_compute_draws_nothing(put("clip_search", {}), [{"share": 0.5}, {"bits": 3}, {"group": 32}])


@pytest.mark.parametrize("name", START)
def test_parts_can_be_veiled(name):
    explorer = put(name, SETTINGS[name][0])
    seen = {explorer.png()}
    for part in explorer._parts:
        explorer.veil(part)
        seen.add(explorer.png())
    assert len(seen) == 1 + len(explorer._parts) > 2
    explorer.veil()
    assert explorer.png() in seen


@pytest.mark.parametrize("make", [compensation, clip_search])
@pytest.mark.parametrize("w, x, part", [
    (np.ones((2, 4)), None, "x must be given"), (None, np.ones((2, 4)), "w must be given"),
    (np.ones(4), np.ones((3, 4)), r"w must be a matrix, got shape \(4,\)"),
    (np.ones((2, 4)), np.ones(4), "x must be a matrix"),
    (np.ones((2, 4)), np.ones((3, 5)), r"x must be of shape \(tokens, 4\)"),
    (np.full((2, 4), np.nan), np.ones((3, 4)), "w must be finite"), (np.ones((2, 4)), np.zeros((3, 4)), "not all 0"),
    (np.ones((0, 4)), np.ones((3, 4)), "empty"),
])
def test_bad_arrays(make, w, x, part):
    with pytest.raises(ValueError, match=part):
        make(w, x)


@pytest.mark.parametrize("name, bad", [
    ("compensation", {"columns": 33, "bits": 9, "group": 48, "damping": 2.0, "order": "last", "tokens": 100,
                      "ranges": "MSE"}),
    ("clip_search", {"share": 0.1, "bits": 1, "group": 128}),
])
def test_a_bad_setting_is_told(name, bad):
    for control, value in bad.items():
        assert_refuses(put(name, {}), control, value)


# GPTQ


@pytest.mark.usefixtures("unseen")
def test_the_replay_is_gptq_as_far_as_some_column():
    settings = list(pairwise(OPTIONS))
    assert_pairs_meet(settings, OPTIONS)
    for setting in settings:
        explorer = put("compensation", setting)
        order, expected = directly(setting)
        w_hat, now = dequantize(expected.codes, expected.params), explorer._result.now
        assert (now.codes != expected.codes).float().mean() < 2e-3  # sums in another order: a tie here and there
        torch.testing.assert_close(now.weights, expected.weights, rtol=0, atol=2e-3)
        read = explorer.readout
        texts = {"calibration": X[:setting["tokens"]], **HELD_OUT}
        assert {name: read[f"{name}_percent"] for name in texts} == pytest.approx(
            {name: percent(x, W, w_hat) for name, x in texts.items()}, rel=0.02)
        assert read["weight_sqnr_db"] == pytest.approx(sqnr_db(W, w_hat.numpy()), abs=0.05)
        _, nearest = directly(setting, columns=0)
        nearest = dequantize(nearest.codes, nearest.params)
        assert {name: read[f"nearest_{name}_percent"] for name in texts} == pytest.approx(
            {name: percent(x, W, nearest) for name, x in texts.items()}, rel=1e-3)
        assert list(explorer._result.order) == order.tolist()


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("setting", SETTINGS["compensation"])
def test_the_picture_is_that_of_the_weights(setting):
    explorer = put("compensation", setting)
    setting, columns = START["compensation"] | setting, setting["columns"]
    order, expected = directly(setting)
    steps = expected.params.scale.numpy()
    steps = steps[:, None] if setting["group"] == ROW else steps.repeat(setting["group"], 1)
    moved = expected.weights.clone()
    moved[:, order[:columns]] = dequantize(expected.codes, expected.params)[:, order[:columns]]
    shift = ((moved.numpy() - W) / steps)[:, order]
    cells, profile, curve = explorer.figure.axes[:3]
    np.testing.assert_allclose(cells.images[0].get_array(), shift[:16], atol=0.02)
    assert explorer.readout["largest_shift_steps"] == pytest.approx(np.abs(shift).max(), abs=0.02)
    rounded, to_come = (patch.get_data().values for patch in profile.patches)
    np.testing.assert_allclose(rounded + to_come, np.sqrt((shift**2).mean(0)), atol=0.01)
    assert not rounded[columns:].any() and not to_come[:columns].any()
    lines = [line for line in curve.lines if len(line.get_xdata()) == 33]
    for line, name in zip(lines, ("calibration", *HELD_OUT), strict=True):
        x = HELD_OUT.get(name, X[:setting["tokens"]])
        for place in (0, 15, 32):
            _, then = directly(setting, columns=int(line.get_xdata()[place]))
            w_hat = dequantize(then.codes, then.params)
            assert line.get_ydata()[place] == pytest.approx(percent(x, W, w_hat), rel=0.02)


@pytest.mark.usefixtures("unseen")
def test_few_tokens_are_learned_by_heart():
    """On the tokens of H the error falls, on other texts only with many of them."""
    explorer = compensation()
    nearest = explorer.readout
    explorer.set(columns=64)
    many = explorer.readout
    explorer.set(tokens=64)
    few = explorer.readout
    assert few["calibration_percent"] < 0.35 * few["nearest_calibration_percent"]
    for name in HELD_OUT:
        assert few[f"{name}_percent"] > 1.1 * few[f"nearest_{name}_percent"]
        assert many[f"{name}_percent"] < 0.85 * many[f"nearest_{name}_percent"]
    assert many["weight_sqnr_db"] < nearest["weight_sqnr_db"] - 2


def test_the_columns_are_taken_in_the_picture():
    explorer = put("compensation", {})
    for which in range(3):
        drag(explorer, "columns", (10, None), (23.4, None), which=which)
        assert values(explorer)["columns"] == 23
        drag(explorer, "columns", (99, None), which=which)
        assert values(explorer)["columns"] == 32
        drag(explorer, "columns", (-3, None), which=which)
        assert values(explorer)["columns"] == 0


def test_a_cell_and_a_column_under_the_pointer():
    explorer = put("compensation", {"columns": 20, "order": BY_SIZE})
    order, now = directly(START["compensation"] | {"columns": 20, "order": BY_SIZE})
    cells, profile, curve = explorer.figure.axes[:3]
    for x, code in ((7, f", code {now.codes[5, order[7]]}"), (28, "")):
        explorer._picture.pointer = {"hover": share(explorer, cells, x + 0.5, 5.5)}
        first, second, third = explorer._picture.tip.split("\n")
        assert first == f"row 5, column {order[x]}, " + ("rounded" if code else "to come")
        assert second == f"{W[5, order[x]]:.4g} → {now.weights[5, order[x]]:.4g}{code}"
        assert third == f"shift: {explorer._result.shift[5, x]:+.2f} steps"
    explorer._picture.pointer = {"hover": share(explorer, profile, 7.5, 0.1)}
    assert explorer._picture.tip.startswith(f"column {order[7]}, rounded\nshift: 0.")
    explorer._picture.pointer = {"hover": share(explorer, curve, 7.5, 1)}
    assert explorer._picture.tip == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, n, outputs", [(1, 2, 1), (40, 48, 30)])
def test_a_layer_of_ones_own(tokens, n, outputs):
    x, w = own(tokens, n, outputs)
    x[:, n // 2] = 0  # a column that no input has met
    explorer = compensation(torch.tensor(w).bfloat16().requires_grad_(), x, own(9, n, outputs, seed=1)[0], bits=3)
    w = torch.tensor(w).bfloat16().float().numpy()
    for columns in (0, n // 2, n):
        explorer.set(columns=columns)
        assert_sound(explorer)
        _, then = directly(values(explorer), w=w, x=x)
        assert explorer.readout["held_out_percent"] == pytest.approx(
            percent(own(9, n, outputs, seed=1)[0], w, dequantize(then.codes, then.params)), rel=0.02)
    assert explorer.controls["group"].options == ((ROW, 16) if n == 48 else (ROW,))


@pytest.mark.parametrize("held_out, part", [
    ({"calibration": X}, "names of their own"), (dict.fromkeys("abcd", X), "up to 3 texts"), ({3: X}, "names"),
    ({"prose": X[:, :5]}, r"held_out\['prose'\] must be of shape"), (np.full((3, 32), np.inf), "must be finite"),
])
def test_bad_texts(held_out, part):
    with pytest.raises(ValueError, match=part):
        compensation(W, X, held_out)


# clipping


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [ROW, 64])
def test_the_three_errors_over_the_share_of_the_range(bits, group):
    x, w = GATE
    params = weight_params(torch.tensor(w), bits, group_size=None if group == ROW else group)
    explorer = put("clip_search", {"bits": bits, "group": group})
    lines = [line for line in explorer.figure.axes[1].lines if len(line.get_xdata()) == len(SHARES)]
    h = np.sqrt(np.square(x, dtype=np.float64).sum(0))
    for share_of in (1.0, 0.85, 0.4):
        explorer.set(share=share_of)
        w_hat = fake_quantize(torch.tensor(w), replace(params, scale=params.scale * share_of)).numpy()
        expected = [percent(np.eye(w.shape[1]), w, w_hat), percent(np.diag(h), w, w_hat), percent(x, w, w_hat)]
        read = explorer.readout
        shown = [read[f"{name}_error_percent"] for name in ("weight", "weighted", "output")]
        assert shown == pytest.approx(expected, rel=1e-3)
        place = int(np.argmin(np.abs(SHARES - share_of)))
        assert [line.get_ydata()[place] for line in lines] == pytest.approx(expected, rel=1e-3)
        assert read["weight_sqnr_db"] == pytest.approx(sqnr_db(w, w_hat), abs=0.01)
        steps = params.scale.numpy()
        steps = steps[:, None] if group == ROW else steps.repeat(group, 1)
        now = explorer.figure.axes[0].lines[1]
        columns = 100 * np.sqrt(((w - w_hat)**2).mean(0) / (w**2).mean())
        np.testing.assert_allclose(now.get_ydata(), columns.clip(max=now.axes.get_ylim()[1]), rtol=1e-3)
        np.testing.assert_allclose(now.get_xdata(), h / np.sqrt(len(x)), rtol=1e-4)
        assert read["clipped_percent"] == pytest.approx(100 * (np.abs(w - w_hat) > share_of * 0.5005 * steps).mean())


@pytest.mark.usefixtures("unseen")
def test_the_best_range_of_the_weights_is_not_that_of_the_output():
    explorer = clip_search()
    weights, weighted, output = explorer._result.curves
    explorer.press("best for weights")
    assert values(explorer)["share"] == pytest.approx(SHARES[weights.argmin()])
    explorer.press("best by diag(H)")
    assert values(explorer)["share"] == pytest.approx(SHARES[weighted.argmin()])
    assert SHARES[weights.argmin()] < SHARES[output.argmin()] < 1
    assert output[weights.argmin()] > output[-1]


def test_the_share_is_taken_in_the_picture():
    explorer = put("clip_search", {})
    drag(explorer, "the share", (0.71, None), (0.66, None))
    assert values(explorer)["share"] == pytest.approx(0.65)
    drag(explorer, "the share", (0.1, None))
    assert values(explorer)["share"] == 0.4


def test_a_column_of_weights_under_the_pointer():
    explorer = put("clip_search", {"share": 0.8})
    columns, curve = explorer.figure.axes
    x, _ = GATE
    inputs = np.sqrt((x**2).mean(0))
    largest = int(inputs.argmax())
    error = columns.lines[1].get_ydata()[largest]
    explorer._picture.pointer = {"hover": share(explorer, columns, inputs[largest], error)}
    assert explorer._picture.tip == f"column {largest}\ninputs: {inputs[largest]:.3g}, error: {error:.1f} %"
    for axes, at in ((columns, (inputs[largest], 1)), (curve, (0.8, 10))):
        explorer._picture.pointer = {"hover": share(explorer, axes, *at)}
        assert not explorer._picture.tip
