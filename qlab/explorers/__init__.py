"""The live figures of the lessons. Each function takes data and returns a `qlab.live.Explorer`."""

from qlab.explorers.ranges import clipping, drift

__all__ = ["clipping", "drift"]
