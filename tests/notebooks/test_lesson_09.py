"""What lesson 09 ranks is what its printed intervals resolve; its versions are those of the golden file."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np

from qlab import samples
from qlab.affine import fake_quantize, sqnr_db, zero_point_params
from qlab.blocks import MXFP4, NVFP4, Q4_0, dequantize, quantize
from qlab.floats import FP4_E2M1, decode
from qlab.spinquant import hadamard
from qlab.studies import blocks as study
from qlab.studies.tables import load
from tests import golden_blocks
from tests.notebooks.measured import agree, intervals

SHIPPED = load("blocks")
TEXT = " ".join(" ".join(cell.source for cell in nbformat.read(next(
    Path(__file__).parents[2].joinpath("notebooks").glob("09_*.ipynb")), 4).cells).split())


def below_1(found):
    return [high < 1 for _, _, high in found]


def above_1(found):
    return [low > 1 for _, low, _ in found]


def of(line, occurrence=0):
    """The three intervals of one of the lines that start so: prose, code, documentation."""
    found = intervals("09", line)
    return found[3 * occurrence:3 * occurrence + 3]


def test_as_it_is_nvfp4_is_ahead_of_all_at_4_5_bits_and_mxfp4_last():
    for other in ("Q4_0", "int4 absmax, 32", "NF4, 64"):
        assert all(below_1(of(f"NVFP4 / {other}")))
    for name in list(study.WEIGHTS)[1:-1]:
        assert all(below_1(of(f"{name} / MXFP4 0")))


def test_after_the_rotation_most_of_it_is_not_resolved():
    q4_0, int4, nf4 = (of(f"NVFP4 / {other}", 1) for other in ("Q4_0", "int4 absmax, 32", "NF4, 64"))
    assert not any(below_1(q4_0) + above_1(q4_0))
    assert below_1(int4) == [False, False, True]
    assert not any(above_1(int4))
    assert all(below_1(nf4))


def test_every_format_is_worse_after_the_rotation_by_these_factors():
    for name in list(study.WEIGHTS)[:-1]:
        assert all(above_1(of(f"{name} / as it is")))
    for text in study.JUDGED:
        folded = SHIPPED.contrast("weights, NVFP4, folded", "weights, NVFP4, as it is", text).kl
        rotated = SHIPPED.contrast("weights, NVFP4, rotated", "weights, NVFP4, folded", text).kl
        assert 1.6 * folded < rotated


def test_a_rotation_helps_rows_and_harms_nvfp4():
    rows, zero_point, absmax = (of(f"{name} / as it is") for name in (
        "int4, token", "int4 zero-point, 32", "int4 absmax, 16"))
    mxfp4, nvfp4 = (of(f"{name} / as it is", 1) for name in ("MXFP4", "NVFP4"))
    assert all(high < 0.25 for _, _, high in rows)
    assert all(low > 2.5 for _, low, _ in nvfp4)
    assert not any(below_1(zero_point + absmax) + above_1(zero_point + absmax))
    assert below_1(mxfp4) == [True, False, True]
    assert above_1(of("NVFP4 / int4, token")) == [True, False, True]
    assert all(above_1(of("NVFP4 / as it is", 2)) + above_1(of("NVFP4 / folded")))


def test_nvfp4_is_ahead_of_integers_in_small_groups_as_it_is_and_of_a_learned_rotation():
    assert all(below_1(of("NVFP4 / int4 zero-point, 32") + of("NVFP4 / int4 absmax, 16")))
    assert all(1.9 < value < 2.1 and low > 1 for value, low, _ in of("int4, token / NVFP4"))


def test_int4_with_awq_is_ahead_of_nvfp4_and_ranges_by_h_are_but_on_code():
    nvfp4, awq, by_h = of("NVFP4, nearest:"), of("int4 AWQ, 64:"), of("int4 nearest, 64, weighted:")
    assert all(high < low for (_, _, high), (_, low, _) in zip(awq, nvfp4, strict=True))
    assert [high < low for (_, _, high), (_, low, _) in zip(by_h, nvfp4, strict=True)] == [True, False, True]


def test_gptq_helps_both_formats_and_most_after_the_rotation():
    mxfp4, nvfp4 = (of(f"{name}, GPTQ / {name}") for name in ("MXFP4", "NVFP4"))
    assert all(below_1(mxfp4)) and below_1(nvfp4) == [True, True, False]
    for name in ("MXFP4", "NVFP4"):
        assert all(high < 0.35 for _, _, high in of(f"{name}, GPTQ / {name}", 1))
        assert all(below_1(of(f"{name}, GPTQ / as it is")))


def test_both_sides_at_once():
    floor, ceil = (of(f"MXFP8, {rule} / FP8, tensor") for rule in ("floor", "ceil"))
    assert all(above_1(floor)) and all(2 < value < 3 for value, _, _ in floor)
    assert not any(below_1(ceil) + above_1(ceil))
    assert all(below_1(of("NVFP4 / MXFP4, MXFP8")))


def test_turned_values_lie_in_the_upper_half_of_their_blocks():
    inputs, _ = samples.products()[12, "attn_in"]
    turned = np.abs(inputs @ hadamard(576).numpy()).reshape(-1, 16)
    straight = np.abs(inputs).reshape(-1, 16)
    assert np.mean(straight > straight.max(axis=1, keepdims=True) / 2) < 1 / 3
    assert np.mean(turned > turned.max(axis=1, keepdims=True) / 2) > 1 / 2


def test_fp8_per_tensor_has_a_twentieth_of_int8s_divergence():
    assert all(1 / 31 < value < 1 / 23 and high < 0.1 for value, _, high in of("FP8 / int8:"))


def test_nvfp4_has_less_than_half_of_mxfp4s_divergence():
    (kl, _, high), _ = intervals("09", "NVFP4 / MXFP4:")
    assert kl < high < 0.5


def test_the_rows_that_are_measured_again_are_those_of_the_table():
    for line, kind, name in (("MXFP4:", "weights", "MXFP4"), ("NVFP4:", "weights", "NVFP4"),
                             ("FP8, tensor:", "activations", "FP8, tensor")):
        shipped = SHIPPED.row(f"{kind}, {name}, as it is", "code")
        assert agree((shipped.kl, shipped.kl_low, shipped.kl_high), intervals("09", line)[0])


def test_errors_of_even_grids_are_alike_in_a_block_of_q4_1_until_it_is_turned():
    def alike(matrix, stored):  # 1 for errors that know nothing of each other, 32 for one that all of a block share
        error = (stored - matrix).astype(float).reshape(-1, 32)
        return 32 * error.mean(axis=1).var() / np.square(error).mean()

    def of_all(matrix):
        groups = (fake_quantize(matrix, zero_point_params(matrix, 4, group_size=size)) for size in (32, 64))
        stored = (dequantize(quantize(matrix, fmt)) for fmt in (Q4_0, NVFP4))
        return [alike(matrix, values) for values in (*groups, *stored)]

    w = samples.load("weights")
    in_32, in_64, q4_0, nvfp4 = of_all(w)
    assert in_32 > 30 and in_64 > 10 and q4_0 > 5 and nvfp4 < 2
    assert all(0.9 < value < 1.1 for value in of_all((w @ hadamard(576).numpy()).astype(np.float32)))


def test_decibels_order_the_formats_otherwise_than_the_model():
    w = samples.load("weights")
    nvfp4, q4_0, mxfp4 = (sqnr_db(w, dequantize(quantize(w, fmt))) for fmt in (NVFP4, Q4_0, MXFP4))
    assert mxfp4 < nvfp4 < q4_0
    assert sum(abs(decode(list(range(16)), FP4_E2M1)) <= 2) - 1 == 9  # 0 is there twice


def test_ceil_never_uses_the_last_level_and_even_is_not_best_in_each_block():
    w = samples.load("weights").reshape(-1, 32)
    floor, ceil, even = (replace(MXFP4, rule=rule) for rule in ("floor", "ceil", "even"))
    assert np.isin(quantize(w, ceil).codes & 7, range(7)).all()
    first, second = (sqnr_db(w[8], dequantize(quantize(w[8], fmt))) for fmt in (floor, even))
    assert first > second
    first, second = (sqnr_db(w, dequantize(quantize(w, fmt))) for fmt in (floor, even))
    assert round(float(second - first), 1) == 0.3


def test_versions_of_libraries_are_those_of_the_golden_file():
    versions = json.loads(golden_blocks.FILE.read_text())["versions"]
    for name in ("torchao", "compressed-tensors", "bitsandbytes"):
        assert f"{name} {versions[name]}" in TEXT
