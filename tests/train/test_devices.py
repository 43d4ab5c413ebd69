"""One device and eight fake ones, in every layout: the same losses.

Equal parameters and equal images. Losses of three steps in f32 agree to 1e-5;
in bf16 the first agrees to 1e-2. (`tests/test_stability.py` compares indices.)
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_stability import LAYOUTS
from tests.train import pieces
from vqrae_jax import sharding

KINDS = ('vq-ema', 'simvq-cosine', 'fsq-cosmos')


@functools.cache
def begun(kind, dtype):
  """(plan, state, frozen) at step 0, on the host."""
  plan = pieces.planned(kind, model=tiny.model(kind, dtype=dtype), ema=0.0)
  return plan, *jax.device_get(pieces.started(plan, larger=pieces.APART))


def losses(kind, mesh, dtype='float32', steps=3):
  """f32[steps terms] of a run on `mesh`."""
  plan, *begin = begun(kind, dtype)
  state, frozen = jax.device_put(begin, sharding.shardings_for(begin, mesh))
  step = pieces.jitted_on(plan, state, mesh)
  rows = []
  with jax.set_mesh(mesh):
    for i in range(steps):
      batch = sharding.place_batch({'x': tiny.images(8, seed=i)}, mesh)['x']
      state, metrics = step(state, frozen, batch)
      rows.append([float(metrics[f'loss/{n}']) for n in plan.spec.losses])
  return np.array(rows)


@functools.cache
def alone(kind):
  return losses(kind, pieces.one_device())


def cases():
  """Both layouts that split leaves; the rest is slow."""
  fast = {('vq-ema', 'fsdp'), ('simvq-cosine', 'fsdp+tp')}
  for case in itertools.product(KINDS, LAYOUTS):
    marks = [] if case in fast else [pytest.mark.slow]
    yield pytest.param(*case, marks=marks)


@pytest.mark.parametrize('kind, layout', cases())
def test_eight_devices_are_one(kind, layout):
  mesh = sharding.make_mesh(layout, tensor=LAYOUTS[layout])
  np.testing.assert_allclose(losses(kind, mesh), alone(kind), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_bf16_on_eight_devices(kind):
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  one, eight = (
    losses(kind, mesh, 'bfloat16', 1) for mesh in (pieces.one_device(), mesh)
  )
  np.testing.assert_allclose(eight, one, rtol=1e-2)
