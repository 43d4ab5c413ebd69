"""One device and eight fake ones, in every layout: the same losses and indices.

Equal parameters and equal images. Losses of three steps in f32 agree to 1e-5;
indices are the same wherever the best code beats the second by more than 1e-4
of the score scale. In bf16 the loss agrees to 1e-2.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_stability import margins
from tests.train import pieces
from vqrae_jax import sharding
from vqrae_jax.train import state as state_lib

KINDS = ('vq-ema', 'simvq-cosine', 'fsq-cosmos')
LAYOUTS = {'dp': 1, 'fsdp': 1, 'fsdp+tp': 2}
STEPS = 3


@functools.cache
def begun(kind, dtype='float32'):
  """(plan, state, frozen) at step 0, on the host."""
  plan = pieces.planned(kind, model=tiny.model(kind, dtype=dtype), ema=0.0)
  return plan, *jax.device_get(pieces.started(plan, larger=pieces.APART))


def result(plan, state, frozen, mesh, steps=STEPS):
  """(losses f32[steps terms], indices at step 0) of a state laid on `mesh`."""
  state, frozen = jax.device_put(
    (state, frozen), sharding.shardings_for((state, frozen), mesh)
  )
  encode = jax.jit(
    functools.partial(plan.spec.tokenizer.apply, method='encode_to_indices')
  )
  rows = []
  with jax.set_mesh(mesh):
    batches = [
      sharding.place_batch({'x': tiny.images(8, seed=i)}, mesh)['x']
      for i in range(steps)
    ]
    # Read at once: two programs that run side by side on fake devices can each
    # wait for threads that the other holds.
    indices = np.asarray(
      encode(state_lib.variables_of(state, frozen), batches[0])
    )
    step = pieces.jitted_on(plan, state, mesh)
    for batch in batches:
      state, metrics = step(state, frozen, batch)
      rows.append([float(metrics[f'loss/{n}']) for n in plan.spec.losses])
  return np.array(rows), indices.ravel()


@functools.cache
def alone(kind):
  """(losses, indices, margins, their scale) on one device."""
  plan, state, frozen = begun(kind)
  one = result(plan, state, frozen, pieces.one_device())
  variables = jax.tree.map(jnp.asarray, state_lib.variables_of(state, frozen))
  return *one, *margins(plan.spec.tokenizer, variables, tiny.images(8))


def cases():
  """Every layout once over the kinds; the rest is slow."""
  fast = {('vq-ema', 'fsdp'), ('simvq-cosine', 'fsdp+tp'), ('fsq-cosmos', 'dp')}
  for case in itertools.product(KINDS, LAYOUTS):
    marks = [] if case in fast else [pytest.mark.slow]
    yield pytest.param(*case, marks=marks)


@pytest.mark.parametrize('kind, layout', cases())
def test_eight_devices_are_one(kind, layout):
  losses, indices, margin, scale = alone(kind)
  mesh = sharding.make_mesh(layout, tensor=LAYOUTS[layout])
  found, there = result(*begun(kind), mesh)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  clear, moved = margin > 1e-4 * scale, there != indices
  assert clear.mean() > 0.9, 'the test has too few clear choices'
  assert not (moved & clear).any()


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_bf16_on_eight_devices(kind):
  plan, state, frozen = begun(kind, 'bfloat16')
  losses, _ = result(plan, state, frozen, pieces.one_device(), 1)
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  found, _ = result(plan, state, frozen, mesh, 1)
  np.testing.assert_allclose(found, losses, rtol=1e-2)
