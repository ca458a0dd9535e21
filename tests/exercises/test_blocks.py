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


MISTAKES = [
    ("e8m0_byte", lambda x: 125 + math.floor(math.log2(max(x))), "take |x| first"),
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
    ("bits_per_value", lambda bits, block, scale: bits, "scale is missing"),
    ("bits_per_value", lambda bits, block, scale: bits + scale, "shares one scale"),
    ("bits_per_value", lambda bits, block, scale: bits * block + scale, "bits of a block"),
    ("bits_per_value", lambda bits, block, scale: (bits * block + scale) / 8, "bytes of a block"),
    ("bits_per_value", lambda bits, block, scale: bits + block / scale, "not the inverse"),
]
RIGHT = [
    ("e8m0_byte", lambda x: 127 + exponent(x) - 2),
    ("e8m0_byte", lambda x: np.uint8(math.frexp(np.abs(x).max())[1] + 124)),
    ("nvfp4_block", nvfp4),
    ("bits_per_value", lambda bits, block, scale: bits + scale / block),
    ("bits_per_value", lambda bits, block, scale: (bits * block + scale) / block),
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
