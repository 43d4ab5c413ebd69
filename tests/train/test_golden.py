"""Three steps give the figures that are on file."""

import json

import numpy as np
import pytest

from tests.golden import make_metrics

GOLDEN = json.loads(make_metrics.PATH.read_text())
# A difference of weights: of values near 1 after steps of 1e-2, so that an
# error of 1e-7 in them is 1e-5 of it.
LOOSER = {'ema_gap': 5e-5}


@pytest.mark.parametrize('run', make_metrics.RUNS)
def test_figures(run):
  found = make_metrics.figures(run)
  assert found.keys() == GOLDEN[run].keys()
  for name, want in GOLDEN[run].items():
    np.testing.assert_allclose(
      found[name], want, rtol=LOOSER.get(name, 1e-5), err_msg=name
    )
