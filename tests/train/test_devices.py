"""One device and eight fake ones, in every layout: the same losses and indices.

Equal parameters and equal images. Losses of three steps in f32 agree to 1e-5;
indices are the same wherever the best code beats the second by more than 1e-4
of the score scale, and those that differ are counted and printed. In bf16 the
loss agrees to 1e-2, and the share of differing indices is printed.
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
from vqrae_jax.train import step as step_lib

KINDS = ('vq-ema', 'simvq-cosine', 'fsq-cosmos')
LAYOUTS = {'dp': 1, 'fsdp': 1, 'fsdp+tp': 2}
STEPS = 3


def result(plan, state, frozen, mesh, steps):
  """(losses f32[steps terms], indices at step 0) of a state laid on `mesh`."""
  state, frozen = jax.device_put(
    (state, frozen), sharding.shardings_for((state, frozen), mesh)
  )
  encode = jax.jit(
    functools.partial(plan.tokenizer.apply, method='encode_to_indices')
  )
  rows = []
  with jax.set_mesh(mesh):
    images = [
      sharding.place_batch({'x': tiny.images(8, seed=i)}, mesh)['x']
      for i in range(steps)
    ]
    indices = encode(state_lib.variables_of(state, frozen), images[0])
    step = pieces.jitted_on(plan, state, mesh)
    for batch in images:
      state, metrics = step(state, frozen, batch)
      rows.append([float(metrics[f'loss/{n}']) for n in plan.weights])
  return np.array(rows), np.asarray(indices).ravel()


def bf16_result(plan, state, frozen, mesh):
  """(losses, indices) of one forward; the unused backward is not compiled."""
  places = sharding.shardings_for((state, frozen), mesh)
  state, frozen = jax.device_put((state, frozen), places)

  def forward(state, frozen, images):
    metrics = step_lib.loss_gradients(plan, state, frozen, images).metrics
    variables = state_lib.variables_of(state, frozen)
    indices = plan.tokenizer.apply(
      variables, images, method='encode_to_indices'
    )
    return metrics, indices

  with jax.set_mesh(mesh):
    images = sharding.place_batch({'x': tiny.images(8)}, mesh)['x']
    run = jax.jit(forward)
    metrics, indices = run(state, frozen, images)
  losses = [float(metrics[f'loss/{n}']) for n in plan.weights]
  return np.array(losses), np.asarray(indices).ravel()


@functools.cache
def begun(kind):
  """(plan, state, frozen) at step 0, on the host."""
  plan = pieces.planned(kind, ema=0.0)
  return plan, *jax.device_get(pieces.started(plan, larger=pieces.APART))


@functools.cache
def alone(kind):
  """(losses, indices, margins, their scale) on one device."""
  plan, state, frozen = begun(kind)
  one = result(plan, state, frozen, pieces.one_device(), STEPS)
  variables = jax.tree.map(jnp.asarray, state_lib.variables_of(state, frozen))
  return *one, *margins(plan.tokenizer, variables, tiny.images(8))


def say(capsys, words):
  with capsys.disabled():
    print(f'\n{words}')


def cases():
  """Every layout for EMA-VQ, the fullest one for each; the rest is slow."""
  for kind, layout in itertools.product(KINDS, LAYOUTS):
    rare = kind != 'vq-ema' and layout != 'fsdp+tp'
    yield pytest.param(kind, layout, marks=[pytest.mark.slow] if rare else [])


@pytest.mark.parametrize('kind, layout', cases())
def test_eight_devices_are_one(kind, layout, capsys):
  losses, indices, margin, scale = alone(kind)
  mesh = sharding.make_mesh(layout, tensor=LAYOUTS[layout])
  found, there = result(*begun(kind), mesh, STEPS)
  clear, moved = margin > 1e-4 * scale, there != indices
  off = np.abs(found / losses - 1).max()
  say(
    capsys,
    f'{kind} {layout}: losses within {off:.1e}; {(~clear).sum()} of '
    f'{len(clear)} indices within the margin, {moved.sum()} differ',
  )
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  assert clear.mean() > 0.9, 'the test has too few clear choices'
  assert not (moved & clear).any()


@pytest.mark.parametrize('kind', KINDS)
def test_bf16_on_eight_devices(kind, capsys):
  _, state, frozen = begun(kind)
  plan = pieces.planned(kind, model=tiny.model(kind, dtype='bfloat16'), ema=0.0)
  one = pieces.one_device()
  losses, indices = bf16_result(plan, state, frozen, one)
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  found, there = bf16_result(plan, state, frozen, mesh)
  off = np.abs(found / losses - 1).max()
  share = (there != indices).mean()
  say(
    capsys,
    f'{kind} bf16: loss within {off:.1e}, {share:.1%} of {len(there)} indices '
    'differ',
  )
  np.testing.assert_allclose(found, losses, rtol=1e-2)
