"""What only lesson 08's study computes."""

import torch

from qlab.affine import fake_quantize
from qlab.outliers import params_of
from qlab.studies import gptq as study


def test_clipped_ranges():
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    found, rows = study.clipped(x), x.flatten(0, 1)
    params = params_of(rows, "token", 4)
    inside = (rows > 0.8 * rows.amin(1, keepdim=True)) & (rows < 0.8 * rows.amax(1, keepdim=True))
    steps = params.scale.view(-1, 1).expand_as(rows)
    assert ((found.flatten(0, 1) - rows).abs() <= 0.501 * study.CLIP * steps)[inside].all()
    assert found.amax() < 0.95 * fake_quantize(rows, params).amax()
