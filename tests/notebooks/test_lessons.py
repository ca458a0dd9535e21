"""What the lessons print of the notes' worked examples is right, and what they say of libraries holds."""

import re
from pathlib import Path

import gguf
import nbformat
import numpy as np
import onnxruntime
import pytest
import torch
from torch.ao.quantization import MinMaxObserver

from qlab import calibration, samples
from qlab.affine import (
    absmax_params,
    dequantize,
    fake_quantize,
    quantize,
    range_params,
    sqnr_db,
    zero_point_params,
)
from qlab.explorers import drift, mapping
from qlab.floats import FORMATS, FP4_E2M1, FP32, decode, encode, fields

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SEVEN = np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])


def cells(lesson):
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def printed(lesson):
    """All that a lesson prints, with runs of spaces as one."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "")
             for cell in cells(lesson) for output in cell.outputs)
    return re.sub(r"[ \n]+", " ", " ".join(texts))


def functions(lesson, *names):
    """Functions that a lesson defines, as it defines them."""
    scope = {"np": np, "onnxruntime": onnxruntime, "samples": samples, "absmax_params": absmax_params,
             "fake_quantize": fake_quantize, "sqnr_db": sqnr_db, "encode": encode, "decode": decode}
    for cell in cells(lesson):
        if any(f"def {name}(" in cell.source for name in names):
            exec(cell.source, scope)
    return [scope[name] for name in names]


@pytest.mark.parametrize("lesson, text", [
    ("01", "118.625 = 1110110.101 in binary"), ("01", "1 10000101 11011010100000000000000"), ("01", "0xC2ED4000"),
    ("01", "100000101 in binary is 261 and 133 is 10000101"), ("01", "the word decodes to -123.3125"),
    ("01", "exponents of normal numbers: -126 to 127"), ("01", "133 is the exponent 6 and would be -123"),
    ("02", "s = 0.08503937007874016"), ("02", "32 would give 2.72, 36 gives 3.06"), ("02", "MSE = 0.000298"),
    ("02", "[ 64. 36. -89. 0. -23. -54. 127.]"), ("02", "smallest code that absmax can produce: -127"),
    ("02", "[ 0.0275 0.0186 -0.0215 0. 0.0059 0.0221 0. ]"), ("02", "s = 18.39 / 255 = 0.0721176 z = -23"),
    ("02", "[ 53. 20. -128. -23. -50. -86. 127.]"), ("02", "[ 5.4809 3.1011 -7.5724 0. -1.9472 -4.5434 10.8176]"),
    ("02", "[-0.0109 -0.0211 -0.0176 0. -0.0028 -0.0266 -0.0176]"), ("02", "MSE = 0.000272"),
    ("02", "254: QParams(scale=0.763469, zero_point=-125, qmin=-127, qmax=127)"),
    ("02", "255: QParams(scale=0.760475, zero_point=-126, qmin=-128, qmax=127)"),
])
def test_a_worked_example_is_printed(lesson, text):
    assert text in printed(lesson)


def test_the_notes_number_in_fp32():
    assert encode(-118.625, FP32) == 0xC2ED4000 == int("1" "10000101" "11011010100000000000000", 2)
    assert tuple(fields(0xC2ED4000, FP32)) == (1, 133, 0b11011010100000000000000)
    assert decode(int("1" "10000101" "11101101010000000000000", 2), FP32) == -123.3125


def random_data():
    rng = np.random.default_rng(1)
    yield SEVEN
    for _ in range(200):
        yield np.float32(rng.standard_normal(32) * rng.uniform(0.01, 100) + rng.normal())


@pytest.mark.filterwarnings("ignore")  # the observers are deprecated; they are a reference here
@pytest.mark.parametrize("name, scheme", [
    ("torch_symmetric", torch.per_tensor_symmetric), ("torch_affine", torch.per_tensor_affine),
])
def test_what_torch_does_with_seven_numbers(name, scheme):
    (formula,) = functions("02", name)
    for data in random_data():
        # Of both signs: the lesson's formula does not widen the range to hold 0.
        x = data if data.min() < 0 < data.max() else data - data.mean()
        observer = MinMaxObserver(dtype=torch.qint8, qscheme=scheme)
        observer(torch.tensor(x))
        scale, zero_point = observer.calculate_qparams()
        s, z, q = formula(x)
        assert (s, z) == (scale.item(), zero_point.item())
        codes = torch.quantize_per_tensor(torch.tensor(x), scale.item(), int(zero_point), torch.qint8).int_repr()
        assert q.tolist() == codes.tolist()


@pytest.mark.filterwarnings("ignore")
def test_torch_with_a_narrow_range_is_absmax():
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127)
    observer(torch.tensor(SEVEN))
    assert observer.calculate_qparams()[0].item() == absmax_params(SEVEN).scale


def test_what_gguf_does_with_seven_numbers():
    (q8_0,) = functions("02", "gguf_q8_0")
    for x in random_data():
        block = np.zeros(32, np.float32)
        block[:x.size] = x
        packed = gguf.quants.quantize(block, gguf.GGMLQuantizationType.Q8_0)
        s, z, q = q8_0(block)
        assert (np.float16(s), z) == (packed[:2].view(np.float16)[0], 0)
        assert q.tolist() == packed[2:].view(np.int8).tolist()
        assert np.array_equal(s * np.float32(q), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))


def test_what_onnx_runtime_does_with_seven_numbers():
    (dynamic,) = functions("02", "onnx_dynamic")
    for x in random_data():
        s, z, q = dynamic(x)
        params = zero_point_params(x)
        assert (s, z) == (params.scale, params.zero_point + 128)
        assert np.array_equal(q, quantize(x, params) + 128)
        assert np.array_equal(s * np.float32(q - z), dequantize(quantize(x, params), params))


def test_lesson_02_codes_of_absmax_after_a_relu():
    out = samples.load("digit_images").astype(np.float64)
    for w, b in samples.mlp("relu")[:3]:
        out = np.maximum(out @ w.T + b, 0)
    result = mapping(out, bits=4)._compute(data="23,040 values", scheme="absmax", bits=4, alpha=0, beta=0, narrow=False,
                                           value=0)
    assert np.unique(quantize(out, result.params)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert np.unique(quantize(result.values.threads, result.params)).tolist() == [0, 1, 2, 3, 4, 7]


def test_lesson_03_data_that_shrinks_first_fits_again():
    moved = drift(samples.load("activations"), samples.load("new_activations"), bits=8)
    found = {}
    for gain in (1, 0.8, 0.5, 0.25):
        moved.set(gain=gain)
        found[gain] = moved.readout["static_sqnr_db"]
    assert found[0.8] > found[1] + 3
    assert 5.5 < found[0.5] - found[0.25] < 6.5


@pytest.mark.parametrize("lesson, text", [
    ("00", "codes 1 0 -1 0 0 0 1 halfway between 0 and 10.8: 5.4"),
    ("01", "by hand 1101011101101010, encode 1101011101101010"), ("01", "by hand 65504.0 qlab 65504.0"),
    ("01", "by hand 11101111, encode 11101111"), ("01", "IEEE 754: 240.0 E4M3: 448.0 qlab 448.0"),
    ("03", "range to 6.0: rounding 0.0383 + clipping 0.0000 = MSE 0.0383"),
    ("03", "range to 2.5: rounding 0.0133 + clipping 2.0417 = MSE 2.0550"), ("03", "cut after 6 bins: KL = 0.0194"),
])
def test_a_small_case_by_hand_is_printed(lesson, text):
    assert text in printed(lesson)


def test_lesson_01_rule_for_the_bias_holds_for_all_formats():
    assert all(fmt.bias == 2 ** (fmt.exponent_bits - 1) - 1 for fmt in FORMATS)


def test_lesson_02_in_groups_integers_are_level_with_fp4_and_clipped_ahead():
    (side_by_side,) = functions("02", "side_by_side")
    weights = samples.load("weights")
    integers, floats = side_by_side(weights.reshape(-1, 32), 4, FP4_E2M1)
    assert abs(integers - floats) < 0.5
    integers, floats = side_by_side(weights.reshape(1, -1), 4, FP4_E2M1)
    assert integers < floats - 4 < sqnr_db(weights, fake_quantize(weights, range_params(-0.506, 0.506, 4))) - 4


def test_lesson_02_with_shifted_groups_the_numbers_change_little():
    (side_by_side,) = functions("02", "side_by_side")
    weights = samples.load("weights")
    shifted = np.array([side_by_side(np.roll(weights, by, axis=1).reshape(-1, 32), 4, FP4_E2M1)
                        for by in range(0, 32, 4)])
    assert np.abs(shifted - shifted[0]).max() < 0.2
    lead = shifted[:, 0] - shifted[:, 1]
    assert [round(db, 1) for db in (lead[0], lead.min(), lead.max())] == [0.1, 0.1, 0.3]


def test_lesson_03_kl_by_hand_is_the_calibrators():
    (divergence,) = functions("03", "divergence")
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(0, 4, rng.integers(8, 60))  # many bins are empty
        counts[0] = 1
        levels = int(rng.integers(2, 8))
        cut = int(rng.integers(levels, counts.size + 1))
        assert divergence(counts, cut, levels) == pytest.approx(calibration._divergence(counts, cut, levels))


def test_lesson_03_cut_on_2048_bins_is_that_of_entropy():
    ours = re.search(r"our cut is after \d+ bins: β = (\S+) 128 levels: β = (\S+) 256 levels: β = (\S+)", printed("03"))
    assert ours[1] == ours[2] != ours[3]


def sources(lesson):
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


@pytest.mark.parametrize("lesson", ["01", "02", "03", "04", "05", "06", "07", "08", "09"])
def test_an_hour_leads_through_a_lesson_and_the_rest_is_marked_as_optional(lesson):
    texts = sources(lesson)
    stated = re.search(r"\*\*Time\*\* (\d+) minutes, and\s+(\d+)\s+more", "\n".join(texts))
    table = next(text for text in texts if text.startswith("Minutes for each section"))
    rows = re.findall(r"^\| ([^|]+) \| (\d*) ?\| (\d*).*\|$", table, re.MULTILINE)
    path, optional = (sum(int(row[i] or 0) for row in rows) for i in (1, 2))
    assert (path, optional) == (int(stated[1]), int(stated[2]))
    assert path <= 60
    assert f"| {path} + {optional} |" in next(text for text in sources("00") if f"]({lesson}_" in text)
    headings = [match[1] for text in texts if (match := re.match(r"## (\d+\. .*|Practice.*)", text))]
    named = [(re.sub(r"^(\d+) ", r"\1. ", name), on_the_path) for name, on_the_path, _ in rows if "closing" not in name]
    assert headings == [f"{name}{'' if on_the_path else ' (optional)'}" for name, on_the_path in named]
