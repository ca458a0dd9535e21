"""What can be taken in the figures of lessons 04 to 07, and what is told of what lies under the pointer."""

import itertools
import math

import numpy as np
import pytest

from qlab import samples
from qlab.explorers import digits_ptq, landscape, outliers, qat, rotation, rotation_2d, smoothing, training_run
from qlab.explorers.outliers_figure import CLIP, FLOAT, KEEP
from qlab.explorers.qat_figure import LSQ, PACT
from qlab.explorers.smoothquant import OFF, RIGHT
from qlab.explorers.spinquant import DIAGONAL, HADAMARD
from tests.explorers.checks import message, values

HISTORY = [
    {"step": 2, "accuracy": 31.5, "ranges": {"conv": (0.0, 1.0)}}, {"step": 3, "loss": 2.5}, {"step": 5, "loss": 1.25},
    {"step": 9, "loss": 0.75, "accuracy": 60.0, "ranges": {"conv": (0.0, 1.25)}},
]
MAKERS = {"qat": qat, "smoothing": smoothing, "rotation_2d": rotation_2d, "outliers": outliers,
          "training_run": lambda: training_run(HISTORY)}
_drags = itertools.count(1)


class Hand:
    """A pointer over a figure, as the browser reports it."""

    def __init__(self, explorer, **setting):
        self.explorer = explorer
        explorer.set(**setting)
        self.picture = explorer.widget.children[3]

    def axes(self, words):
        return next(a for a in self.explorer.figure.axes if words in (a.get_title(), a.get_ylabel()))

    def share(self, axes, at):
        width, height = self.explorer.figure.bbox.size
        x, y = axes.transData.transform(at)
        return [x / width, 1 - y / height]

    def grip(self, axes, at):
        """The one that the browser would take there: a point before a line, a line before a region, then the nearer."""
        x, y = self.share(axes, at)
        size = self.picture.size
        found = []
        for grip in self.picture.grips:
            left, top, w, h = grip["box"]
            if left <= x <= left + w and top <= y <= top + h:
                far = math.hypot((x - left - w / 2) * size[0] * grip["thin"][0],
                                 (y - top - h / 2) * size[1] * grip["thin"][1])
                found.append((-grip["rank"], far, grip))
        return min(found, key=lambda f: f[:2])[2] if found else None

    def drag(self, axes, start, *stops):
        """Take what is at ``start``, and let it go at the last stop; gives its name."""
        grip = self.grip(axes, start)
        drag = {"drag": next(_drags), "grip": grip["id"], "start": self.share(axes, start)}
        for stop in stops:
            self.picture.pointer = {**drag, "at": self.share(axes, stop), "held": True}
        assert self.explorer.errors == []
        self.picture.pointer = {**drag, "at": self.share(axes, stops[-1]), "held": False}
        return grip["name"]

    def under(self, axes, at):
        """What is told of a place."""
        self.picture.pointer = {"hover": None}  # it comes from outside
        self.picture.pointer = {"hover": self.share(axes, at)}
        assert not self.explorer.errors
        return self.picture.tip

    def assert_agrees(self, **wanted):
        """Controls, numbers and picture, with each other and with a figure that was never dragged."""
        now = values(self.explorer)
        assert {name: now[name] for name in wanted} == pytest.approx(wanted)
        self.undragged.set(**now)
        assert self.undragged.readout == self.explorer.readout
        assert self.undragged.png() == self.explorer.png()
        assert not message(self.explorer)


@pytest.fixture(scope="module")
def figures():
    return {name: (make(), make(), make()) for name, make in MAKERS.items()}


@pytest.fixture
def hand(figures):
    """A hand over a figure as it began, beside another one of its kind that must stay as it is."""
    others = []

    def over(name, **setting):
        explorer, undragged, other = figures[name]
        explorer.reset()
        explorer.errors.clear()
        others.append((other, other.png(), values(other)))
        found = Hand(explorer, **setting)
        found.undragged = undragged
        return found

    yield over
    for other, picture, kept in others:
        assert (other.png(), values(other)) == (picture, kept)


@pytest.mark.parametrize("panel", ["x̂", "∂x̂/∂x", "∂x̂/∂s"])
@pytest.mark.parametrize("stops, x", [
    ([(2, 0), (-1.2, 0.3)], -1.2), ([(0.1, 0.5)], 0.1), ([(9, 0)], 3), ([(-9, 0)], -3),
])
def test_x_on_the_staircase(hand, panel, stops, x):
    hand = hand("qat")
    assert hand.drag(hand.axes(panel), (0.65, 0), *stops) == "x"
    hand.assert_agrees(x=x, s=0.5)


@pytest.mark.parametrize("panel", ["x̂", "∂x̂/∂x", "∂x̂/∂s"])
@pytest.mark.parametrize("start, stop, s", [
    (1.5, 2.4, 0.8), (-2, -0.4, 0.1), (1.5, 0.2, 0.2 / 3), (1.5, 0, 1 / 64), (-2, 2, 1 / 64), (1.5, 2.999, 1),
])
def test_s_by_an_end_of_the_range(hand, panel, start, stop, s):
    hand = hand("qat")
    assert hand.drag(hand.axes(panel), (start, 0), (stop, 0)) == "the end of the range"
    hand.assert_agrees(s=pytest.approx(s, rel=0.02), x=0.65)  # the slider's step is 3.5 %


@pytest.mark.parametrize("stop, s", [((0.9, 0.7), 0.8), ((0.1, 0.1), 0.1), ((-1, -1), 1 / 64), ((3, 3), 1)])
@pytest.mark.parametrize("bits", [2, 8])
def test_s_by_the_first_step(hand, stop, s, bits):
    hand = hand("qat", bits=bits)
    assert hand.drag(hand.axes("x̂"), (0.5, 0.5), stop) == "s, the step"
    hand.assert_agrees(s=pytest.approx(s, rel=0.02), bits=bits)


@pytest.mark.parametrize("panel", ["x̂", "∂x̂/∂x", "∂x̂/∂α"])
@pytest.mark.parametrize("stop, alpha", [(1.3, 1.3), (-1, 0.25), (9, 3)])
def test_alpha_on_the_staircase(hand, panel, stop, alpha):
    hand = hand("qat", scheme=PACT)
    assert hand.drag(hand.axes(panel), (2, 0), (stop, 0)) == "the end of the range"
    hand.assert_agrees(alpha=alpha, s=0.5, x=0.65)
    assert hand.grip(hand.axes("x̂"), (0, 0)) is hand.grip(hand.axes("x̂"), (0.5, -2)) is None  # s is not learned


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_can_be_read_at_both_ends(bits):
    explorer = qat(bits)
    explorer.set(scheme=PACT)
    explorer.set(scheme=LSQ)
    below = explorer.figure.axes[2]
    for x in (-3, 3):
        explorer.set(x=float(x), s=1 / 64)
        gradient = explorer.readout["gradient_by_s"]
        assert gradient in below.get_yticks()
        assert f"{gradient:.0f}".replace("-", "−") in [label.get_text() for label in below.get_yticklabels()]
        assert below.get_ylim()[0] < gradient < below.get_ylim()[1]


@pytest.mark.parametrize("stop, alpha", [((0.8, 3), 0.8), ((0.31, 1), 0.3), ((-0.02, 1), 0), ((1.02, 1), 1)])
def test_alpha_on_the_curve_of_smoothing(hand, stop, alpha):
    hand = hand("smoothing", direction=RIGHT)
    axes = hand.axes("error of Y = X Wᵀ")
    assert hand.drag(axes, (0.5, hand.explorer.readout["output_error_percent"]), (0.1, 1), stop) == "α"
    hand.assert_agrees(alpha=alpha)


def test_no_dot_no_hand(hand):
    assert hand("smoothing", direction=OFF).picture.grips == []


@pytest.mark.parametrize("setting", [{}, {"outlier": DIAGONAL, "bits": 3}])
@pytest.mark.parametrize("panel, start, stop, theta", [
    ("rotated: x R", (8, 0), (4, 4), 45), ("rotated: x R", (-8, 1), (-1, -8), 90), ("rotated: x R", (5, 5), (5, 0), 0),
    ("rotated: x R", (5, 0), (5 * math.cos(math.radians(33)), 5 * math.sin(math.radians(33))), 33),
    ("turned back: x", (8, 0), (4, -4), 45), ("turned back: x", (0, 8), (1, 8), 7),
    ("turned back: x", (1, 0), (0, 1), 0),
    ("relative to θ = 0", (0, 1), (60, 1), 60), ("relative to θ = 0", (0, 0.6), (99, 2), 90),
])
def test_the_angle(hand, *, setting, panel, start, stop, theta):
    hand = hand("rotation_2d", **setting)
    hand.drag(hand.axes(panel), start, stop)
    hand.assert_agrees(theta=theta, **setting)
    hand.explorer.set(theta=20)
    before = hand.explorer.png()
    hand.drag(hand.axes("turned back: x"), (3, 4), (4, 3), (3, 4))  # it is where it was, and so is the angle
    assert hand.explorer.controls["theta"].value == 20
    assert hand.explorer.png() == before


@pytest.mark.parametrize("panel, height", [("loss (nats)", 1), ("accuracy (%)", 50)])
@pytest.mark.parametrize("stops, step", [
    ([(3, 1)], 3), ([(2.2, 1), (5.4, 1)], 5), ([(-9, 1)], 2), ([(3, 1), (99, 1)], 9),
])
def test_the_step_of_a_training(hand, panel, height, stops, step):
    hand = hand("training_run")
    assert hand.drag(hand.axes(panel), (9, height), *stops) == "the step"
    hand.assert_agrees(step=step)


def test_a_training_of_one_step_cannot_be_dragged_anywhere():
    hand = Hand(training_run(HISTORY[:1]))
    hand.drag(hand.axes("accuracy (%)"), (2, 50), (3, 50))
    assert values(hand.explorer) == {"step": 2}


def test_a_history_that_begins_without_a_number_has_no_change_of_it():
    hand = Hand(training_run([{"step": 0}, {"step": 1, "loss": 1.0, "accuracy": 50.0}]), step=0)
    hand.drag(hand.axes("accuracy (%)"), (0, 50), (1, 50))
    assert hand.explorer.readout["accuracy"] == 50


@pytest.mark.parametrize("treatment", [CLIP, FLOAT])
@pytest.mark.parametrize("stop, threshold", [(2, 2), (0.05, 0.25), (25, 24.675)])
def test_the_threshold(hand, treatment, stop, threshold):
    hand = hand("outliers", treatment=treatment)
    assert hand.drag(hand.axes("|x|"), (100, 6), (400, 3), (300, stop)) == "the threshold"
    hand.assert_agrees(threshold=pytest.approx(threshold, rel=1e-3), treatment=treatment)


def test_no_threshold_no_hand(hand):
    assert hand("outliers", treatment=KEEP).picture.grips == []


@pytest.mark.parametrize("name, setting, axes, start, stop", [
    ("outliers", {"treatment": CLIP}, "|x|", (100, 6), (100, 1)), ("qat", {}, "x̂", (0.65, 0), (2, 0)),
    ("smoothing", {"direction": RIGHT}, "error of Y = X Wᵀ", None, (0.8, 1)),
    ("rotation_2d", {"theta": 10.0}, "rotated: x R", (8, 0), (4, 4)),
    ("training_run", {}, "accuracy (%)", (9, 50), (3, 50)),
])
def test_what_was_before_stays_faintly_while_a_hand_holds(hand, *, name, setting, axes, start, stop):
    hand = hand(name, **setting)
    axes = hand.axes(axes)
    start = start or (0.5, hand.explorer.readout["output_error_percent"])
    drag = {"drag": next(_drags), "grip": hand.grip(axes, start)["id"], "start": hand.share(axes, start),
            "at": hand.share(axes, stop)}
    hand.picture.pointer = {**drag, "held": True}
    held, told = hand.picture.png, hand.picture.numbers
    hand.picture.pointer = {**drag, "held": False}
    assert held != hand.picture.png
    assert " (+" in told or " (−" in told
    assert " (+" not in hand.picture.numbers and " (−" not in hand.picture.numbers


# under the pointer

X, _ = samples.products()[12, "attn_in"]
SIZE = np.abs(X)
PEAK = int(SIZE.max(0).argmax())


def test_a_channel_and_a_token_of_outliers(hand):
    hand = hand("outliers")
    told = hand.under(hand.axes("|x|"), (PEAK + 0.9, 1))
    median = np.median(SIZE[:, PEAK])
    assert told.startswith(f"channel {PEAK}\nlargest |x|: {SIZE.max():.4g}, median {median:.3g}\nhalf a step at 0: ")
    told = hand.under(hand.axes("token"), (PEAK - 0.4, 17.5))
    assert told.startswith(f"channel {PEAK}, token 17\n|x| = {SIZE[17, PEAK]:.4g}, code ")
    assert told.endswith(" of 255")
    code = int(told.split()[-3])
    step = (max(X.max(), 0) - min(X.min(), 0)) / 255
    assert code == pytest.approx(SIZE[17, PEAK] / step, abs=0.51)
    told = hand.under(hand.axes("error of the output"), (1, 2))
    assert told.startswith("one scale per channel\n")
    assert hand.under(hand.axes("token"), (3, -30)) == ""
    hand.explorer.set(treatment=FLOAT)
    assert hand.under(hand.axes("|x|"), (PEAK + 0.5, 1)).endswith("\nin float")
    assert hand.under(hand.axes("token"), (PEAK + 0.5, 3)).endswith(", in float")


@pytest.mark.parametrize("x", [0, 0.5, 300, 575.9])
def test_every_place_of_a_profile_names_a_channel_near(hand, x):
    hand = hand("outliers")
    channel = int(hand.under(hand.axes("|x|"), (x, 1)).split()[1])
    assert 0 <= channel < 576
    assert abs(channel + 0.5 - x) <= 0.004 * 576 + 1


def test_a_channel_of_smoothing(hand):
    hand = hand("smoothing")
    axes = hand.axes("largest |X| of each channel")
    before = hand.under(axes, (PEAK, 1))
    assert before.startswith(f"channel {PEAK}\nlargest |X|: {SIZE.max():.4g}\nlargest |W|: ")
    hand.explorer.set(direction=RIGHT)
    after = hand.under(axes, (PEAK, 1))
    assert f"{SIZE.max():.4g} → {hand.explorer.readout['largest_x']:.4g}" in after


def test_a_channel_of_a_rotation():
    hand = Hand(rotation())
    assert hand.under(hand.axes("|x|"), (PEAK, 1)) == f"channel {PEAK}\nlargest |x|: {SIZE.max():.4g}"
    bars = hand.axes("error of the output")
    assert hand.under(bars, (1, 0)).startswith("none\nmean of the tokens: 37.9 %")
    assert hand.under(bars, (1, 2)).startswith("Hadamard\nmean of the tokens: 10.6 %")
    hand.explorer.veil("bars")
    assert hand.under(bars, (1, 2)) == ""  # it would answer the question
    hand.explorer.set(rotate=HADAMARD)
    assert f"largest |x|: {SIZE.max():.4g} → " in hand.under(hand.axes("|x|"), (PEAK, 1))


@pytest.mark.long
@pytest.mark.parametrize("place", list(samples.products()))
def test_what_stands_in_front_in_a_landscape(place):
    hand = Hand(landscape(), place=place)
    x = np.abs(samples.products()[place][0])
    axes = hand.explorer.figure.axes[0]
    told = set()
    for across, up in itertools.product(np.linspace(0.05, 0.95, 24), np.linspace(0.1, 0.9, 15)):
        hand.picture.pointer = {"hover": [across, up]}
        if hand.picture.tip:
            first, second = hand.picture.tip.split("\n")
            channel, token = (int(word) for word in first.replace(",", "").replace(":", "").split()[1:4:2])
            assert first.endswith(f"|x| = {x[token, channel]:.4g}")
            assert second.startswith(f"largest in the channel: {x[:, channel].max():.4g}, median ")
            told.add(channel)
    assert not hand.explorer.errors
    assert len(told) > 20
    readout = hand.explorer.readout
    across, up, _, w = axes.get_proj() @ [readout["at_channel"], readout["at_token"], np.log10(readout["largest"]), 1]
    assert hand.under(axes, (across / w, up / w)).startswith(
        f"channel {readout['at_channel']}, token {readout['at_token']}: |x| = {readout['largest']:.4g}\n")


def test_layers_and_broken_digits():
    hand = Hand(digits_ptq(), weight_bits=3)
    strip, bars, pictures = hand.explorer.figure.axes
    readout = hand.explorer.readout
    layers = [label.get_text() for label in bars.get_yticklabels()]
    worst = layers.index(readout["least_sqnr"])
    told = hand.under(bars, (10, worst + 0.3))
    assert told.startswith(f"{readout['least_sqnr']}, ")
    assert f"SQNR of its output: {readout['least_sqnr_db']:.1f} dB\n".replace("-", "−") in told
    right = round(readout["accuracy"] * 3.6)
    assert hand.under(strip, (50, 0.5)) == f"{right} of 360 test images are read right"
    captions = [text.get_text() for text in pictures.texts[2:]]
    for i, caption in enumerate(captions):
        told = hand.under(pictures, (11 * (i % 4) + 5, 11 * (i // 4) + 5))
        label, now = caption.split(" → ")
        assert told.endswith(f"\nlabel and float: {label}, now read as {now}")
    assert hand.under(pictures, (20, -3)) == ""
    hand.explorer.set(weight_bits=8)
    assert hand.explorer.readout["broken"] < 12
    assert hand.under(pictures, (43, 32)) == ""
