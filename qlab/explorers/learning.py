"""Lesson 07: a rotation while it is being learned."""

import math
from types import SimpleNamespace

import numpy as np

from qlab.explorers.networks import watch
from qlab.live import BLACK, BLUE, GREY, ORANGE, Explorer, new_figure

_LEAST_ORTHOGONALITY = 1e-8


class watch_rotation(watch):
    """Watch `qlab.spinquant.learn_rotation` while it runs, with a Stop button; otherwise as `watch`.

    Left, the proxy of each step's vectors, and what ``measure`` finds on other vectors. Right, how far the matrix is
    from orthogonal, max |RᵀR − I|, on a logarithmic axis.

    Parameters
    ----------
    steps : iterator of RotationStep
        From `qlab.spinquant.learn_rotation`.
    measure : function
        ``measure(rotation) -> float``, on held-out vectors; ``rotation`` is None before the first step.
    every : int, ≥ 1
        Steps between two measurements and two pictures.

    Raises
    ------
    ValueError
        As `watch`.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", section 3.2.

    Examples
    --------
    >>> import torch
    >>> from qlab.spinquant import ProxyInputs, learn_rotation, proxy_loss
    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1.0, 1.0, 1.0])
    >>> inputs, start = ProxyInputs(x, torch.ones(200)), torch.eye(4)
    >>> run = watch_rotation(learn_rotation(inputs, start=start, steps=30),
    ...                      lambda r: proxy_loss(start if r is None else r, inputs).item())
    >>> for step in run:
    ...     pass
    >>> run.history[0]["held_out"] > run.explorer.readout["held_out"]
    True
    """

    def __init__(self, steps, measure, every=10):
        self._rotation = None
        super().__init__(steps, lambda: {"held_out": float(measure(self._rotation))}, every)

    def _of_step(self, step):
        self._rotation = step.rotation
        return super()._of_step(step) | {"orthogonality": step.orthogonality}

    def _new_explorer(self, controls, arrange):
        figure, artists = _figure(self._total, self.history[0]["held_out"])

        def read(history):
            found = {name: value for record in history for name, value in record.items()}
            return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}

        return Explorer(
            figure, controls, lambda step: [record for record in self.history if record["step"] <= step],
            lambda history: _draw(artists, history), read, arrange=arrange, title="A rotation is learned",
            description="Left, the proxy of each step and of held-out vectors. Right, the largest entry of RᵀR − I, on "
            "a logarithmic axis.",
        )


def _figure(total, start):
    with new_figure(height=400) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
        most = 1.25 * start if math.isfinite(start) and start > 0 else 1
        left.set(title="error that the proxy expects", xlabel="step", xlim=(0, total), ylim=(0, most))
        loss = left.plot([], [], color=GREY, lw=1.2, animated=True, label="these vectors")[0]
        held_out = left.plot([], [], "o-", color=BLUE, animated=True, label="held-out vectors")[0]
        left.axhline(start, color=ORANGE, ls="--", label="start")
        left.legend(loc="lower left")
        right.set(title="largest entry of |RᵀR − I|", xlabel="step", xlim=(0, total), yscale="log",
                  ylim=(_LEAST_ORTHOGONALITY, 1e-2))
        orthogonality = right.plot([], [], color=BLACK, animated=True)[0]
    return figure, SimpleNamespace(loss=loss, held_out=held_out, orthogonality=orthogonality)


def _draw(artists, history):
    for name in ("loss", "held_out", "orthogonality"):
        points = np.array([(record["step"], record[name]) for record in history if name in record]).reshape(-1, 2)
        y = np.maximum(points[:, 1], _LEAST_ORTHOGONALITY)
        getattr(artists, name).set_data(points[:, 0], y)
