"""Checks for the learner's own functions.

Each ``check_…(function)`` runs the function on a tiny case first and says what was expected and what came; then on
further ones, real data among them. A wrong answer that a known misconception would give is told which one it is. A
function that still returns None (or ``...``, or a tuple with one of them) is not answered yet, which is no error: a
notebook runs to its end with open exercises. `summary` lists which checks have passed.

Integers are compared exactly. Real data has no value so near a tie that float32 and float64 round it apart.
"""

from qlab.exercises.activations import check_decompose, check_token_scales
from qlab.exercises.affine import check_absmax, check_quantize, check_zero_point
from qlab.exercises.calibration import check_best_range, check_clipping_error, check_percentile_range
from qlab.exercises.checking import summary
from qlab.exercises.floats import check_decode, check_encode, check_spacing
from qlab.exercises.language_models import check_cayley, check_fold, check_hadamard, check_smoothing_scales
from qlab.exercises.networks import check_fold_batch_norm, check_multiplier, check_straight_through

__all__ = [
    "check_absmax", "check_best_range", "check_cayley", "check_clipping_error", "check_decode", "check_decompose",
    "check_encode", "check_fold", "check_fold_batch_norm", "check_hadamard", "check_multiplier",
    "check_percentile_range", "check_quantize", "check_smoothing_scales", "check_spacing", "check_straight_through",
    "check_token_scales", "check_zero_point", "summary",
]
