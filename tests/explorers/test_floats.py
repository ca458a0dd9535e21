"""The figure of lesson 01: boxes, texts and chips agree with each other and with the formats."""

import re
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest

from qlab.explorers import float_bits
from qlab.floats import FORMATS, FP32, decode, encode, fields
from tests.explorers.checks import assert_words, made, message

BY_NAME = {fmt.name: fmt for fmt in FORMATS}
PLAIN = str.maketrans("−⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "-0123456789-")


@lru_cache
def shared():
    return made(lambda: float_bits(1))


def at(value, name="FP32"):
    """The shared figure, moved there."""
    for setting in ({"value": "1"}, {"format": name}, {"value": str(value)}):
        shared().set(**setting)
    shared().errors.clear()
    return shared()


def boxes(explorer):
    """The buttons, sign first."""
    return [box for group in explorer.controls["code"].children for box in group.children[1].children]


def shown_bits(explorer):
    return "".join(box.description for box in boxes(explorer))


def texts(explorer):
    return {name: explorer.controls[name].value for name in ("format", "value", "hex", "binary")}


def drawn(explorer):
    """The visible texts of the picture."""
    return [text.get_text() for text in explorer.figure.findobj(lambda artist: hasattr(artist, "get_text"))
            if text.get_visible() and text.get_text()]


def assert_agrees(explorer, code, fmt):
    """Everything that is shown spells ``code``."""
    stored = decode(code, fmt)
    assert explorer.controls["code"].value == code
    assert shown_bits(explorer) == f"{code:0{fmt.bits}b}"
    assert int(explorer.controls["hex"].value, 16) == int(explorer.readout["hex"], 16) == code
    assert explorer.controls["binary"].value.replace(" ", "") == f"{code:0{fmt.bits}b}"
    assert explorer.controls["format"].value == fmt.name
    assert not message(explorer)
    (product,) = [text for text in drawn(explorer) if re.search(r"^[=≈] |×.*[=≈]", text)]
    factors, equals, value = re.fullmatch(r"(.*?)\s*([=≈])\s+(\S+)", product.translate(PLAIN)).groups()
    if np.isfinite(stored):
        sign, power, significand = factors.split(" × ")
        assert float(power[0]) == 2
        product = Fraction(sign) * Fraction(2) ** int(power[1:]) * Fraction(significand)
        if equals == "=":
            assert Fraction(value) == Fraction(float(stored)) == product
        else:
            assert float(value) == pytest.approx(float(stored), rel=1e-8)
            assert abs(product / Fraction(float(stored)) - 1) < 1e-8
        exponent = fields(code, fmt).exponent
        assert explorer.readout["exponent"].split(" − ")[0] == str(max(int(exponent), 1))
        assert any(f"{exponent:0{fmt.exponent_bits}b}₂ = {exponent}" in text for text in drawn(explorer))
    else:
        assert value in {"NaN": "NaN", "infinity": "∞ -∞"}[explorer.readout["kind"]]


def test_words():
    assert_words(shared())


def flip_every_bit(explorer, fmt, flipped):
    code = int(encode(2.7, fmt))
    assert_agrees(explorer, code, fmt)
    for place, box in enumerate(boxes(explorer)):
        box.click()
        code ^= 1 << (fmt.bits - 1 - place)
        assert_agrees(explorer, code, fmt)
        flipped(explorer)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_box_flips_its_bit(name):
    flip_every_bit(float_bits(2.7, name), BY_NAME[name], lambda explorer: None)


@pytest.mark.parametrize("name", ["FP32", "FP8 E4M3"])
def test_every_bit_has_its_picture(name):
    explorer, pictures = at(2.7, name), []
    flip_every_bit(explorer, BY_NAME[name], lambda explorer: pictures.append(explorer.png()))
    assert len({explorer.png(), *pictures}) == BY_NAME[name].bits


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", [name for name, fmt in BY_NAME.items() if fmt.bits <= 8])
def test_codes_of_a_small_format(name):
    fmt = BY_NAME[name]
    explorer = at(1, name)
    for code in range(0, 2**fmt.bits, 1 if fmt.bits < 8 else 5):
        explorer.set(code=code)
        assert_agrees(explorer, code, fmt)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("text, value", [
    ("-118.625", -118.625), ("−118.625", -118.625), ("1/3", 1 / 3), ("π", np.pi), ("pi", np.pi), ("1e400", np.inf),
    ("-inf", -np.inf), ("∞", np.inf), ("1e-60", 1e-60), (" 7 ", 7.0), ("nan", np.nan), ("65520", 65520.0),
])
@pytest.mark.parametrize("name", ["FP64", "FP32", "FP16"])
def test_typed_values(text, value, name):
    explorer = at(0.5, name)
    explorer.controls["value"].value = text
    assert_agrees(explorer, int(encode(value, BY_NAME[name])), BY_NAME[name])
    assert explorer.controls["value"].value == text  # as typed


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("control, text", [
    ("hex", "0xC2ED4000"), ("hex", "c2ed4000"), ("hex", "C2 ED 40 00"),
    ("binary", "1 10000101 11011010100000000000000"), ("binary", "0b11000010111011010100000000000000"),
])
def test_typed_words(control, text):
    explorer = at(1)
    explorer.controls[control].value = text
    assert_agrees(explorer, 0xC2ED4000, FP32)
    assert texts(explorer) == {"format": "FP32", "value": "−118.625", "hex": "0xC2ED4000",
                               "binary": "1 10000101 11011010100000000000000"}


@pytest.mark.parametrize("control, text, part", [
    ("value", "abc", "value must be a number"), ("value", "", "value must be a number"), ("value", "1/0", "'1/0'"),
    ("value", "1 2", "value must be"), ("value", "[]", "value must be"),
    ("hex", "0x1C2ED4000", "1 to 8 digits"), ("hex", "", "0 digits"), ("hex", "0xG", "0–9 or A–F"),
    ("hex", "-1", "0–9 or A–F"), ("binary", "0101", "32 digits 0 or 1 for FP32, got '0101' (4 digits)"),
    ("binary", "2" * 32, "0 or 1"), ("binary", "", "0 digits"),
])
def test_bad_text(control, text, part):
    explorer = at(2.5)
    picture, readout, bits = explorer.png(), explorer.readout, shown_bits(explorer)
    explorer.controls[control].value = text
    assert part in message(explorer).replace("&#x27;", "'")
    assert (explorer.png(), explorer.readout, shown_bits(explorer)) == (picture, readout, bits)
    boxes(explorer)[0].click()
    assert_agrees(explorer, int(encode(-2.5, FP32)), FP32)


@pytest.mark.usefixtures("unseen")
def test_a_hex_word_beyond_a_format_of_six_bits():
    explorer = at(1, "FP6 E2M3")
    with pytest.raises(ValueError, match="at most 0x3F for FP6 E2M3"):
        explorer.set(hex="FF")
    explorer.set(hex="3F")
    assert explorer.readout["stored"] == "−7.5"


def test_another_format_keeps_what_was_typed():
    explorer = at("π")
    start = explorer.png(), explorer.readout
    for name, fmt in BY_NAME.items():
        explorer.controls["format"].value = name
        assert_agrees(explorer, int(encode(np.pi, fmt)), fmt)
        assert explorer.readout["error"] == pytest.approx(float(decode(encode(np.pi, fmt), fmt)) - np.pi)
    explorer.controls["format"].value = "FP32"
    assert (explorer.png(), explorer.readout) == start


@pytest.mark.usefixtures("unseen")
def test_another_format_while_the_text_is_bad():
    explorer = at(2.5)
    explorer.controls["value"].value = "abc"
    explorer.controls["format"].value = "FP16"
    assert_agrees(explorer, int(encode(2.5, BY_NAME["FP16"])), BY_NAME["FP16"])


@pytest.mark.usefixtures("unseen")
def test_a_format_without_nan_refuses_it_and_nothing_is_lost():
    explorer = float_bits(float("nan"))
    bits = shown_bits(explorer)
    explorer.controls["format"].value = "FP4 E2M1"
    assert "for which FP4 E2M1 has no code" in message(explorer)
    assert shown_bits(explorer) == bits
    boxes(explorer)[-1].click()
    assert_agrees(explorer, int(bits, 2) ^ 1, FP32)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", BY_NAME)
def test_chips_reach_the_special_values(name):
    fmt = BY_NAME[name]
    explorer = at(1, name)
    wanted = {"−0": fmt.sign_code, "smallest": 1, "smallest normal": int(encode(fmt.smallest_normal, fmt)),
              "largest": int(encode(fmt.max, fmt)), "1": int(encode(1, fmt)), "0.1": int(encode(0.1, fmt))}
    for chip, code in wanted.items():
        explorer.press(chip)
        assert_agrees(explorer, code, fmt)
    for chip, has_it, is_it in (("∞", fmt.has_infinity, np.isinf), ("NaN", fmt.has_nan, np.isnan)):
        if has_it:
            explorer.press(chip)
            assert is_it(decode(explorer.controls["code"].value, fmt))
        else:
            with pytest.raises(ValueError, match=f"{name} has no code for {chip}"):
                explorer.press(chip)


@pytest.mark.usefixtures("unseen")
def test_neighbours_are_the_numbers_next_to_it():
    explorer = at(1)  # a power of two: the spacing differs on its two sides
    assert {"1.00000012", "0.99999994", "← 1.192e-07 →", "← 5.96e-08 →"} <= set(drawn(explorer))
    explorer.set(format="FP4 E2M1", value="0")
    assert {"−0.5", "0", "0.5"} <= set(drawn(explorer))
    explorer.press("largest")
    assert {"4", "6", "∞"} <= set(drawn(explorer))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("chip", ["largest", "smallest", "−0", "∞", "NaN"])
def test_what_was_not_typed_has_no_error(chip):
    explorer = at("π")
    assert explorer.readout["error"] != 0
    explorer.press(chip)
    assert explorer.readout["error"] == 0


@pytest.mark.usefixtures("unseen")
def test_the_error_of_a_typed_number_is_exact():
    explorer = at("0.1", "FP64")
    assert explorer.readout["error"] == float(Fraction(0.1) - Fraction(1, 10)) != 0


@pytest.mark.parametrize("arguments, part", [
    ((1, "FP12"), "format must be one of FP64, FP32"), (("abc",), "value must be"),
    ((float("nan"), "FP4 E2M1"), "no NaN"), (([],), "value must be"),
])
def test_bad_arguments(arguments, part):
    with pytest.raises(ValueError, match=part):
        float_bits(*arguments)


@pytest.mark.usefixtures("unseen")
def test_bad_code():
    explorer = at(1, "FP4 E2M1")
    for code in (16, -1, 1.5, "x"):
        with pytest.raises(ValueError, match="code cannot be"):
            explorer.set(code=code)
        explorer.set()
        assert_agrees(explorer, int(encode(1, BY_NAME["FP4 E2M1"])), BY_NAME["FP4 E2M1"])
    explorer.set(code=7)
    assert explorer.readout["stored"] == "6"
