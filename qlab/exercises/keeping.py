"""One page to keep of lessons 01 to 04: formulas, formats, decibels and bits, calibrators; every number computed."""

import html
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from qlab import calibration
from qlab.affine import absmax_params, zero_point_params
from qlab.floats import FORMATS

_STYLE = """<style>@page {size: A4; margin: 12mm}
.qlab-page {font: 9.5pt/1.25 sans-serif; max-width: 186mm} .qlab-page h4 {margin: 1.2em 0 0.4em; font-size: 11pt}
.qlab-page table {border-collapse: collapse; font-size: 9.5pt} .qlab-page tr > * {text-align: left;
padding: 1px 12px 1px 0; border-bottom: 1px solid #8888; white-space: normal; vertical-align: top}</style>"""


@dataclass(frozen=True)
class Page:
    """Tables by heading, each a list of rows of text, the first of them its head."""

    tables: dict[str, list[tuple[str, ...]]]

    def _repr_html_(self):
        def table(head, *rows):
            return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>"

        def cells(tag, row):
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"

        parts = "".join(f"<h4>{heading}</h4>{table(*rows)}" for heading, rows in self.tables.items())
        return f'<div class="qlab-page">{_STYLE}{parts}</div>'

    def __repr__(self):
        lines = []
        for heading, rows in self.tables.items():
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["", heading.upper()]
            lines += ["  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines[1:])


def page_to_keep(path=None):
    """Formulas, formats, decibels and bits, and calibrators of lessons 01 to 04 on one sheet.

    Parameters
    ----------
    path : path, optional
        Where to write the page by itself, an HTML file that prints on one A4 sheet.

    Returns
    -------
    Page
        The notebook shows it.

    Examples
    --------
    >>> page_to_keep().tables["Formats"][2]
    ('FP16', '16', '1, 5, 10', '15', '65504', '6.104e-05', '5.96e-08', '2^−10')
    """
    page = Page({"Formulas": _formulas(), "Formats": _formats(), "Decibels and bits": _decibels(),
                 "Calibrators": _calibrators()})
    if path is not None:
        title = "<title>Quantization: one page to keep</title>"
        Path(path).write_text(f'<!doctype html><meta charset="utf-8">{title}{page._repr_html_()}', encoding="utf-8")
    return page


def _formulas():
    seven = np.array([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])  # those of lesson 02
    absmax, zero_point = absmax_params(seven), zero_point_params(seven)
    return [
        ("what", "formula"),
        ("a word's value", "(−1)^sign · 2^(exponent − bias) · 1.m with the bias 2^(E−1) − 1; at exponent 0, "
                           "(−1)^sign · 2^(1 − bias) · 0.m"),
        ("spacing at x", "2^(⌊log₂|x|⌋ − M) with M mantissa bits; rounding is off by half of it at most"),
        ("absmax", f"s = max|x| / (2^(b−1) − 1), z = 0  (seven numbers, 8 bits: s = {absmax.scale:.4f})"),
        ("zero-point", "s = (β − α) / (2^b − 1), z = −2^(b−1) − round(α / s), with 0 in [α, β]"
                       f"  (s = {zero_point.scale:.4f}, z = −{-zero_point.zero_point})"),
        ("code, and back", "q = clip(round(x / s) + z, q_min, q_max), x̂ = s (q − z)"),
        ("error", "MSE = mean of (x − x̂)² = rounding (about s² / 12) + clipping"),
        ("decibels", f"SQNR = 10 log₁₀(Σ x² / Σ (x − x̂)²); a step half as wide gives {20 * np.log10(2):.2f} dB"),
        ("groups", f"bits per value = b + shared bits / group size  (4 bits, 16 for 32 values: {4 + 16 / 32:g})"),
        ("batch norm folded", "w γ / √(σ² + ε), and β + γ (bias − μ) / √(σ² + ε)"),
        ("straight through", "with u = clip(x / s, q_min, q_max): u + (round(u) − u).detach(); "
                             "gradient 1 inside the range, 0 outside"),
        ("integers only", "M = s₁ s₂ / s₃ ≈ 2^(−n) · m₀ / 2³¹, with 2³⁰ ≤ m₀ < 2³¹"),
    ]


def _formats():
    return [("format", "bits", "sign, E, M", "bias", "largest", "smallest normal", "smallest", "spacing at 1")] + [
        (fmt.name, str(fmt.bits), f"1, {fmt.exponent_bits}, {fmt.mantissa_bits}", str(fmt.bias), f"{fmt.max:.6g}",
         f"{fmt.smallest_normal:.4g}", f"{fmt.smallest_subnormal:.4g}", f"2^−{fmt.mantissa_bits}")
        for fmt in FORMATS if fmt.bits <= 32]


def _profile(quantile):
    """10,000 values that lie as the distribution does."""
    return calibration.ErrorProfile(np.array([quantile(u) for u in (np.arange(10_000) + 0.5) / 10_000]))


def _db(profile, ends, bits):
    return f"{10 * np.log10((profile.std**2 + profile.mean**2) / profile.mse(*ends, bits)):.1f}"


def _decibels():
    even, normal = _profile(lambda u: 2 * u - 1), _profile(NormalDist().inv_cdf)
    return [("bits", "codes", "largest code", "even data, min-max", "normal data, min-max", "normal, best range")] + [
        (str(bits), str(2**bits), str(2 ** (bits - 1) - 1), f"{_db(even, calibration.minmax(even), bits)} dB",
         f"{_db(normal, calibration.minmax(normal), bits)} dB", f"{_db(normal, best, bits)} dB (±{best[1]:.2f} σ)")
        for bits in range(2, 9) for best in [calibration.mse(normal, bits)]]


def _calibrators():
    normal = _profile(NormalDist().inv_cdf)
    found = [
        ("min-max", "from the smallest to the largest value: nothing is clipped", calibration.minmax(normal)),
        ("percentile 99.9", "cuts a chosen share off, here 0.1 % of |x|",
         calibration.percentile(normal, 99.9, symmetric=True)),
        ("MSE", "the least rounding + clipping error, by search", calibration.mse(normal, 4)),
        ("KL", "the histogram of the codes nearest to that of the data", calibration.entropy(normal, 4)),
        ("ACIQ", "the best range for a normal or Laplace distribution, by formula", calibration.aciq(normal, 4)),
    ]
    return [("calibrator", "the range it takes", "normal data, 4 bits", "dB")] + [
        (name, what, f"±{ends[1]:.2f} σ", _db(normal, ends, 4)) for name, what, ends in found]
