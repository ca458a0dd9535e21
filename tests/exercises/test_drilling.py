"""Practice: thousands of tasks of each kind, answered by an independent computation, and every slip that is known."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from qlab import exercises
from qlab.exercises.drilling import DRILLS

MANY = 500
TYPES = {"FP8 E4M3": ml_dtypes.float8_e4m3fn, "FP8 E5M2": ml_dtypes.float8_e5m2, "FP6 E3M2": ml_dtypes.float6_e3m2fn,
         "FP4 E2M1": ml_dtypes.float4_e2m1fn}
NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"


def numbers(text):
    return [Fraction(number) for number in re.findall(NUMBER, text)]


def encode(text):
    x, name, exponent_bits, bits = re.match(rf"Write {NUMBER} in (\S+ \S+) \((\d) exponent bits, (\d)", text).groups()
    code = int(np.array(float(x), TYPES[name]).view(np.uint8))
    digits = f"{code:0{1 + int(exponent_bits) + int(bits)}b}"
    return f"{digits[0]} {digits[1:-int(bits)]} {digits[-int(bits):]}"


def decode(text):
    word, name = re.match(r"Which number is ([01 ]+) in (\S+ \S+)\?", text).groups()
    return repr(float(np.uint8(int(word.replace(" ", ""), 2)).view(TYPES[name])))


def scale_and_zero_point(text):
    alpha, beta, bits, low, _ = numbers(text)
    s = (beta - min(alpha, 0)) / (2**bits - 1)
    return f"{float(s):.4g} {low - round(min(alpha, 0) / s)}"


def code_and_error(text):
    s, z, low, high, x = numbers(text)
    q = min(high, max(low, round(x / s) + z))
    return f"{q} {float(x - s * (q - z)):.6f}"


def bits_per_value(text):
    bits, size, *shared = numbers(text)
    return f"{float(bits + sum(shared) / size):.2f}"


def m0_and_n(text):
    m, n = numbers(text)[0], 0
    while m < Fraction(1, 2):
        m, n = 2 * m, n + 1
    return f"{n} {float(m):.3g}"


BY_HAND = {"encode": encode, "decode": decode, "scale and zero-point": scale_and_zero_point,
           "code and error": code_and_error, "bits per value": bits_per_value, "m₀ and n": m0_and_n}


def typed(parts, values):
    pairs = zip(parts, values, strict=True)
    return " ".join(f"{int(value):b}" if part.base == 2 else f"{value:.12g}" for part, value in pairs)


@pytest.mark.parametrize("kind", DRILLS)
def test_many_tasks_answered_by_hand_and_wrong_in_every_known_way(kind):
    rng, told = np.random.default_rng(7), set()
    for _ in range(MANY):
        task = DRILLS[kind](rng)
        verdict = task.check(BY_HAND[kind](task.text.replace("−", "-")))
        assert verdict.passed is True, (task.text, BY_HAND[kind](task.text), task.parts, verdict)
        right = [part.value for part in task.parts]
        for place, part in enumerate(task.parts):
            for slip, _ in (*part.slips, (part.value + 1 + 7 * part.tolerance, "")):
                if part.is_right(slip) or (part.base == 2 and slip < 0):
                    continue
                verdict = task.check(typed(task.parts, [*right[:place], slip, *right[place + 1:]]))
                assert verdict.passed is False, (task, slip)
                told.add(verdict.text)
    known = {f"{part.name} is wrong. {text}" for _ in range(200) for task in [DRILLS[kind](rng)] for part in task.parts
             for slip, text in part.slips}
    assert {re.sub(r"\d", "", text) for text in known} <= {re.sub(r"\d", "", text) for text in told}


def test_the_same_seed_gives_the_same_tasks():
    first, again, other = (exercises.drill("encode", seed) for seed in (3, 3, 4))
    assert repr(first) == repr(again) != repr(other)
    first.next()
    assert repr(first) != repr(again)


def test_by_key_and_by_button():
    practice = exercises.drill("bits per value")
    text, row, said = practice.widget.children
    field, check, after = row.children
    assert practice.task.text in text.value and said.value == ""
    field.value = "many"
    field._handle_custom_msg({"event": "submit"}, [])
    assert "Type the number of bits" in said.value
    field.value = "0.25"
    check.click()
    assert "✗ the number of bits is wrong. This is the share" in said.value
    field.value = "8.25"
    check.click()
    assert "✓ Right. (0 of 1 at the first try)" in said.value
    after.click()
    assert said.value == field.value == "" and practice.task.text in text.value


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of encode, decode"):
        exercises.drill("everything")
