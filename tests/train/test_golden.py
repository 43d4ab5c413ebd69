"""Three steps of every quantizer give the figures that are on file."""

import json

import numpy as np
import pytest

from tests import tiny
from tests.golden import make_metrics

GOLDEN = json.loads(make_metrics.PATH.read_text())
LOOSER = {
  # A difference of weights: of values near 1 after steps of 1e-2, so that an
  # error of 1e-7 in them is 1e-5 of it.
  'ema_gap': 5e-5,
}


def test_every_quantizer_is_on_file():
  assert list(GOLDEN) == list(tiny.LOSSES)
  assert make_metrics.PATH.read_text() == make_metrics.text(GOLDEN)


@pytest.mark.parametrize('kind', tiny.LOSSES)
def test_figures(kind):
  found = make_metrics.figures(kind)
  assert found.keys() == GOLDEN[kind].keys()
  for name, want in GOLDEN[kind].items():
    rtol = LOOSER.get(name, 1e-5)
    np.testing.assert_allclose(found[name], want, rtol=rtol, err_msg=name)
