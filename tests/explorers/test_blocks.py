"""The live figure of lesson 09: each control over its whole range, its numbers against `qlab.blocks`, and a hand."""

from dataclasses import replace

import numpy as np
import pytest

from qlab import affine, blocks, samples
from qlab.explorers import codebooks
from qlab.explorers.blocks import NAMES, RULES
from qlab.explorers.colors import ORANGE
from tests.explorers.checks import (
    assert_compute_draws_nothing,
    assert_pairs_meet,
    assert_refuses,
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    figures,
    pairwise,
    pictures_along,
    values,
)
from tests.explorers.test_hands_of_grids import drag, share

ARRAYS = {"weights": samples.load("weights")[:48], "activations": samples.load("activations")[:32]}
START = {"codebooks": {"data": "weights", "format": "MXFP4", "size": "own", "rule": "floor", "block": 0, "value": 0.4}}
FORMATS = {fmt.name: fmt for fmt in blocks.FORMATS}
OPTIONS = {"data": list(ARRAYS), "format": list(NAMES), "size": ["own", 16, 32, 64], "rule": list(RULES)}
SETTINGS = [{}, {"data": "activations", "format": "NVFP4", "size": 16, "block": 9}]

shared, put_there = figures({"codebooks": lambda: codebooks(ARRAYS)}, START)


def put(setting):
    return put_there("codebooks", setting)


def own_size(name):
    return FORMATS[name].block if name in FORMATS else {"int4 absmax": 32, "int4 zero-point": 64}[name]


def dequantized(x, setting):
    """The copy of a tensor, without the figure, and its bits per value."""
    name = setting["format"]
    size = own_size(name) if setting["size"] == "own" else setting["size"]
    if name in FORMATS:
        fmt = replace(FORMATS[name], block=size)
        fmt = replace(fmt, rule=setting["rule"]) if fmt.scale == blocks.E8M0 else fmt
        return blocks.dequantize(blocks.quantize(x, fmt)), fmt.bits_per_value
    find = affine.absmax_params if name == "int4 absmax" else affine.zero_point_params
    bits = 4 + (16 if name == "int4 absmax" else 20) / size
    return affine.fake_quantize(x, find(x, 4, group_size=size)), bits


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("control", START["codebooks"])
def test_a_control_over_its_whole_range(control, setting):
    if (control, "format" in setting) == ("rule", True):
        assert put(setting).controls["rule"].disabled
        return
    pictures = pictures_along(put(setting), control)
    assert len(set(pictures)) >= 0.7 * len(pictures)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(setting):
    fresh = codebooks(ARRAYS)
    fresh.set(**setting)
    assert_same_whichever_way(shared("codebooks"), fresh)


def test_words():
    explorer = codebooks(ARRAYS)
    assert values(explorer) == START["codebooks"]
    assert_words(explorer)


def test_compute_draws_nothing():
    assert_compute_draws_nothing(put({}), [{"value": 0.9}, {"format": "NF4"}, {"block": 3}, {"rule": "ceil"}])


@pytest.mark.usefixtures("unseen")
def test_the_numbers_are_those_of_the_formats():
    settings = list(pairwise(OPTIONS))
    assert_pairs_meet(settings, OPTIONS)
    for setting in settings:
        explorer, x = put(setting), ARRAYS[setting["data"]]
        x_hat, bits = dequantized(x, setting)
        read = explorer.readout
        size = own_size(setting["format"]) if setting["size"] == "own" else setting["size"]
        assert values(explorer) == START["codebooks"] | setting
        assert read["sqnr_db"] == pytest.approx(affine.sqnr_db(x, x_hat))
        assert read["bits_per_value"] == bits
        if setting["format"] != "Q4_1" or setting["data"] != "weights":
            assert read["block_db"] == pytest.approx(affine.sqnr_db(x.ravel()[:size], x_hat.ravel()[:size]))


def test_weights_that_come_from_q4_1_stand_at_the_edge():
    explorer = put({"format": "Q4_1"})
    assert explorer.readout["sqnr_db"] > 60
    for axes in explorer.figure.axes[2:]:
        (ring,) = [line for line in axes.lines if line.get_color() == ORANGE]
        assert ring.get_ydata()[0] == axes.get_ylim()[1] < 60
    explorer.set(data="activations")
    assert explorer.readout["sqnr_db"] < 25


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ARRAYS)
def test_a_value_in_the_hand_goes_where_the_format_sends_it(name, data):
    explorer, looked_at = put({"data": data, "format": name}), 0
    size = own_size(name)
    for block in (0, 6, 13, 31):
        number = block * (ARRAYS[data].size // size) // 32
        x = ARRAYS[data].copy()
        run = x.reshape(-1, size)[number]
        peak = float(np.abs(run).max())
        if 0 in (run.argmin(), run.argmax()):  # another value there would change the scale
            continue
        for value in (-0.97, -0.31, 0.0, 0.12, 0.55):
            if not run[1:].min() < value * peak < run[1:].max():
                continue
            explorer.set(block=block, value=value)
            run[0] = value * peak
            expected = dequantized(x, values(explorer))[0].reshape(-1, size)[number, 0]
            assert explorer.readout["value"] == pytest.approx(value * peak)
            assert explorer.readout["level"] == pytest.approx(expected, abs=1e-6 * peak)
            assert explorer.readout["error"] == pytest.approx(value * peak - expected, abs=1e-6 * peak)
            looked_at += 1
    assert looked_at > 5


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name, place", [("MXFP4", 1), ("Q4_0", 2), ("Q4_1", 4), ("Q8_0", 2)])
def test_the_byte_is_that_of_the_file(name, place):
    explorer = put({"format": name, "data": "activations"})
    x = ARRAYS["activations"].copy()
    for block in (2, 17):
        run = x.reshape(-1, 32)[block * (x.size // 32) // 32]
        explorer.set(block=block, value=round(float(run[0] / np.abs(run).max()), 2))
        data = blocks.pack(blocks.quantize(run, FORMATS[name]))
        if int(explorer.readout["code"].split()[0]) != int(blocks.quantize(run, FORMATS[name]).codes[0]) % 256:
            continue  # a hand stops at hundredths
        assert explorer.readout["byte"] == f"0x{data[place]:02X}"


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name, byte", [
    ("MXFP6 E2M3", "no common layout"), ("int4 absmax", "no common layout"), ("MXFP8 E4M3", "0x"), ("NF4", "0x"),
])
def test_formats_that_no_file_has(name, byte):
    explorer = put({"format": name})
    assert explorer.readout["byte"].startswith(byte)
    number, bits = explorer.readout["code"].removesuffix("₂").split(" = ")
    assert int(bits, 2) == int(number)
    if name == "NF4":  # of two neighbours bitsandbytes has the first in the high half
        assert explorer.readout["byte"][2] == f"{int(number):X}"


@pytest.mark.usefixtures("unseen")
def test_only_powers_of_two_have_the_three_rules():
    explorer = put({"rule": "ceil"})
    for name in NAMES:
        explorer.controls["format"].value = name
        assert explorer.controls["rule"].disabled == (not name.startswith("MX"))
        sizes = own_size(name), explorer.readout["bits_per_value"]
        explorer.set(size=sizes[0])
        assert explorer.readout["bits_per_value"] == sizes[1]
        explorer.set(size="own")
    assert values(explorer)["rule"] == "ceil"


def test_a_value_is_taken_in_the_picture():
    explorer = put({})
    drag(explorer, "the value", (-0.6, None), (0.25, None))
    assert values(explorer)["value"] == pytest.approx(0.25, abs=0.01)
    drag(explorer, "the value", (5, None))
    assert values(explorer)["value"] == explorer.controls["value"].max


def test_a_point_under_the_pointer():
    explorer = put({})
    above, _, every, small = explorer.figure.axes
    bits, db = 8.5, affine.sqnr_db(ARRAYS["weights"], dequantized(ARRAYS["weights"], START["codebooks"] | {
        "format": "Q8_0"})[0])
    explorer._picture.pointer = {"hover": share(explorer, every, bits, db)}
    assert explorer._picture.tip == f"Q8_0, blocks of 32\n8.5 bits, {db:.1f} dB"
    explorer._picture.pointer = {"hover": share(explorer, every, 7, db)}
    assert not explorer._picture.tip
    explorer._picture.pointer = {"hover": share(explorer, small, 4.25, 18.65)}
    assert explorer._picture.tip.startswith("MXFP4, blocks of 32")
    explorer._picture.pointer = {"hover": share(explorer, small, 5, small.get_ylim()[1] - 0.05)}
    assert explorer._picture.tip.splitlines()[0] == "Q4_1, blocks of 32"
    assert float(explorer._picture.tip.split(", ")[-1].removesuffix(" dB")) > 60
    explorer._picture.pointer = {"hover": share(explorer, above, 0, 0.5)}
    assert not explorer._picture.tip


def test_one_array_and_zeros_within_it():
    x = np.random.default_rng(0).standard_normal((2, 3, 192))
    x[0, 0] = 0
    explorer = codebooks(x, format="NF4")
    assert explorer.controls["data"].layout.display == "none"
    assert explorer.controls["size"].options == ("own", 16, 32, 64)
    assert explorer.readout["level"] == 0
    assert np.isinf(explorer.readout["block_db"])
    explorer.set(block=20)
    assert_sound(explorer)


@pytest.mark.parametrize("x, part", [
    (np.ones((2, 32)), "multiple of 64, got shape \\(2, 32\\)"), (np.float32(3), "multiple of 64"),
    ({}, "at least one"),
    (np.full(64, np.nan), "x must be finite"), ({"rows": np.zeros(64)}, "of rows must be from 0.001 to 60000"),
    (np.full(64, 1e5), "got 100000"), ([], "empty"),
])
def test_bad_arrays(x, part):
    with pytest.raises(ValueError, match=part):
        codebooks(x)


def test_bad_formats():
    with pytest.raises(ValueError, match=r"format must be one of MXFP8 E5M2, .* got 'FP4'"):
        codebooks(ARRAYS, format="FP4")
    for name, value in {"format": "FP4", "size": 33, "rule": "round", "block": 32, "value": 2.0}.items():
        assert_refuses(put({}), name, value)
