"""The exercises on block formats: what is right, and the misconceptions that their checks know."""

import math

import numpy as np

from qlab import blocks
from qlab.floats import FP4_E2M1, FP8_E4M3, decode, encode
from tests.exercises.checks import asked, check


def e4m3(x):
    return decode(encode(x, FP8_E4M3), FP8_E4M3)


def e2m1(x):
    return decode(encode(x, FP4_E2M1, saturate=True), FP4_E2M1)


def exponent(x):
    return math.floor(math.log2(np.abs(x).max()))


def nvfp4(x, t):
    scale = e4m3(np.abs(x).max() / 6 / t)
    return scale, scale * t * e2m1(x / (scale * t))


def seventeen(x, first=(0, 2, 4, 6, 1, 3, 5, 7), exponent=exponent, of_zeros=0,
              together=lambda codes: codes[:16] | codes[16:] << 4):
    """The bytes of MXFP4; of two levels that are equally near, the code that stands first is taken."""
    byte = 125 + exponent(np.abs(x).max()) if x.any() else of_zeros
    steps = x / 2.0 ** (byte - 127)
    distance = np.abs(np.abs(steps)[:, None] - decode(np.uint8(first), FP4_E2M1))
    return np.r_[byte, together(np.array(first)[distance.argmin(axis=1)] + 8 * (steps < 0))]


MISTAKES = [
    ("e8m0_byte", lambda x: 125 + math.floor(math.log2(max(x))), "take |x| first"),
    ("e8m0_byte", lambda x: 125 + int(np.floor(np.log2(np.abs(x).max()))), "np.log2 rounds up to 10"),
    ("e8m0_byte", lambda x: 127 + exponent(x), "2, is subtracted"),
    ("e8m0_byte", lambda x: 126 + exponent(x), "Rounded up"),
    ("e8m0_byte", lambda x: 127 + math.floor(math.log2(np.abs(x).max() / 6)), "is another rule"),
    ("e8m0_byte", lambda x: exponent(x) - 2, "plus the bias"),
    ("e8m0_byte", lambda x: 2.0 ** (exponent(x) - 2), "the scale itself"),
    ("nvfp4_block", lambda x, t: (np.abs(x).max() / 6 / t, np.abs(x).max() / 6 * e2m1(6 * x / np.abs(x).max())),
     "stored in E4M3"),
    ("nvfp4_block", lambda x, t: nvfp4(x, 1), "tensor's scale is missing"),
    ("nvfp4_block", lambda x, t: (s := e4m3(np.abs(x).max() / 448 / t), s * t * e2m1(x / s / t)),
     "largest element is 6"),
    ("nvfp4_block", lambda x, t: (s := nvfp4(x, t)[0], e2m1(x / s / t)), "Multiply them by both"),
    ("nvfp4_block", lambda x, t: (nvfp4(x, t)[0], np.abs(x).max() / 6 * e2m1(6 * x / np.abs(x).max())),
     "the exact one later"),
    ("mxfp4_bytes", lambda x: seventeen(x)[1:], "comes before them"),
    ("mxfp4_bytes", lambda x: np.roll(seventeen(x), -1), "comes first"),
    ("mxfp4_bytes", lambda x: seventeen(x, together=lambda codes: codes), "byte of its own"),
    ("mxfp4_bytes", lambda x: seventeen(x, together=lambda codes: codes[::2] | codes[1::2] << 4),
     "not with its neighbour"),
    ("mxfp4_bytes", lambda x: seventeen(x, together=lambda codes: codes[:16] << 4 | codes[16:]), "low half of a byte"),
    ("mxfp4_bytes", lambda x: seventeen(x, first=list(range(8))), "even code is taken"),
    ("mxfp4_bytes", lambda x: seventeen(np.where(np.abs(x) < 0.2, 0, x)), "−0 has code 8"),
    ("mxfp4_bytes", lambda x: seventeen(x, exponent=lambda peak: int(np.floor(np.log2(peak)))), "rounds up just below"),
    ("mxfp4_bytes", lambda x: seventeen(x, of_zeros=124), "the byte is 0"),
]
RIGHT = [
    ("e8m0_byte", lambda x: 127 + exponent(x) - 2),
    ("e8m0_byte", lambda x: np.uint8(math.frexp(np.abs(x).max())[1] + 124)),
    ("nvfp4_block", nvfp4),
    ("mxfp4_bytes", lambda x: blocks.pack(blocks.quantize(x, blocks.MXFP4))),
    ("mxfp4_bytes", lambda x: [int(byte) for byte in seventeen(x)]),
]
NEARLY = [("e8m0_byte", lambda x: 127.0001 + exponent(x) - 2)]
FIRST_CASES = [("e8m0_byte", "For x = [3.0, -21.0, 7.0, 0.9]: expected 129, ")]


def test_the_byte_is_the_one_that_the_package_stores():
    for (x,) in asked("e8m0_byte", lambda x: 127 + exponent(np.array(x)) - 2):
        x = np.float32(np.r_[x, np.zeros(32 - len(x))])  # noqa: PLW2901
        assert check("e8m0_byte", lambda y: blocks.pack(blocks.quantize(
            np.float32(np.r_[y, np.zeros(32 - len(y))]), blocks.MXFP4))[0]).passed


def test_the_block_of_nvfp4_is_that_of_the_package():
    for x, tensor_scale in asked("nvfp4_block", nvfp4)[1:]:
        x = np.float32(x)  # noqa: PLW2901
        top = np.zeros(16, np.float32)
        top[0] = tensor_scale * 6 * 448
        stored = blocks.quantize(np.stack([x, top]), blocks.NVFP4)
        scale, x_hat = nvfp4(x, stored.tensor_scale)
        assert scale == stored.scales[0, 0]
        np.testing.assert_allclose(x_hat, blocks.dequantize(stored)[0], rtol=1e-6)
