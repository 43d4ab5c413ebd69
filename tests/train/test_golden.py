"""Three steps give the figures that are on file."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.golden import make_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
PINNED = re.search('(?m)^jax==(.*)$', (ROOT / 'constraints.txt').read_text())[1]
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


@pytest.mark.skipif(jax.__version__ != PINNED, reason=f'costs are of {PINNED}')
@pytest.mark.parametrize('run', make_metrics.RUNS)
def test_a_step_costs_no_more(run):
  """In either direction, so that what was gained is kept too."""
  want = json.loads(make_metrics.COSTS.read_text())[run]
  found = make_metrics.costs(run)
  assert found['flops'] == pytest.approx(want['flops'], rel=0.05)
  assert found['temporaries'] == pytest.approx(want['temporaries'], rel=0.05)
