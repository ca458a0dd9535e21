"""Lesson 01: the bits of a number."""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from qlab.explorers.colors import BLACK, BLUE, GREY, ORANGE, PURPLE, SKY, VERMILION
from qlab.explorers.parts import moving
from qlab.floats import FORMATS, FloatFormat, decode, encode, fields, spacing
from qlab.live import Explorer, Handle, in_a_row, new_figure

_BY_NAME = {fmt.name: fmt for fmt in FORMATS}
_FIELDS = ("sign", "exponent", "mantissa")
_HEADS = {"sign": "sign", "exponent": "exponent → power", "mantissa": "mantissa → significand"}
_COLORS = dict(zip(_FIELDS, (PURPLE, SKY, ORANGE), strict=True))
_PALE = dict(zip(_FIELDS, ("#F3DFEB", "#DDF0FB", "#FBECCB"), strict=True))
_ROOM = 12  # characters that one of three neighbours may have if all digits are written
_WIDEST = 54  # characters of the product that fit into a line
_COMPARED = ("FP32", "BF16", "FP16", "FP8 E5M2", "FP8 E4M3")


class BitBoxes(widgets.HBox):
    """One button per bit, sign first, grouped by field. ``value`` is the code, ``format`` the `FloatFormat`."""

    value = traitlets.Int()
    format = traitlets.Instance(FloatFormat)

    def __init__(self, value, fmt):
        self._styles = {
            (field, bit): widgets.ButtonStyle(button_color=(_PALE, _COLORS)[bit][field], text_color="black",
                                              font_weight="bold", font_size="15px")
            for field in _FIELDS for bit in (0, 1)
        }
        self._shapes = [widgets.Layout(width=f"{width}px", height="32px", margin="1px", padding="0")
                        for width in (26, 19)]
        self._boxes = []
        self._rows = {field: widgets.HBox(layout={"flex_flow": "row wrap"}) for field in _FIELDS}
        self._labels = {field: widgets.HTML() for field in _FIELDS}
        groups = [widgets.VBox([self._labels[field], self._rows[field]], layout={"margin": "0 8px 0 0"})
                  for field in _FIELDS]
        super().__init__(groups, value=value, format=fmt, layout={"flex_flow": "row wrap"})
        self._build()
        self.observe(self._build, "format")
        self.observe(self._show, "value")

    @traitlets.validate("value")
    def _is_code(self, proposal):
        if not 0 <= proposal["value"] < 2**self.format.bits:
            raise traitlets.TraitError(f"codes of {self.format.name} are integers from 0 to 2^{self.format.bits} − 1")
        return proposal["value"]

    def _build(self, _=None):
        fmt = self.format
        while len(self._boxes) < fmt.bits:
            box = widgets.Button(layout=self._shapes[0], style=self._styles["sign", 0])
            box.on_click(partial(self._flip, len(self._boxes)))
            self._boxes.append(box)
        stop = fmt.bits
        for field, count in zip(_FIELDS, (1, fmt.exponent_bits, fmt.mantissa_bits), strict=True):
            places = range(stop - 1, stop - count - 1, -1)
            for place in places:
                self._boxes[place].layout = self._shapes[fmt.bits > 32]
                self._boxes[place].tooltip = f"{field}, bit {place - (stop - count)}"
            self._rows[field].children = [self._boxes[place] for place in places]
            self._labels[field].value = (f'<span style="font-size:15px; line-height:1.2">{field}'
                                         f"{f', {count} bits' if count > 1 else ''}</span>")
            stop -= count
        self._show()

    def _show(self, _=None):
        for field in _FIELDS:
            for box in self._rows[field].children:
                bit = self.value >> self._boxes.index(box) & 1
                if box.description != str(bit) or box.style is not self._styles[field, bit]:
                    with box.hold_sync():
                        box.description, box.style = str(bit), self._styles[field, bit]

    def _flip(self, place, _):
        self.value ^= 1 << place


@dataclass(frozen=True)
class FloatBits:
    """What `float_bits` shows for one position of its controls."""

    format: FloatFormat
    code: int
    wanted: float
    stored: float
    fields: tuple  # of ints: sign, exponent, mantissa
    kind: str
    power: int  # the exponent after the bias
    significand: float  # 1.m, or 0.m
    below: float
    above: float
    spacing: float
    error: float  # stored − typed


def float_bits(value=-118.625, format="FP32"):
    """Explore how the bits of a number make its value.

    One box per bit, above the sum that they stand for; below, the number between its neighbours, and all numbers of the
    format (up to 8 bits) or the reach of several formats. On the line the number can be taken, to land on others; in
    the reach its power of two, which leaves the mantissa as it is.

    Parameters
    ----------
    value : float or str
        To start with; a text may be a fraction, "1/3", or "π".
    format : str or FloatFormat
        One of `qlab.floats.FORMATS` or its name.

    Returns
    -------
    Explorer
        Controls ``format``, ``value``, ``hex`` and ``binary`` (texts) and ``code`` (unsigned integer; the boxes).
        Chips for special values.

    Raises
    ------
    ValueError
        If there is no such format, ``value`` is no number, or the format has no code for it.

    Examples
    --------
    >>> explorer = float_bits(-118.625)
    >>> explorer.readout["hex"], explorer.readout["exponent"]
    ('0xC2ED4000', '133 − 127 = 6')
    >>> explorer.set(format="FP4 E2M1")
    >>> explorer.readout["stored"]
    '−6'
    """
    name = getattr(format, "name", format)
    if name not in _BY_NAME:
        raise ValueError(f"format must be one of {', '.join(_BY_NAME)}, got {format!r}")
    boxes = BitBoxes(int(encode(float(_number(str(value))), _BY_NAME[name])), _BY_NAME[name])
    text = {"continuous_update": False, "style": {"description_width": "48px"}}
    controls = {
        "format": widgets.Dropdown(options=list(_BY_NAME), value=name, description="format",
                                   style={"description_width": "48px"}, layout={"width": "180px"}),
        "value": widgets.Text(value if isinstance(value, str) else _spell(value), description="value",
                              layout={"width": "250px"}, **text),
        "hex": widgets.Text(_hex(boxes.value, boxes.format), description="hex", layout={"width": "225px"}, **text),
        "binary": widgets.Text(_binary(boxes.value, boxes.format), description="binary", layout={"width": "410px"},
                               **text),
        "code": boxes,
    }

    chosen = {}  # the value of a code that was chosen, not typed: FP64 digits need not spell it exactly

    def settle(code, fmt, value=None):
        """All controls in agreement about one code."""
        code = int(code)
        chosen.clear()
        if value is None:
            value = _spell(decode(code, fmt))
            chosen[value] = decode(code, fmt)
        return {"format": fmt.name, "value": value, "hex": _hex(code, fmt), "binary": _binary(code, fmt),
                "code": {"format": fmt, "value": code}}

    def couple(name, values):
        fmt = _BY_NAME[values["format"]]
        if name == "code":
            return settle(boxes.value, boxes.format)
        if name == "hex":
            return settle(_parse(values["hex"], 16, fmt), fmt)
        if name == "binary":
            return settle(_parse(values["binary"], 2, fmt), fmt)
        try:
            wanted, text = _number(values["value"]), values["value"]
        except ValueError:  # another format, while the text is no number: what the boxes hold stays
            if name == "value":
                raise
            wanted, text = decode(boxes.value, boxes.format), None
        return settle(encode(float(wanted), fmt), fmt, text)

    def compute(*, value, **_):
        fmt, code = boxes.format, boxes.value
        sign, exponent, mantissa = (int(field) for field in fields(code, fmt))
        stored = float(decode(code, fmt))
        size = code & (fmt.sign_code - 1)
        wanted = chosen.get(value)
        wanted = _number(value) if wanted is None else wanted
        kind = ("NaN" if np.isnan(stored) else "infinity" if np.isinf(stored) else "zero" if size == 0
                else "subnormal" if exponent == 0 else "normal")
        rank = -size if sign else size  # numbers of the format are in the order of their ranks
        return FloatBits(
            fmt, code, float(wanted), stored, (sign, exponent, mantissa), kind,
            power=max(exponent, 1) - fmt.bias,
            significand=(exponent > 0) + mantissa / 2**fmt.mantissa_bits,
            below=_of_rank(rank - 1, fmt), above=_of_rank(rank + 1, fmt), spacing=float(spacing(stored, fmt)),
            error=_error(stored, wanted),
        )

    def move_number(x, y, start):
        fmt = boxes.format
        return {"code": int(encode(min(fmt.max, max(-fmt.max, x)), fmt))}

    def move_power(x, y, start):
        fmt, number = boxes.format, float(decode(start.values["code"], boxes.format))
        low, high = (int(np.floor(np.log2(end / abs(number)))) for end in (fmt.smallest_subnormal, fmt.max))
        return {"code": int(encode(np.ldexp(number, min(high, max(low, round(x - np.log2(abs(number)))))), fmt))}

    def special(name, code_of, **_):
        code = code_of(boxes.format)
        if code is None:
            raise ValueError(f"{boxes.format.name} has no code for {name}")
        return {"code": code}

    codes = {
        "−0": lambda fmt: fmt.sign_code,
        "smallest": lambda fmt: 1,
        "smallest normal": lambda fmt: 1 << fmt.mantissa_bits,
        "largest": lambda fmt: fmt.max_code,
        "∞": lambda fmt: fmt.max_code + 1 if fmt.has_infinity else None,
        "NaN": lambda fmt: fmt.nan_code,
    }
    chips = {text: (lambda text=text, **_: {"value": text}) for text in ("−118.625", "0.1", "π", "1")}
    chips |= {name: partial(special, name, code_of) for name, code_of in codes.items()}
    figure, artists = _bits_figure()
    return Explorer(
        figure, controls, compute, partial(_draw_bits, artists), _read_bits, chips=chips, couple=couple,
        arrange=_arrange,
        handles=[
            Handle("the number", artists.line, lambda result: (result.stored, 0), move_number),
            Handle("the power of two", artists.reach, lambda result: (_log2(result.stored), None), move_power),
        ],
        ghost=[artists.dots[artists.line], artists.here], parts={"all numbers": [artists.line]},
        title="The bits of a number",
        description="Above: the three fields, what each stands for, and their product, the value. In the middle: the "
        "number between its two neighbours. Below: all numbers of the format on a line, or the reach of five formats.",
    )


def _arrange(controls, chips):
    typed = [controls[name] for name in ("format", "value", "hex", "binary")]
    return widgets.VBox([in_a_row(typed), in_a_row(list(chips.values())), controls["code"]])


def _read_bits(result):
    sign, exponent, _ = result.fields
    special = result.kind in ("infinity", "NaN")
    return {
        "stored": " ".join(_decimal(result.stored)).removeprefix("= "),
        "kind": result.kind,
        "hex": _hex(result.code, result.format),
        "sign": "−" if sign else "+",
        "exponent": "all ones" if special else f"{max(exponent, 1)} − {result.format.bias} = {_spell(result.power)}",
        "significand": "none" if special else _spell(result.significand),
        "spacing": result.spacing,
        "error": result.error,
    }


def _bits_figure():
    with new_figure(1000, 420) as figure:
        figure.set_layout_engine("none")  # it would leave no room for axes that are hidden at first
        grid = figure.add_gridspec(3, 1, height_ratios=[1.2, 0.75, 1.25], left=0.1, right=0.99, bottom=0.14, top=0.985,
                                   hspace=0.16)
        above, middle, line = (figure.add_subplot(part) for part in grid)
        reach = figure.add_subplot(grid[2])
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.set_axis_off()
        places = dict(zip(_FIELDS, (0.005, 0.14, 0.42), strict=True))
        for field, x in places.items():
            above.text(x, 0.9, _HEADS[field], va="center", bbox={"facecolor": _COLORS[field], "lw": 0, "pad": 3})
        parts = [above.text(x, 0.53, "", va="center", linespacing=1.5, animated=True) for x in places.values()]
        product = above.text(0.005, 0.1, "", va="center", fontsize=18, fontweight="bold", animated=True)

        middle.set(xlim=(-1.55, 1.55), ylim=(-1.1, 1.2), yticks=[], xticks=[])
        middle.spines[["left", "bottom"]].set_visible(False)
        middle.axhline(0, color=BLACK, lw=1)
        neighbours = LineCollection([], colors=[BLACK] * 3 + [GREY] * 2, linewidths=[2] * 3 + [1.5] * 2, animated=True)
        middle.add_collection(neighbours, autolim=False)
        numbers = [middle.text(0, -0.62, "", ha="center", va="center", animated=True) for _ in range(3)]
        gaps = [middle.text(0, 0.62, "", ha="center", va="center", fontsize=13, animated=True) for _ in range(2)]
        above.legend([Line2D([], [], ls="", **_STORED), Line2D([], [], ls="", **_WANTED)], ["stored", "typed"],
                     loc="upper right", bbox_to_anchor=(1, 1.12), ncols=2, frameon=False, handletextpad=0.1)

        line.set(yticks=[], ylim=(-1, 1))
        line.spines["left"].set_visible(False)
        every = LineCollection([], colors=BLUE, linewidths=1)
        line.add_collection(every, autolim=False)
        _draw_reach(reach)
        dots = {axes: moving(axes, ls="", **_STORED) for axes in (middle, line)}
        typed = {axes: moving(axes, ls="", **_WANTED) for axes in (middle, line)}
        here = reach.axvline(0, color=VERMILION, lw=3, animated=True)
    return figure, SimpleNamespace(parts=parts, product=product, middle=middle, line=line, reach=reach, numbers=numbers,
                                   neighbours=neighbours, gaps=gaps, every=every, dots=dots, typed=typed, here=here,
                                   format=None)


_STORED = {"marker": "o", "ms": 11, "color": BLACK, "clip_on": False}
_WANTED = {"marker": "v", "ms": 13, "mfc": "none", "mec": VERMILION, "mew": 2.5, "clip_on": False}


def _draw_reach(axes):
    """What powers of two five formats reach, and with how many bits."""
    axes.set(xlim=(-160, 160), ylim=(len(_COMPARED) - 0.4, -0.6),
             xlabel="magnitude (power of two); hatched: subnormal; right: bits of the significand")
    axes.set_yticks(range(len(_COMPARED)), _COMPARED)
    axes.tick_params(axis="y", length=0)
    for row, name in enumerate(_COMPARED):
        fmt = _BY_NAME[name]
        lowest, normal, top = np.log2([fmt.smallest_subnormal, fmt.smallest_normal, fmt.max])
        axes.barh(row, normal - lowest, left=lowest, height=0.66, color=SKY, hatch="///", edgecolor="white", lw=0)
        axes.barh(row, top - normal, left=normal, height=0.66, color=BLUE)
        axes.text(131, row, f"{fmt.mantissa_bits + 1} bits", va="center", fontsize=13)


def _draw_bits(artists, result):
    if result.format != artists.format:
        _draw_format(artists, result.format)
    for text, words in zip(artists.parts, _explain(result), strict=True):
        text.set_text(words)
    artists.product.set_text(_product(result))
    _draw_neighbours(artists, result)
    small, limit = result.format.bits <= 8, result.format.max
    artists.here.set_visible(not small)
    for marks, x in ((artists.dots, result.stored), (artists.typed, result.wanted)):
        marks[artists.line].set_data([x if np.isfinite(x) else np.nan], [0])
        marks[artists.line].set_visible(small and abs(x) <= 1.05 * limit)
    artists.here.set_xdata([_log2(result.stored)] * 2)


def _draw_format(artists, fmt):
    """The background: what does not change while bits do."""
    small = fmt.bits <= 8
    artists.line.set_visible(small)
    artists.reach.set_visible(not small)
    if small:
        numbers = decode(np.arange(2**fmt.bits), fmt)
        numbers = numbers[np.isfinite(numbers)]
        artists.every.set_segments([[(x, -0.55), (x, 0.55)] for x in numbers])
        artists.line.set_xlim(-1.04 * fmt.max, 1.04 * fmt.max)
        artists.line.set_xlabel(f"all numbers of {fmt.name}")
    artists.format = fmt
    artists.line.figure.stale = True


def _draw_neighbours(artists, result):
    gap = result.spacing
    shown = np.isfinite(gap)
    moving = [artists.neighbours, *artists.gaps, *artists.numbers, artists.dots[artists.middle]]
    for artist in moving:
        artist.set_visible(shown)
    down, up = result.stored - result.below, result.above - result.stored
    wanted = result.wanted - result.stored
    artists.typed[artists.middle].set_visible(shown and abs(wanted) <= 1.5 * gap)
    if not shown:
        artists.numbers[1].set_visible(True)
        artists.numbers[1].set(position=(0, 0.5), text=f"{result.kind}: no neighbours")
        return
    three = (result.below, result.stored, result.above)
    digits = 17 if max(len(_spell(number)) for number in three) <= _ROOM else (
        2 + int(0.302 * (result.format.mantissa_bits + 1)))  # enough to tell neighbours apart
    left, right = -min(down / gap, 1), min(up / gap, 1)
    middles = [left / 2, right / 2]
    artists.neighbours.set_segments([[(x, -0.35), (x, 0.35)] for x in (left, 0, right)]
                                    + [[(x, -0.18), (x, 0.18)] for x in middles])
    for text, x, number in zip(artists.numbers, (left, 0, right), three, strict=True):
        text.set(position=(x, -0.72), text=_spell(number, digits))
    for text, x, distance in zip(artists.gaps, middles, (down, up), strict=True):
        text.set(position=(x, 0.72), text=f"← {_gap(distance)} →" if np.isfinite(distance) else "")
    artists.dots[artists.middle].set_data([0], [0])
    artists.typed[artists.middle].set_data([wanted / gap], [0.12])


def _explain(result):
    """Two lines for each field: its bits, and what they stand for."""
    fmt, (sign, exponent, mantissa) = result.format, result.fields
    digits = f"{mantissa:0{fmt.mantissa_bits}b}".rstrip("0") or "0"
    digits = f"{digits}₂" if len(digits) <= 40 else f"{digits[:36]}…"
    first = f"{exponent:0{fmt.exponent_bits}b}₂ = {exponent}"
    if result.kind in ("infinity", "NaN"):
        third = "all ones" if fmt.specials == "fn" else "not zero" if result.kind == "NaN" else "zero"
        third += f": {result.kind}"
        return f"{sign}\n{'−' if sign else '+'}", f"{first}\nall ones: special", f"{digits}\n{third}"
    leading = int(exponent > 0)
    stored = max(exponent, 1)
    note = "" if leading else "no leading 1, "
    return (
        f"{sign}\n{'−1' if sign else '+1'}",
        f"{first}\n2{_superscript(f'{stored}−{fmt.bias}')} = 2{_superscript(_spell(result.power))}",
        f"{leading}.{digits}\n{note}{leading} + {mantissa}/2{_superscript(fmt.mantissa_bits)}"
        f" = {_spell(result.significand)}",
    )


def _product(result):
    if result.kind in ("infinity", "NaN"):
        return " ".join(_decimal(result.stored))
    sign = "−1" if result.fields[0] else "+1"
    power = f"2{_superscript(_spell(result.power))}"
    product = f"{sign} × {power} × {_spell(result.significand)}  {'  '.join(_decimal(result.stored))}"
    if len(product) > _WIDEST:
        product = f"{sign} × {power} × {_spell(result.significand, 9)}  ≈  {_spell(result.stored, 9)}"
    return product


def _number(text):
    """The number that a text spells: a Fraction, or a float for π, infinity and NaN."""
    plain = text.strip().replace("−", "-").replace("∞", "inf")
    if plain.lower() in ("π", "pi"):
        return float(np.pi)
    try:
        number = float(plain)
        return Fraction(plain) if number and np.isfinite(number) else number
    except ValueError:
        pass
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"value must be a number such as −118.625, 1e-3, 1/3, π, inf or nan, got {text!r}") from None


def _parse(text, base, fmt):
    """A code out of a hex word or a binary string."""
    digits = "".join(text.split()).lower().replace("_", "").removeprefix("0x" if base == 16 else "0b")
    if base == 2:
        right, allowed = len(digits) == fmt.bits, f"binary must be {fmt.bits} digits 0 or 1"
    else:
        most = -(-fmt.bits // 4)
        right, allowed = 0 < len(digits) <= most, f"hex must be 1 to {most} digits 0–9 or A–F"
    if not right or not set(digits) <= set("0123456789abcdef"[:base]):
        raise ValueError(f"{allowed} for {fmt.name}, got {text!r} ({len(digits)} digits)")
    code = int(digits, base)
    if code >= 2**fmt.bits:
        raise ValueError(f"hex must be at most {_hex(2**fmt.bits - 1, fmt)} for {fmt.name}, got {text!r}")
    return code


def _error(stored, wanted):
    """stored − wanted, exactly where ``wanted`` is a Fraction."""
    if stored == wanted or (np.isnan(stored) and np.isnan(float(wanted))):
        return 0.0
    exact = isinstance(wanted, Fraction) and np.isfinite(stored)
    return float(Fraction(stored) - wanted if exact else stored - float(wanted))


def _of_rank(rank, fmt):
    """The number at a place in the order of all numbers; infinite beyond the largest."""
    if abs(rank) > fmt.max_code:
        return float(np.copysign(np.inf, rank))
    return float(np.copysign(decode(abs(rank), fmt), rank))


def _hex(code, fmt):
    return f"0x{code:0{-(-fmt.bits // 4)}X}"


def _binary(code, fmt):
    digits = f"{code:0{fmt.bits}b}"
    return f"{digits[0]} {digits[1:1 + fmt.exponent_bits]} {digits[1 + fmt.exponent_bits:]}"


def _spell(number, digits=17):
    """A number as short as it can be read back, with a true minus."""
    number = float(number)
    if np.isnan(number) or np.isinf(number):
        return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(number)]
    text = repr(number) if digits == 17 else f"{number:.{digits}g}"
    return text.removesuffix(".0").replace("-", "−")


def _gap(distance):
    return _spell(distance) if len(_spell(distance)) <= _ROOM else f"{distance:.4g}"


def _log2(number):
    """Of its magnitude; NaN where there is none."""
    return float(np.log2(abs(number))) if 0 < abs(number) < np.inf else np.nan


def _decimal(x):
    """"=" and all digits of ``x``, or "≈" and as many as tell it from its neighbours in FP64."""
    exact = Decimal(x)
    if not np.isfinite(x) or len(exact.as_tuple().digits) > 30 or not 1e-12 < abs(x) < 1e16:
        return ("=" if x == 0 or not np.isfinite(x) or Decimal(repr(x)) == exact else "≈"), _spell(x)
    return "=", f"{exact:f}".replace("-", "−")


def _superscript(text):
    return str(text).translate(str.maketrans("0123456789−-+", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻⁺"))
