"""The live figure of post-training quantization against qlab.ptq alone."""

import copy
from functools import lru_cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from qlab import digits, ptq
from qlab.affine import sqnr_db
from qlab.explorers import digits_ptq
from qlab.explorers.ptq import _most_confused
from tests.explorers.checks import (
    assert_same_whichever_way,
    assert_words,
    figures,
    pictures_along,
    texts,
    values,
)

LESSON = Path(__file__).parents[2] / "notebooks" / "04_ptq_and_qat.ipynb"
DATA = digits.data()
MAKERS = {"digits_ptq": digits_ptq}
START = {
    "digits_ptq": {"weight_bits": 8, "activation_bits": 8, "calibrator": "min-max", "weights": "per tensor",
                   "weight_range": "min-max", "mode": "static"},
}
SETTINGS = [
    {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 3, "activation_bits": 5, "calibrator": "percentile", "weights": "per channel",
     "weight_range": "MSE"},
    {"mode": "dynamic", "activation_bits": 3},
]
CONTROLS = [(setting, control) for setting in SETTINGS for control in START["digits_ptq"]
            if (control, setting.get("mode")) != ("calibrator", "dynamic")]
ORDINARY = [  # for comparisons with qlab.ptq
    {}, {"weight_bits": 2}, {"activation_bits": 2}, {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 4, "activation_bits": 4, "weights": "per channel"},
    {"weight_bits": 3, "activation_bits": 3, "weights": "per channel", "weight_range": "MSE", "calibrator": "MSE"},
    {"weight_bits": 3, "activation_bits": 4, "weight_range": "MSE", "calibrator": "percentile"},
    {"weight_bits": 5, "activation_bits": 3, "calibrator": "KL"}, {"activation_bits": 3, "calibrator": "EMA"},
    {"activation_bits": 4, "weight_bits": 4, "mode": "dynamic"},
    {"activation_bits": 2, "weights": "per channel", "mode": "dynamic", "calibrator": "MSE"},
]

shared, put = figures(MAKERS, START)


@pytest.mark.parametrize("setting, control", CONTROLS)
def test_a_control_over_its_whole_range(setting, control):
    pictures = pictures_along(put("digits_ptq", setting), control)
    assert len(set(pictures)) == len(pictures)


@pytest.fixture(scope="module")
def fresh():
    """Another figure, which has not been moved yet."""
    explorer = digits_ptq()
    assert values(explorer) == START["digits_ptq"]
    return explorer


def test_words(fresh):
    assert_words(fresh)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(fresh, setting):
    fresh.set(**START["digits_ptq"] | setting)
    # The MSE calibrator searches long, and is met elsewhere.
    assert_same_whichever_way(shared("digits_ptq"), fresh, refuses=lambda _, *move: move == ("calibrator", "MSE"))


@lru_cache
def float_network():
    model = ptq.fold_batch_norm(digits.load())
    return model, ptq.observe(model, DATA.train_images[:256])


def quantized_network(*, weight_bits, activation_bits, calibrator, weights, weight_range, mode):
    """What `digits_ptq` shows, by way of qlab.ptq alone."""
    model, observed = float_network()
    choice = {"weight_bits": weight_bits, "activation_bits": activation_bits, "weight_range": weight_range,
              "per_channel": weights == "per channel"}
    if mode == "dynamic":
        return ptq.quantize_dynamic(model, **choice)
    return ptq.quantize_static(model, ptq.calibrate(observed, activation_bits, calibrator) | {"conv": (0, 1)}, **choice)


def predictions(model):
    with torch.no_grad():
        return model(DATA.test_images).argmax(1).numpy()


def outputs_of_layers(model):
    outputs, hooks = {}, []
    for name in ptq.layers(float_network()[0]):
        hooks.append(model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: outputs.update({name: output.numpy().copy()})))
    predictions(model)
    for hook in hooks:
        hook.remove()
    return outputs


def sqnr_of_layers(model, quantized):
    """Decibels of each layer's output against the float network's."""
    exact, rounded = map(outputs_of_layers, (model, quantized))
    return {name: 10 * np.log10(np.sum(x**2) / np.sum((x - rounded[name]) ** 2)) for name, x in exact.items()}


def each_layer_alone(model, quantized):
    """Accuracy in percent, and decibels of the logits, with one layer quantized and the others in float."""
    accuracies, ratios = {}, {}
    for name in ptq.layers(model):
        alone = copy.deepcopy(model)
        alone.set_submodule(name, quantized.get_submodule(name))
        accuracies[name] = digits.accuracy(alone, DATA.test_images, DATA.test_labels)
        with torch.no_grad():
            ratios[name] = float(sqnr_db(model(DATA.test_images), alone(DATA.test_images)))
    return accuracies, ratios


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("changes", ORDINARY, ids=str)
def test_digits_ptq_reads_what_ptq_computes(changes):
    explorer = put("digits_ptq", changes)
    setting = START["digits_ptq"] | changes
    quantized, model = quantized_network(**setting), float_network()[0]
    sqnr = sqnr_of_layers(model, quantized)
    truth, before, after = DATA.test_labels.numpy(), predictions(model), predictions(quantized)
    least = min(sqnr, key=sqnr.get)
    accuracies, ratios_alone = each_layer_alone(model, quantized)
    worst = min(sqnr, key=lambda name: (round(accuracies[name], 6), ratios_alone[name]))
    bytes_in_all = sum(
        layer.weight.numel() * setting["weight_bits"] / 8 + 4 * layer.bias.numel()
        + 4 * (len(layer.weight) if setting["weights"] == "per channel" else 1) for layer in ptq.layers(model).values())
    readout = dict(explorer.readout)
    assert (readout.pop("least_sqnr"), readout.pop("worst_alone")) == (least, worst)
    confusions = confusion_matrix(truth, after, labels=range(10))
    np.fill_diagonal(confusions, 0)
    times = confusions.max()
    label, reading = np.argwhere(confusions == times)[0]
    assert readout.pop("most_confused") == f"{label} read as {reading}, {times} time{'s' if times > 1 else ''}"
    assert readout == pytest.approx({
        "accuracy": digits.accuracy(quantized, DATA.test_images, DATA.test_labels),
        "float_accuracy": digits.accuracy(digits.load(), DATA.test_images, DATA.test_labels),
        "broken": np.sum((before == truth) & (after != truth)), "mended": np.sum((before != truth) & (after == truth)),
        "standard_error": 100 * np.std(after == truth) / np.sqrt(360), "least_sqnr_db": sqnr[least],
        "worst_alone_accuracy": accuracies[worst], "size_kb": bytes_in_all / 1000,
    }, rel=1e-4)

    strip, bars, pictures = explorer.figure.axes
    (share,) = strip.patches[1:]
    assert share.get_width() == pytest.approx(readout["accuracy"])
    assert texts(strip)[0] == f"{readout['accuracy']:.1f} ± {readout['standard_error']:.1f} % right"
    drawn = [line for line in bars.collections if line.get_animated()]
    for ratios, expected in zip(drawn, (sqnr, ratios_alone), strict=True):
        found = [segment[1][0] for segment in ratios.get_segments()]
        np.testing.assert_allclose(found, list(expected.values()), atol=1e-3)
    assert [label.get_text() for label in bars.get_yticklabels()] == list(sqnr)
    said = [[float(word) for word in text.split() if word != "%"] for text in texts(bars)]
    np.testing.assert_allclose([number for number, *_ in said], [*sqnr.values(), *ratios_alone.values()], atol=0.0501)
    np.testing.assert_allclose([numbers[1] for numbers in said[len(sqnr):]], list(accuracies.values()), atol=0.0501)
    low, high = bars.get_xlim()
    assert all(low < db < high - 4 for db in sqnr.values())  # room for the number
    assert all(low < db < high - 12 for db in ratios_alone.values())

    broken = np.flatnonzero((before == truth) & (after != truth))
    count, _, *captions = texts(pictures)
    assert count == f"Broken digits: {len(broken)}" + (", 12 of them:" if len(broken) > 12 else "")
    assert captions == [f"{truth[i]} → {after[i]}" for i in broken[:12]]
    mosaic = np.asarray(pictures.images[0].get_array())
    shown = np.zeros(mosaic.shape[:2], bool)
    for place, i in enumerate(broken[:12]):
        x, y = (pictures.texts[2 + place].get_position() - np.array([5, 8.3])).astype(int)
        block = mosaic[y:y + 8, x + 1:x + 9]
        np.testing.assert_allclose(block[..., 0], 240 * (1 - DATA.test_images[i, 0]), atol=0.501)
        assert (block[..., :3] == block[..., :1]).all()
        assert (block[..., 3] == 255).all()
        shown[y:y + 8, x + 1:x + 9] = True
    assert (mosaic[~shown] == 0).all()
    assert shown.sum() == 64 * min(len(broken), 12)


@pytest.mark.parametrize("labels, readings, spelled", [
    ([3, 5], [3, 5], "none"), ([0], [9], "0 read as 9, 1 time"), ([8, 1, 8, 8], [1, 8, 1, 8], "8 read as 1, 2 times"),
    ([9, 2, 2], [0, 7, 3], "2 read as 3, 1 time"),
])
def test_most_confused(labels, readings, spelled):
    assert _most_confused(torch.tensor(labels), torch.tensor(readings)) == spelled


@pytest.mark.usefixtures("unseen")
def test_few_bits_break_digits_and_eight_do_not():
    broken = [put("digits_ptq", {"weight_bits": bits, "activation_bits": bits}).readout["broken"] for bits in (8, 4, 2)]
    assert broken[0] <= 2
    assert 12 < broken[1] < 100 < broken[2]


def said(lesson, kind):
    """The text of all cells of one kind, without what they printed."""
    return "\n".join(cell.source for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == kind)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("changes, accuracy", [
    ({"weight_bits": 4}, 93.1), ({"activation_bits": 4}, 98.6), ({"weight_bits": 3}, 70.6),
    ({"activation_bits": 3}, 95.3), ({"weight_bits": 4, "weights": "per channel"}, 97.5),
    ({"activation_bits": 4, "weights": "per channel"}, 98.3),
    *[({"weight_bits": 3, "activation_bits": 3, **more}, accuracy) for more, accuracy in [
        ({}, 55.0), ({"calibrator": "KL"}, 58.1), ({"weight_range": "MSE"}, 75.8), ({"weights": "per channel"}, 76.1),
        ({"weights": "per channel", "weight_range": "MSE", "calibrator": "MSE"}, 88.6)]],
], ids=str)
def test_what_lesson_04_says_of_digits_ptq(changes, accuracy):
    explorer = put("digits_ptq", changes)
    assert explorer.readout["accuracy"] == pytest.approx(accuracy, abs=0.33)  # an image, by sums in another order
    if changes != {"activation_bits": 4, "weights": "per channel"}:
        assert explorer.readout["least_sqnr"] == "pointwise3"
    assert f"{accuracy} %" in said(LESSON, "markdown")


@pytest.mark.usefixtures("unseen")
def test_what_lesson_04_says_of_each_layer_alone():
    accuracies, ratios = each_layer_alone(float_network()[0], quantized_network(**START["digits_ptq"] | {
        "weight_bits": 3, "activation_bits": 3}))
    for name, accuracy in (("pointwise1", 89.2), ("depthwise1", 91.9), ("pointwise2", 94.4), ("pointwise3", 98.6)):
        assert accuracies[name] == pytest.approx(accuracy, abs=0.33)
        assert f"{accuracy} %" in said(LESSON, "markdown")
    assert min(accuracies, key=accuracies.get) == "pointwise1"
    assert abs(ratios["pointwise1"] - ratios["pointwise2"]) < 0.3  # "as bad as"


def test_what_lesson_04_says_of_the_channels_of_a_layer():
    reach = ptq.layers(float_network()[0])["depthwise3"].weight.detach().flatten(1).abs().amax(1)
    assert f"from {reach.min():.2f} to {reach.max():.2f}" in said(LESSON, "markdown")


@pytest.mark.usefixtures("unseen")
def test_what_a_scale_per_channel_takes():
    sizes = [put("digits_ptq", {"weight_bits": 3, "weights": weights}).readout["size_kb"]
             for weights in ("per tensor", "per channel")]
    assert f"{sizes[1] - sizes[0]:.1f}" == "0.9"  # as lesson 04 says


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("calibrator", ptq.CALIBRATORS)
def test_another_calibrator_helps_little_where_the_weights_fail(calibrator):
    accuracy = put("digits_ptq", {"weight_bits": 3, "activation_bits": 3, "calibrator": calibrator}).readout["accuracy"]
    assert 54 < accuracy < 59


@pytest.mark.usefixtures("unseen")
def test_dynamic_quantization_needs_no_calibrator():
    explorer = put("digits_ptq", {"activation_bits": 3})
    assert not explorer.controls["calibrator"].disabled
    static = explorer.readout
    explorer.controls["mode"].value = "dynamic"
    assert explorer.controls["calibrator"].disabled
    dynamic = explorer.readout
    assert dynamic != static
    explorer.set(calibrator="EMA")
    assert explorer.readout == dynamic
    explorer.set(calibrator="min-max", mode="static")
    assert explorer.readout == static
    assert not explorer.controls["calibrator"].disabled


@pytest.mark.usefixtures("unseen")
def test_digits_ptq_leaves_torchs_settings_alone(monkeypatch):
    inside = []
    observe = ptq.observe
    monkeypatch.setattr(ptq, "observe", lambda *given: inside.append(torch.get_num_threads()) or observe(*given))
    quantize = ptq.quantize_static
    monkeypatch.setattr(ptq, "quantize_static",
                        lambda *given, **more: inside.append(torch.get_num_threads()) or quantize(*given, **more))
    torch.set_num_threads(2)
    try:
        explorer = digits_ptq()
        assert torch.get_num_threads() == 2
        explorer.set(weight_bits=7, mode="dynamic")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert inside == [1, 1, 1, 1]
    assert torch.is_grad_enabled()
