"""A caller that hands a loss images of another range is seen.

In a step everything is traced, and a range cannot be looked at
(`losses/inputs.py`). What holds each caller to [0, 1] are the figures on file:
here each scales its images to [-1, 1], and they are off by more than a hundred
times the 1e-5 that they are held to.
"""

import types

import numpy as np
import pytest

from tests.golden import make_metrics
from tests.train.test_golden import GOLDEN
from vqrae_jax.ops import images as image_ops
from vqrae_jax.train import gan, step

RUN = 'encoder frozen, LPIPS and GAN'
# What reads the images that a caller makes, in the first step.
CALLERS = {
  'targets': (step, ('loss/l2', 'loss/lpips')),
  'what the discriminator sees': (
    gan,
    ('loss/discriminator', 'logits/real', 'logits/fake'),
  ),
}


@pytest.mark.parametrize('caller', CALLERS)
def test_a_wrong_range_moves_the_figures_on_file(caller, monkeypatch):
  module, figures = CALLERS[caller]
  wrong = vars(image_ops) | {'to_unit': lambda x: 2 * image_ops.to_unit(x) - 1}
  monkeypatch.setattr(module, 'image_ops', types.SimpleNamespace(**wrong))
  monkeypatch.setattr(make_metrics, 'STEPS', 1)
  found = make_metrics.figures(RUN)
  for name in figures:
    off = abs(found[name][0] / GOLDEN[RUN][name][0] - 1)
    assert off > 1e-3, (name, off)
  # What another caller made is what it was.
  same = {n for _, names in CALLERS.values() for n in names} - set(figures)
  if caller != 'targets':  # all figures follow from the targets
    for name in same:
      np.testing.assert_allclose(
        found[name][0], GOLDEN[RUN][name][0], rtol=1e-5
      )
