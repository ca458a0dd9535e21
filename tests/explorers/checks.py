"""What the tests of all live figures share: a hand on each control, and what must hold wherever it goes."""

import asyncio
import contextlib
import html
import itertools
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import pytest

from qlab.picture import MOST_BYTES, Pixels

TYPED = ["1.5 0.7", "-7.1, 2.2, 0.4", "[0.1 0.2 0.35]", "5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8", "1e3 -17"]


DRAW = Pixels.png


def made(maker):
    """A figure with its pixels, even where others have none: its axes stay where the first drawing puts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pixels, "png", DRAW)
        return maker()


@contextlib.contextmanager
def without_pixels():
    """Inside, figures have numbers and artists, but no pixels, which take most of the time of a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pixels, "png", lambda pixels: b"")
        yield


def figures(makers, start):
    """``shared(name)``: one figure of each kind for a whole module. ``put(name, setting)``: the same, moved there."""
    @lru_cache
    def shared(name):
        return made(makers[name])

    def put(name, setting):
        explorer = shared(name)
        explorer.set(**start[name] | setting)
        return explorer

    return shared, put


def between(low, high, places=5):
    """Both ends, and a place in each of some equal parts of what lies between."""
    parts = (np.arange(places) + np.random.default_rng(0).random(places)) / places
    return [low, *(low + (high - low) * parts).tolist(), high]


def sweep(control):
    """The values that a hand can give to a control, from one end to the other: all, or some if they are many."""
    if isinstance(control, widgets.FloatLogSlider):
        return [control.base ** place for place in between(control.min, control.max)]
    if isinstance(control, widgets.IntSlider):
        few = control.max - control.min < 9
        places = range(control.min, control.max + 1) if few else {*map(round, between(control.min, control.max))}
        return sorted(places)
    if isinstance(control, widgets.FloatSlider):
        return between(control.min, control.max)
    if isinstance(control, widgets.Text):
        return TYPED
    if isinstance(control, widgets.Checkbox):
        return [False, True]
    return [option[1] if isinstance(option, tuple) else option for option in control.options]


def pairwise(options):
    """Settings in which each value of each option meets each value of each other option; few, but not the fewest."""
    random = np.random.default_rng(0)
    names = list(options)
    unseen = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    while unseen:
        wanted = dict(min(unseen, key=repr))
        tries = [{name: wanted.get(name, some[random.integers(len(some))]) for name, some in options.items()}
                 for _ in range(20)]
        best = max(tries, key=lambda row: len(unseen & set(itertools.combinations(row.items(), 2))))
        unseen -= set(itertools.combinations(best.items(), 2))
        yield best


def own(tokens, channels, outputs=5, seed=0):
    """Activations and weights of one's own, channels of different sizes."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, channels)) * np.exp(random.standard_normal(channels))
    return x.astype(np.float32), random.standard_normal((outputs, channels)).astype(np.float32)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def values(explorer):
    return {name: control.value for name, control in explorer.controls.items()}


def go_to(explorer, wanted):
    if "data" in wanted:
        explorer.set(data=wanted["data"])  # may set new limits
    explorer.set(**wanted)


def texts(axes, visible=True):
    return [text.get_text().replace("−", "-") for text in axes.texts if text.get_visible() == visible]


def message(explorer):
    return "".join(child.value for child in explorer.widget.children
                   if isinstance(child, widgets.HTML) and 'role="alert"' in child.value)


def in_a_cell(run, body=lambda step: None):
    """Loop over ``run`` as a cell of a notebook does."""
    async def cell():
        async for step in run:
            body(step)
    asyncio.run(cell())


def assert_sound(explorer):
    numbers = [value for value in explorer.readout.values() if not isinstance(value, str)]
    assert numbers
    assert all(np.isfinite(numbers))
    png = explorer.png()
    assert png.startswith(b"\x89PNG")
    assert len(png) <= 1.1 * MOST_BYTES  # a palette makes small whatever is larger, all but a dense cloud
    assert not message(explorer)


def assert_words(explorer):
    assert explorer.title
    assert len(explorer.description) > 40
    assert explorer.description in html.unescape(explorer.widget.children[1].value)
    assert all(f"{key}: " in repr(explorer) for key in explorer.readout)


def picture_at(explorer, name, value):
    """The picture after a hand moved a control."""
    explorer.controls[name].value = value
    assert explorer.controls[name].value == pytest.approx(value)
    assert_sound(explorer)
    return explorer.png()


def has_no_range(explorer, name, value):
    """Whether no hand gets to this value in the figures of lessons 02 and 03: α less than a step below β."""
    if name not in ("alpha", "beta"):
        return False
    if "linked" in explorer.controls and explorer.controls["linked"].value:
        return value == 0
    alpha, beta = (value if name == end else explorer.controls[end].value for end in ("alpha", "beta"))
    return alpha > beta - explorer.controls["alpha"].step


def pictures_along(explorer, name, *, redrawn=(), skips=lambda explorer, name, value: False):
    """The pictures along a control's whole range. Axes stand still, unless the control is one of ``redrawn``."""
    background, steps = explorer._pixels.background, sweep(explorer.controls[name])
    assert len(steps) > 1
    pictures = [picture_at(explorer, name, value) for value in steps if not skips(explorer, name, value)]
    assert explorer._pixels.background is background or name in redrawn
    return pictures


def assert_same_whichever_way(travelled, fresh, refuses=lambda explorer, name, value: False):
    """``travelled`` goes here and there, where it does not refuse, and then to where ``fresh`` is."""
    for name, control in travelled.controls.items():
        for value in sweep(control)[1::3]:
            if not refuses(travelled, name, value):
                control.value = value
    go_to(travelled, values(fresh))
    assert not travelled.errors
    assert travelled.png() == fresh.png()
    assert travelled.readout == fresh.readout


def assert_compute_draws_nothing(explorer, changes):
    before = explorer.png()
    results = [explorer._compute(**values(explorer) | change) for change in changes]
    assert len({repr(explorer._read(result)) for result in results}) == len(changes) > 1
    assert not explorer.figure.stale
    assert explorer._pixels.png() == before
    explorer._pixels.background = None
    assert explorer._pixels.png() == before


def assert_refuses(explorer, name, value):
    """A value that a control does not allow is told, and changes nothing."""
    before = explorer.readout, explorer.png()
    with pytest.raises(ValueError, match=name):
        explorer.set(**{name: value})
    assert message(explorer)
    assert (explorer.readout, explorer.png()) == before
    explorer.errors.clear()


def assert_pairs_meet(settings, options):
    """Each value of each option meets each value of each other option in one of the settings."""
    seen = {pair for row in settings for pair in itertools.combinations(row.items(), 2)}
    assert len(seen) == sum(len(a) * len(b) for a, b in itertools.combinations(options.values(), 2))
