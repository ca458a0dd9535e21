"""Block formats: a few values, a scale that they share, and the bytes that files and chips have for them.

A block is a run of neighbours along the last axis. Its elements are codes of a small float format, or numbers in a
codebook; its scale is itself stored in few bits. x̂ = s · level(code), at Q4_1 plus the minimum of the block, at NVFP4
times one more scale for the whole tensor.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlab.affine import check_integer, numpy_array, plain_array
from qlab.floats import (
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    FloatFormat,
    decode,
    encode,
)

E8M0 = "E8M0"  # a scale of eight exponent bits and nothing else: 2^(code − 127), and NaN for 255
_BIAS, _NAN = 127, 255
_POWERS = ("floor", "ceil", "even")
_ROUNDINGS = ("even", "down", "up", "away")


@dataclass(frozen=True)
class BlockFormat:
    """How a block of values is stored. ``dataclasses.replace`` makes one with another rule or block.

    Parameters
    ----------
    name : str
    element : FloatFormat or tuple of float
        What the codes stand for: a float format of up to 8 bits, or a codebook of up to 256 levels in the order of
        their codes.
    block : int
        How many neighbours along the last axis share a scale.
    scale : FloatFormat or "E8M0"
        How the scale is stored.
    rule : str
        How the scale s is chosen.
        "floor", "ceil", "even" (for E8M0): s = 2^(exponent of max|x| − exponent of the largest element), where the
        exponent is log₂ max|x| rounded down, as the MX specification asks for, or up, or that of max|x| after rounding
        to as many mantissa bits as the element has.
        "absmax": s = max|x| / largest level.
        "signed absmax": s = (the value of largest magnitude, with its sign) / lowest level; the first one, of two.
        "min-max" (for levels from 0 up): s = (max x − min x) / largest level; the minimum is stored as the scale is.
    rounding : str
        What happens between two levels. "even": a tie goes to the even code. "down": to the lower level.
        "up", "away": integers, a tie goes up, or away from 0; as in llama.cpp, codes are found with the scale before it
        is rounded to its own format.
    tensor_scale : bool
        One more scale, FP32, for the whole tensor: max|x| of the tensor / (largest element · largest scale).
    record : int
        How many blocks a record of a GGUF file holds; 0: GGUF has none of this format.

    Attributes
    ----------
    levels : float32 array
        What each code stands for, before the scale.
    bits_per_value : float
        With the block's scale and minimum, without the one scale of a tensor.

    Raises
    ------
    ValueError
        If the element, the scale, the rule or the rounding is none of these, or they do not fit each other.

    References
    ----------
    Open Compute Project, "Microscaling formats (MX) specification" 1.0, sections 5 and 6.3 (MXFP8 to MXFP4). NVIDIA,
    "Pretraining large language models with NVFP4" 2025, appendix on quantization. Dettmers et al. 2023, "QLoRA",
    section 3 (NF4). ggml, ``ggml-quants.c`` (Q4_0, Q4_1, Q8_0).

    Examples
    --------
    >>> MXFP4.bits_per_value, NVFP4.bits_per_value, Q8_0.bits_per_value
    (4.25, 4.5, 8.5)
    >>> MXFP4.levels[:8].tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """

    name: str
    element: FloatFormat | tuple
    block: int
    scale: FloatFormat | str = E8M0
    rule: str = "floor"
    rounding: str = "even"
    tensor_scale: bool = False
    record: int = 0

    def __post_init__(self):
        object.__setattr__(self, "block", check_integer(self.block, "block", 1))
        object.__setattr__(self, "record", check_integer(self.record, "record", 0))
        is_float = isinstance(self.element, FloatFormat)
        if self.scale != E8M0 and not isinstance(self.scale, FloatFormat):
            raise ValueError(f"scale must be a FloatFormat or 'E8M0', got {repr(self.scale)[:60]}")
        if self.rounding not in _ROUNDINGS or (self.rounding == "even") != is_float:
            raise ValueError("rounding must be 'even' for a float element, and 'down', 'up' or 'away' for a codebook, "
                             f"got {self.rounding!r}")
        if not (self.element.bits <= 8 if is_float else _is_codebook(self.element, self.rounding)):
            raise ValueError("element must be a FloatFormat of up to 8 bits or a tuple of 2 to 256 finite levels, in "
                             "rising order, some above 0; for the rounding 'up' neighbouring integers, for 'away' "
                             "those of int8, from 0 to 127 and from -128 to -1; "
                             f"got {repr(self.element)[:60]}")
        allowed = ["absmax"] if self.scale != E8M0 else list(_POWERS) if is_float else []
        if self.scale != E8M0 and not is_float:
            allowed.append("min-max" if self.element[0] == 0 else "signed absmax")
        if self.rule not in allowed:
            raise ValueError(f"rule must be one of {', '.join(allowed) or 'none'} for this element and this scale, got "
                             f"{self.rule!r}")
        if self.tensor_scale and self.scale == E8M0:
            raise ValueError("tensor_scale must be False for E8M0, whose numbers need none")

    @property
    def element_bits(self):
        return self.element.bits if self.rounding == "even" else math.ceil(math.log2(len(self.element)))

    @property
    def scale_bits(self):
        """Of all that a block has beside its codes."""
        return (8 if self.scale == E8M0 else self.scale.bits) * (2 if self.rule == "min-max" else 1)

    @property
    def bits_per_value(self):
        return self.element_bits + self.scale_bits / self.block

    @property
    def levels(self):
        values = decode(np.arange(2**self.element.bits), self.element) if self.rounding == "even" else self.element
        return np.asarray(values, np.float32)

    @property
    def code_dtype(self):
        """uint8; int8 where the codes are the integers themselves."""
        return np.dtype(np.int8 if self.rounding == "away" else np.uint8)

    @property
    def largest(self):
        """The largest level."""
        return self.element.max if self.rounding == "even" else max(self.element)


def _is_codebook(levels, rounding):
    if not isinstance(levels, tuple) or not 2 <= len(levels) <= 256:
        return False
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in levels) or max(levels) <= 0:
        return False
    first = math.floor(levels[0])
    wanted = {"up": range(first, first + len(levels)), "away": (*range(128), *range(-128, 0))}
    return list(levels) == list(wanted.get(rounding, sorted({*levels})))


# Quantiles of a normal over its largest: at 8 places from 1/2 to 0.9677083 above 0, at 7 places likewise below. The
# digits are those of its authors, who computed in float32.
_NORMAL_QUANTILES = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)

MXFP8_E5M2 = BlockFormat("MXFP8 E5M2", FP8_E5M2, 32)
MXFP8_E4M3 = BlockFormat("MXFP8 E4M3", FP8_E4M3, 32)
MXFP6_E3M2 = BlockFormat("MXFP6 E3M2", FP6_E3M2, 32)
MXFP6_E2M3 = BlockFormat("MXFP6 E2M3", FP6_E2M3, 32)
MXFP4 = BlockFormat("MXFP4", FP4_E2M1, 32, record=1)
NVFP4 = BlockFormat("NVFP4", FP4_E2M1, 16, FP8_E4M3, "absmax", tensor_scale=True, record=4)
NF4 = BlockFormat("NF4", _NORMAL_QUANTILES, 64, FP32, "absmax", "down")
Q4_0 = BlockFormat("Q4_0", tuple(range(-8, 8)), 32, FP16, "signed absmax", "up", record=1)
Q4_1 = BlockFormat("Q4_1", tuple(range(16)), 32, FP16, "min-max", "up", record=1)
Q8_0 = BlockFormat("Q8_0", (*range(128), *range(-128, 0)), 32, FP16, "absmax", "away", record=1)

FORMATS = (MXFP8_E5M2, MXFP8_E4M3, MXFP6_E3M2, MXFP6_E2M3, MXFP4, NVFP4, NF4, Q4_0, Q4_1, Q8_0)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A tensor in a block format.

    Parameters
    ----------
    codes : uint8 array, shape of the tensor (..., n)
        int8 for Q8_0, whose codes are the integers themselves.
    scales : float32 array, shape (..., n / block)
        Numbers that the scale's format has.
    tensor_scale : float32 number or None
    minima : float32 array, shape (..., n / block), or None
        The lowest level of each block (Q4_1).
    format : BlockFormat

    Raises
    ------
    ValueError
        If the shapes do not fit each other or the format, or there is no such format.
    """

    codes: Any
    scales: Any
    tensor_scale: Any = None
    minima: Any = None
    format: BlockFormat = MXFP4

    def __post_init__(self):
        _check_format(self.format)
        shape = np.shape(self.codes)
        expected = (*shape[:-1], shape[-1] // self.format.block) if shape else None
        for name in ("scales", "minima"):
            values = getattr(self, name)
            if values is not None and np.shape(values) != expected:
                raise ValueError(f"{name} must have shape {expected} for codes of shape {shape} in blocks of "
                                 f"{self.format.block}, got {np.shape(values)}")


def quantize(x, fmt):
    """Put a tensor into a block format.

    Parameters
    ----------
    x : float array, shape (..., n)
        NumPy or torch. Taken as float32, which float64 is rounded to first. The block must divide n.
    fmt : BlockFormat

    Returns
    -------
    Blocks
        Arrays of NumPy.

    Raises
    ------
    ValueError
        If ``x`` is empty, holds integers or anything else than floats, has a NaN, an infinity, or a value whose scale
        is beyond the scale's format; or the block does not divide its last axis.

    References
    ----------
    As `BlockFormat`.

    Examples
    --------
    Of a block that reaches to 21 the exponent is 4, that of E2M1's largest number 2: the scale is 2^(4 − 2) = 4. In
    units of it 21 is 5.25, nearest to 6; 7 is 1.75, the tie between 1.5 and 2 goes to the even code, 4, that of 2.

    >>> x = np.float32([21, 7, -5.2, 0.9] + 28 * [0])
    >>> blocks = quantize(x, MXFP4)
    >>> blocks.scales.tolist(), blocks.codes[:4].tolist()
    ([4.0], [7, 4, 11, 0])
    >>> dequantize(blocks)[:4].tolist()
    [24.0, 8.0, -6.0, 0.0]
    """
    _check_format(fmt)
    rows = _in_blocks(x, fmt)
    shape = (*rows.shape[:-2], -1)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        tensor_scale = _tensor_scale(rows, fmt) if fmt.tensor_scale else None
        minima = rows.min(axis=-1, keepdims=True) if fmt.rule == "min-max" else None
        wanted = _scales(rows, fmt)
        scales = wanted if tensor_scale is None else wanted / tensor_scale
        scales = _as_stored(scales, fmt)
        if fmt.rounding == "even":
            codes = _float_codes(rows, scales if tensor_scale is None else scales * tensor_scale, fmt)
        else:
            codes = _codebook_codes(rows if minima is None else rows - minima, wanted, fmt)
        minima = None if minima is None else _as_stored(minima, fmt).reshape(shape)
    return Blocks(codes.reshape(shape), scales.reshape(shape), tensor_scale, minima, fmt)


def dequantize(blocks):
    """Real values x̂ = s · level(code).

    The scale is first multiplied by that of the tensor, if there is one; the minimum, if there is one, is added last.

    Parameters
    ----------
    blocks : Blocks

    Returns
    -------
    float32 array, shape of the codes
        Infinite where s · level is beyond float32, as "ceil" and "even" may make it of the largest float32 numbers.

    Raises
    ------
    ValueError
        If ``blocks`` is no Blocks, or a code is none of its format.

    Examples
    --------
    >>> dequantize(quantize(np.linspace(-1, 1, 64, dtype=np.float32), NF4))[:3].round(3).tolist()
    [-1.0, -1.0, -1.0]
    """
    fmt, codes = _checked(blocks)
    scales = np.asarray(blocks.scales, np.float32)
    if blocks.tensor_scale is not None:
        scales = scales * np.float32(blocks.tensor_scale)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = fmt.levels[codes].reshape(*scales.shape, fmt.block) * scales[..., None]
        if blocks.minima is not None:
            values = values + np.asarray(blocks.minima, np.float32)[..., None]
    return values.reshape(codes.shape)


def pack(blocks):
    """The bytes that a GGUF file has for the blocks.

    A record holds one block: the scale (E8M0 one byte, FP16 two, low byte first), the minimum of Q4_1, then the codes.
    Two codes of 4 bits share a byte: the low one is of the first half of the block, the high one of the second half.
    A record of NVFP4 holds four blocks, first their four scales; the file has the tensor's scale elsewhere.

    Parameters
    ----------
    blocks : Blocks
        Of MXFP4, NVFP4, Q4_0, Q4_1 or Q8_0; for NVFP4 the last axis is a multiple of 64.

    Returns
    -------
    uint8 array, shape (..., bytes)

    Raises
    ------
    ValueError
        If GGUF has no such format, or the last axis is not whole records.

    References
    ----------
    ggml, ``ggml-common.h``: ``block_mxfp4``, ``block_nvfp4``, ``block_q4_0``, ``block_q4_1``, ``block_q8_0``.

    Examples
    --------
    >>> pack(quantize(np.float32([21, 7, -5.2, 0.9] + 28 * [0]), MXFP4))[:5].tolist()
    [129, 7, 4, 11, 0]
    """
    fmt, codes = _checked(blocks)
    if not fmt.record:
        known = ", ".join(some.name for some in FORMATS if some.record)
        raise ValueError(f"fmt must be one that GGUF files hold ({known}), got {fmt.name}")
    if codes.shape[-1] % (fmt.record * fmt.block):
        raise ValueError(f"the last axis must be a multiple of {fmt.record * fmt.block} for a record of {fmt.name}, "
                         f"got shape {codes.shape}")
    heads = [_scale_bytes(part, fmt) for part in (blocks.scales, blocks.minima) if part is not None]
    codes = codes.view(np.uint8).reshape(-1, fmt.block)
    if fmt.element_bits == 4:
        codes = codes[:, :fmt.block // 2] | codes[:, fmt.block // 2:] << 4
    records = np.concatenate([part.reshape(codes.shape[0] // fmt.record, -1) for part in (*heads, codes)], axis=1)
    return records.reshape(*np.shape(blocks.codes)[:-1], -1)


def _check_format(fmt):
    if not isinstance(fmt, BlockFormat):
        raise ValueError(f"fmt must be a BlockFormat, such as MXFP4, got {repr(fmt)[:60]}")


def _in_blocks(x, fmt):
    """``x`` in float32, shape (..., n / block, block)."""
    array = plain_array(x, "x")
    if not (array.dtype.kind == "f" if hasattr(array.dtype, "kind") else array.dtype.is_floating_point):
        raise ValueError(f"x must be an array of floats (float16, float32, float64; bfloat16 in torch), "
                         f"got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        array = numpy_array(array, "x").astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"x must be within float32, whose largest number is {np.finfo(np.float32).max:.4g}")
    if array.ndim == 0 or array.shape[-1] % fmt.block:
        raise ValueError(f"the last axis of x must be a multiple of {fmt.block}, the block of {fmt.name}, "
                         f"got shape {array.shape}")
    return array.reshape(*array.shape[:-1], -1, fmt.block)


def _tensor_scale(rows, fmt):
    """One scale for all blocks, so that the largest of their own is the largest number of its format."""
    scale = np.abs(rows).max() / np.float32(fmt.largest * fmt.scale.max)
    return scale if scale > 0 else np.float32(1)


def _scales(rows, fmt):
    """Scales as the rule wants them, before they are stored; shape (..., n / block, 1)."""
    if fmt.rule == "min-max":
        return (rows.max(axis=-1, keepdims=True) - rows.min(axis=-1, keepdims=True)) / np.float32(fmt.largest)
    if fmt.rule == "signed absmax":
        first = np.abs(rows).argmax(axis=-1, keepdims=True)
        return np.take_along_axis(rows, first, axis=-1) / np.float32(min(fmt.element))
    peak = np.abs(rows).max(axis=-1, keepdims=True)
    if fmt.rule == "absmax":
        return peak / np.float32(fmt.largest)
    significand, exponent = np.frexp(peak)  # peak = significand · 2^exponent, the significand from 1/2 to 1
    half_ulp = 2.0 ** -(fmt.element.mantissa_bits + 2)
    above = {"floor": 1.0, "ceil": np.nextafter(np.float32(0.5), np.float32(1)), "even": 1 - half_ulp}[fmt.rule]
    power = exponent - 1 + (significand >= above) - (math.frexp(fmt.largest)[1] - 1)
    if power.max() > _BIAS:
        raise ValueError(f"x must have blocks whose scale is at most 2^{_BIAS}, got 2^{power.max()} for {fmt.name}")
    return np.ldexp(np.float32(1), np.where(peak > 0, np.maximum(power, -_BIAS), -_BIAS))


def _as_stored(scales, fmt):
    """The nearest numbers that the scale's format has."""
    if fmt.scale in (E8M0, FP32):
        return scales
    stored = decode(encode(scales, fmt.scale), fmt.scale).astype(np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"x must be such that the scales of its blocks are within {fmt.scale.name} for "
                         f"{fmt.name}, the largest is {fmt.scale.max:g}, got {np.abs(scales).max():.6g}")
    return stored


def _float_codes(rows, scales, fmt):
    # Where even the smallest scale is too coarse, so that 0 is stored, all values of the block become 0.
    return encode(rows / np.where(scales > 0, scales, np.inf), fmt.element, saturate=True)


def _codebook_codes(rows, scales, fmt):
    """Codes of rows · (1 / scales), in float32: the arithmetic of bitsandbytes and llama.cpp, down to the last bit."""
    if fmt.rounding == "down":
        levels = fmt.levels
        u = rows * (1 / np.maximum(scales, np.float32(1e-38)))
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, u).astype(np.uint8)
    inverse = 1 / scales
    u = rows * np.where(np.isfinite(inverse), inverse, 0)
    if fmt.rounding == "up":
        return np.clip(np.trunc(u + np.float32(0.5 - fmt.element[0])), 0, len(fmt.element) - 1).astype(np.uint8)
    whole = np.floor(np.abs(u))
    return (np.sign(u) * (whole + (np.abs(u) - whole >= 0.5))).astype(np.int8)


def _checked(blocks):
    if not isinstance(blocks, Blocks):
        raise ValueError(f"blocks must be Blocks, as quantize returns them, got {repr(blocks)[:60]}")
    fmt, codes = blocks.format, np.asarray(blocks.codes)
    if codes.dtype != fmt.code_dtype or (codes.dtype == np.uint8 and codes.max(initial=0) >= len(fmt.levels)):
        raise ValueError(f"codes of {fmt.name} must be {fmt.code_dtype} and below {len(fmt.levels)}, "
                         f"got {codes.dtype} up to {codes.max(initial=0)}")
    return fmt, codes


def _scale_bytes(scales, fmt):
    if fmt.scale == E8M0:
        return np.where(np.isnan(scales), _NAN, np.frexp(scales)[1] - 1 + _BIAS).astype(np.uint8)
    codes = encode(scales, fmt.scale)
    return codes.astype(codes.dtype.newbyteorder("<")).view(np.uint8)
