"""Noise on latents: whose draws they are, and how they are spread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import sharding
from vqrae_jax.ops import augment

KEY = jax.random.key(3)
SHAPE = (4, 5, 8)


def test_a_rows_draws_are_its_own():
  """Neither the batch's other rows nor devices change them."""
  whole = augment.draw_noise(KEY, jnp.arange(8), SHAPE)
  assert whole.shape == (8, *SHAPE) and whole.dtype == jnp.float32
  for rows in ([5], [7, 0, 3], [1, 3, 5, 7]):
    part = augment.draw_noise(KEY, jnp.array(rows), SHAPE)
    np.testing.assert_array_equal(part, whole[jnp.array(rows)])
  assert len({row.tobytes() for row in np.asarray(whole)}) == 8
  assert (
    augment.draw_noise(jax.random.key(4), jnp.arange(8), SHAPE) != whole
  ).all()
  mesh = sharding.make_mesh()
  spread = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
  draw = jax.jit(functools.partial(augment.draw_noise, shape=SHAPE))
  sharded = draw(KEY, spread)
  assert len(sharded.sharding.device_set) == 8
  np.testing.assert_array_equal(sharded, draw(KEY, jnp.arange(8)))


def test_levels_are_uniform_and_values_normal():
  """Over 4000 samples: a sample's spread is its U, whose moments are known."""
  x = np.asarray(augment.draw_noise(KEY, jnp.arange(4000), (16, 16, 4)))
  level = x.std((1, 2, 3))  # of 1024 values: U to about 2 %
  assert level.max() < 1.08
  np.testing.assert_allclose(level.mean(), 0.5, atol=0.02)
  np.testing.assert_allclose((level**2).mean(), 1 / 3, atol=0.02)
  share = np.histogram(level, bins=4, range=(0, 1))[0] / 4000
  np.testing.assert_allclose(share, 0.25, atol=0.03)
  unit = x / level[:, None, None, None]
  np.testing.assert_allclose(unit.mean(), 0, atol=0.01)
  np.testing.assert_allclose((unit**4).mean(), 3, atol=0.05)
