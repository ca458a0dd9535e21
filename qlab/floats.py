"""Number formats: how a sign, an exponent and a mantissa become a real number, and back.

One `FloatFormat` describes FP64 and FP4 alike. A code is the unsigned integer that the bits spell, sign first:
0xC2ED4000 is the code of −118.625 in FP32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlab.affine import as_numpy, check_integer, numpy_array, plain_array

_BLOCK = 2**14  # values at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: one sign bit, then the exponent bits, then the mantissa bits.

    Parameters
    ----------
    name : str
    exponent_bits : int, 1 to 11
    mantissa_bits : int, 1 to 52
        Without the leading 1, which is not stored.
    bias : int, optional
        Subtracted from the stored exponent; 2^(exponent_bits − 1) − 1 by default.
    specials : {"ieee", "fn", "none"}
        What the largest stored exponent means. "ieee": infinity (mantissa 0) and NaN. "fn" (finite): numbers like any
        other, except NaN where all mantissa bits are 1. "none": numbers throughout, neither infinity nor NaN.

    Attributes
    ----------
    bits : int
        Of the whole code.
    max, smallest_normal, smallest_subnormal : float
        The largest finite number, the smallest with a leading 1, and the smallest above 0.
    has_infinity, has_nan : bool

    Raises
    ------
    ValueError
        If a number of bits is out of range, ``bias`` is not an integer, the numbers of the format are not all numbers
        of FP64, or ``specials`` is none of the three.

    References
    ----------
    IEEE 754-2019, section 3.4 (FP16 to FP64). Micikevicius et al. 2022, "FP8 formats for deep learning", table 1, and
    Open Compute Project, "OFP8 formats specification" (E4M3 is "fn", E5M2 "ieee"). Open Compute Project,
    "Microscaling formats (MX) specification" 1.0, section 5.3 (FP6, FP4).

    Examples
    --------
    >>> FP8_E4M3.max, FP8_E4M3.smallest_subnormal, FP8_E4M3.has_infinity
    (448.0, 0.001953125, False)
    >>> FloatFormat("FP5", exponent_bits=2, mantissa_bits=2).max
    3.5
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    specials: str = "ieee"

    def __post_init__(self):
        for field, most in (("exponent_bits", 11), ("mantissa_bits", 52)):
            # NumPy's integers would overflow.
            object.__setattr__(self, field, check_integer(getattr(self, field), field, 1, most))
        if self.specials not in ("ieee", "fn", "none"):
            raise ValueError(f"specials must be 'ieee', 'fn' or 'none', got {self.specials!r}")
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        object.__setattr__(self, "bias", check_integer(self.bias, "bias", None))
        lowest, highest = 1 - self.bias - self.mantissa_bits, 2**self.exponent_bits - 1 - self.bias
        if lowest < -1074 or highest - (self.specials == "ieee") > 1023:
            raise ValueError(f"bias must keep all numbers within those of FP64, got {self.bias}")

    @property
    def bits(self):
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self):
        return self.specials == "ieee"

    @property
    def has_nan(self):
        return self.specials != "none"

    @property
    def max(self):
        return float(decode(self.max_code, self))

    @property
    def smallest_normal(self):
        return float(np.ldexp(1.0, 1 - self.bias))

    @property
    def smallest_subnormal(self):
        return float(np.ldexp(1.0, 1 - self.bias - self.mantissa_bits))

    @property
    def sign_code(self):
        """The code whose only 1 is the sign bit: −0."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self):
        """The code of the largest finite number; positive numbers are in the order of their codes."""
        special_codes = {"ieee": 1 << self.mantissa_bits, "fn": 1, "none": 0}[self.specials]
        return self.sign_code - 1 - special_codes

    @property
    def nan_code(self):
        """The positive code that `encode` uses for NaN, or None."""
        quiet = {"ieee": 1 << (self.mantissa_bits - 1), "fn": 0, "none": None}[self.specials]
        return None if quiet is None else self.max_code + 1 + quiet

    @property
    def code_dtype(self):
        """The smallest unsigned NumPy type that holds a code."""
        return np.min_scalar_type(2**self.bits - 1)


FP64 = FloatFormat("FP64", 11, 52)
FP32 = FloatFormat("FP32", 8, 23)
FP16 = FloatFormat("FP16", 5, 10)
BF16 = FloatFormat("BF16", 8, 7)
FP8_E5M2 = FloatFormat("FP8 E5M2", 5, 2)
FP8_E4M3 = FloatFormat("FP8 E4M3", 4, 3, specials="fn")
FP6_E3M2 = FloatFormat("FP6 E3M2", 3, 2, specials="none")
FP6_E2M3 = FloatFormat("FP6 E2M3", 2, 3, specials="none")
FP4_E2M1 = FloatFormat("FP4 E2M1", 2, 1, specials="none")

FORMATS = (FP64, FP32, FP16, BF16, FP8_E5M2, FP8_E4M3, FP6_E3M2, FP6_E2M3, FP4_E2M1)


class Fields(NamedTuple):
    """The three parts of a code, each an unsigned integer as stored: the exponent with its bias, the mantissa without
    its leading 1."""

    sign: Any
    exponent: Any
    mantissa: Any


def encode(x, fmt, *, saturate=False):
    """Codes of the nearest numbers of a format.

    Rounds to nearest, ties to the even mantissa. What rounds beyond the largest number becomes infinity, in a format
    without infinity NaN, and in a format without either the largest number (as the MX specification asks for).

    Parameters
    ----------
    x : float array, any shape
        NaN and infinities allowed. Taken as FP64; a whole number beyond 2^53 is rounded to that first.
    fmt : FloatFormat
    saturate : bool
        Turn what is too large, and infinity, into the largest number of its sign in every format.

    Returns
    -------
    unsigned integer array, shape of ``x``
        uint8, uint16, uint32 or uint64: the smallest that holds ``fmt.bits``.

    Raises
    ------
    ValueError
        If ``x`` is empty or holds no real numbers, or has a NaN that ``fmt`` cannot represent, or ``fmt`` is no
        FloatFormat.

    References
    ----------
    IEEE 754-2019, section 4.3.1 (roundTiesToEven); Open Compute Project, OFP8 specification, section 5.2.

    Examples
    --------
    >>> hex(encode(-118.625, FP32))
    '0xc2ed4000'
    >>> decode(encode([0.1, 5, 7, 1e9], FP4_E2M1), FP4_E2M1)
    array([0., 4., 6., 6.])
    """
    _check_format(fmt)
    x = _reals(x)
    if np.isnan(x).any() and not fmt.has_nan:
        raise ValueError(f"x must have no NaN, for which {fmt.name} has no code, got {int(np.isnan(x).sum())} of them")
    parts = np.array_split(x.ravel(), -(-x.size // _BLOCK))
    return np.concatenate([_encode(part, fmt, saturate) for part in parts]).reshape(x.shape)[()]


def _encode(x, fmt, saturate):
    size = np.abs(x)
    special = ~np.isfinite(size)
    if special.any():
        size[special] = 0
    lowest = 1 - fmt.bias
    exponent = np.frexp(np.maximum(size, fmt.smallest_normal))[1] - 1
    steps = np.rint(np.ldexp(size, fmt.mantissa_bits - exponent))  # of 2^(exponent − mantissa_bits), the spacing
    # Codes count upwards through all positive numbers: each exponent has 2^mantissa_bits of them, and a mantissa that
    # rounds up to 2 carries into the next exponent.
    code = steps.astype(np.int64) + ((exponent - lowest).astype(np.int64) << fmt.mantissa_bits)
    beyond = fmt.max_code if saturate or not fmt.has_nan else fmt.max_code + 1  # infinity; NaN where there is none
    code = np.where(code > fmt.max_code, beyond, code)
    if special.any():
        code[special] = np.where(np.isnan(x[special]), fmt.nan_code or 0, beyond)
    code = code.astype(fmt.code_dtype)
    return code | np.signbit(x).astype(fmt.code_dtype) << (fmt.bits - 1)


def decode(codes, fmt):
    """The numbers that codes stand for.

    A stored exponent of 0 means no leading 1: ±0.m · 2^(1 − bias), the subnormal numbers and zero. Every other one
    means ±1.m · 2^(exponent − bias), but for the codes of infinity and NaN.

    Parameters
    ----------
    codes : unsigned integer array, any shape
    fmt : FloatFormat

    Returns
    -------
    float64 array, shape of ``codes``
        Exact: every number of these formats is one of FP64.

    Raises
    ------
    ValueError
        If ``codes`` is empty, or holds anything else than integers from 0 to 2^bits − 1, or ``fmt`` is no FloatFormat.

    References
    ----------
    IEEE 754-2019, section 3.4.

    Examples
    --------
    >>> decode(0xC2ED4000, FP32)
    np.float64(-118.625)
    >>> decode([0b0000, 0b0001, 0b0010, 0b0011, 0b0111], FP4_E2M1)
    array([0. , 0.5, 1. , 1.5, 6. ])
    """
    sign, exponent, mantissa = (np.asarray(field).astype(np.int64) for field in fields(codes, fmt))
    leading = np.where(exponent > 0, 1 << fmt.mantissa_bits, 0)
    beyond = (exponent << fmt.mantissa_bits) + mantissa - fmt.max_code
    with np.errstate(over="ignore"):  # by codes of infinity and NaN
        x = np.ldexp(np.float64(leading + mantissa), np.maximum(exponent, 1) - fmt.bias - fmt.mantissa_bits)
    x = np.where(beyond > 0, np.where((beyond == 1) & fmt.has_infinity, np.inf, np.nan), x)
    return np.where(sign == 1, -x, x)[()]


def fields(code, fmt):
    """Cut codes into sign, exponent and mantissa.

    Parameters
    ----------
    code : unsigned integer or array of them
    fmt : FloatFormat

    Returns
    -------
    Fields
        Three unsigned integers or arrays, as stored: the exponent with its bias, the mantissa without the leading 1.

    Raises
    ------
    ValueError
        As `decode`.

    Examples
    --------
    >>> sign, exponent, mantissa = fields(0xC2ED4000, FP32)
    >>> int(sign), int(exponent), f"{mantissa:023b}"
    (1, 133, '11011010100000000000000')
    """
    _check_format(fmt)
    code = _codes(code, fmt)
    exponent = (code >> fmt.mantissa_bits) & code.dtype.type(2**fmt.exponent_bits - 1)
    return Fields(code >> (fmt.bits - 1), exponent, code & code.dtype.type(2**fmt.mantissa_bits - 1))


def spacing(x, fmt):
    """Distance between the two neighbouring numbers of a format that ``x`` lies between.

    It is 2^(exponent − mantissa_bits): the same between two powers of two, doubled beyond the next. For a number of the
    format itself, the distance to its neighbour away from 0.

    Parameters
    ----------
    x : float array, any shape
    fmt : FloatFormat

    Returns
    -------
    float64 array, shape of ``x``
        NaN where ``x`` is NaN, infinite, or beyond the largest number.

    Raises
    ------
    ValueError
        If ``x`` is empty or holds no real numbers, or ``fmt`` is no FloatFormat.

    Examples
    --------
    >>> spacing([1, 1000, 16_777_216], FP32).tolist()
    [1.1920928955078125e-07, 6.103515625e-05, 2.0]
    """
    _check_format(fmt)
    size = np.abs(_reals(x))
    inside = size <= fmt.max
    exponent = np.frexp(np.maximum(np.where(inside, size, 1), fmt.smallest_normal))[1] - 1
    return np.where(inside, np.ldexp(1.0, exponent - fmt.mantissa_bits), np.nan)[()]


def _check_format(fmt):
    if not isinstance(fmt, FloatFormat):
        raise ValueError(f"fmt must be a FloatFormat, such as FP32, got {repr(fmt)[:60]}")


def _reals(x):
    """``x`` as a float64 array, not empty."""
    try:
        array = plain_array(x, "x")
        if array.dtype == object and all(isinstance(value, (int, float)) for value in array.flat):
            array = array.astype(np.float64)  # integers of more than 64 bits
    except OverflowError:
        raise ValueError(f"x must be real numbers within FP64, got {repr(x)[:60]}") from None
    return numpy_array(array, "x", finite=False).astype(np.float64)


def _codes(codes, fmt):
    """``codes`` in the unsigned type of the format."""
    try:
        array = as_numpy(plain_array(codes, "codes"))
        listed = np.asarray(codes, dtype=object).flat if isinstance(codes, (list, tuple)) else []
        if array.dtype.kind == "f" and len(listed) and all(isinstance(code, (int, np.integer)) for code in listed):
            array = np.asarray(codes, dtype=np.uint64)  # NumPy makes floats of integers on both sides of 2^63
    except (OverflowError, ValueError):
        array = np.array("")
    if array.size == 0:
        raise ValueError(f"codes must not be empty, got shape {array.shape}")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**fmt.bits:
        raise ValueError(f"codes of {fmt.name} must be integers from 0 to 2^{fmt.bits} − 1, got {repr(codes)[:60]}")
    return array.astype(fmt.code_dtype)
