"""What `qlab.explorers.watch` and `qlab.explorers.watch_rotation` share: to look on while something learns."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator

import ipywidgets as widgets
import numpy as np

from qlab.affine import check_integer
from qlab.live import answered_widgets

LEAST = 1e-6  # what a logarithm can be taken of


class Watching(Iterator, AsyncIterator):
    """Hands the steps of a training on, records them and draws them, with a Stop button.

    A child makes the figure, in ``_new_explorer(controls, arrange)``, and says what is kept of a step, in
    ``_of_step(step)``.
    """

    def __init__(self, steps, measure, every=10):
        if not hasattr(steps, "__len__"):
            raise ValueError(f"steps must have a length, as those of qlab.training.train, got {type(steps).__name__}")
        self.history = []
        self._every, self._total = check_integer(every, "every", 1), len(steps)
        self._steps, self._measure = iter(steps), measure
        self._record({"step": 0, **measure()})
        self._stopping = False
        self._button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self._button.on_click(lambda _: self.stop())
        progress = widgets.IntProgress(0, min=0, max=self._total, description="step",
                                       style={"description_width": "36px"}, layout={"width": "600px"})
        self.explorer = self._new_explorer(
            {"step": progress}, arrange=lambda controls, chips: widgets.HBox([self._button, progress]))

    def stop(self):
        """End the loop after the present step."""
        self._stopping = not self._button.disabled  # a click while nothing runs must not stop the next loop

    def __len__(self):
        return self._total - self.history[-1]["step"]

    def __next__(self):
        self._button.disabled, ended = False, True
        try:
            step = None if self._stopping else next(self._steps, None)
            if step:
                self._record(self._of_step(step))
                if step.step % self._every == 0:
                    self._show()
                ended = False
        except KeyboardInterrupt:  # the kernel's
            pass
        finally:
            if ended:
                self._button.disabled, self._stopping = True, False
        if ended:
            self._show()
            raise StopIteration
        return step

    async def __anext__(self):
        try:
            with answered_widgets():
                await asyncio.sleep(0)  # here the kernel handles messages from the browser
        except asyncio.CancelledError:  # the kernel's interrupt
            self.stop()
        for step in self:
            return step
        raise StopAsyncIteration

    def _repr_mimebundle_(self, include=None, exclude=None):
        return self.explorer._repr_mimebundle_(include, exclude)

    def _record(self, record):
        check_record(record, self.history)
        self.history.append(record)

    def _show(self):
        """Measure at the present step, and draw."""
        present = {**self.history[-1], **self._measure()}
        check_record(present, self.history[:-1])
        self.history[-1] = present
        self.explorer.set(step=present["step"])


def check_record(record, before):
    """A ValueError unless a record can follow those before it."""
    step = record.get("step") if isinstance(record, dict) else None
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"history must hold dicts with an integer 'step', got {record!r}")
    if before and step <= before[-1]["step"]:
        raise ValueError(f"history must have steps that increase, got {step} after {before[-1]['step']}")
    for name, most in (("loss", math.inf), ("accuracy", 100)):
        if name in record and not (_is_finite(record[name]) and 0 <= record[name] <= most):
            limits = "at least 0 and finite" if most == math.inf else f"from 0 to {most}"
            raise ValueError(f"{name} must be {limits}, got {record[name]!r} at step {step}")
    if "ranges" not in record:
        return
    for layer, ends in record["ranges"].items():
        if len(ends) != 2 or not all(map(_is_finite, ends)) or ends[0] > ends[1]:
            raise ValueError(f"ranges must be finite, alpha at most beta, got {ends!r} for {layer!r} at step {step}")
    layers = list(record["ranges"])
    known = next((list(earlier["ranges"]) for earlier in before if "ranges" in earlier), layers)
    if layers != known:
        raise ValueError(f"ranges must be of the same layers throughout, got {layers} at step {step} after {known}")


def _is_finite(value):
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)
