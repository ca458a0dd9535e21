"""What ships for lesson 06: the rows' reach that of the whole matrices."""

import numpy as np
import pytest
import torch

from qlab import samples, smollm
from qlab.smoothquant import smoothing_scales
from qlab.studies import smoothquant as study


def test_a_token_in_float():
    x = torch.arange(6.0).view(1, 3, 2)
    assert study.but_the_first(lambda part: -part, x).tolist() == [[[0, 1], [-2, -3], [-4, -5]]]


@pytest.fixture(scope="module")
def model():
    return smollm.load(progress=False)


@pytest.mark.parametrize("place", list(samples.products()))
def test_rows_reach_as_far_as_those_of_the_whole_matrix(model, place):
    (layer, site), x = place, torch.from_numpy(samples.products()[place][0])
    columns, values, at = map(torch.from_numpy, samples.largest_weights()[place])
    weights = [getattr(model.blocks[layer], name).weight.abs() for name in smollm.READERS[site]]
    torch.testing.assert_close(columns, torch.cat(weights).amax(0), rtol=1e-3, atol=0)
    for alpha in np.linspace(0, 1, 21):
        s = smoothing_scales(x.abs().amax(0), columns, alpha)
        for scale in (s, 1 / s, torch.ones_like(s)):
            torch.testing.assert_close((values * scale[at]).amax(1), (weights[0] * scale).amax(1), rtol=2e-3, atol=0)
