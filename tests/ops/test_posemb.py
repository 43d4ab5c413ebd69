"""Rotations of queries and keys, against complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.ops import posemb

HEAD = 16


def drawn(tokens, seed=0):
  shape = (1, tokens, 3, HEAD)
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def turned(x, y, x_at):
  """x [… HEAD] at the coordinates (y, x_at), in complex f64."""
  omega = 100.0 ** (-np.arange(HEAD // 4) / (HEAD // 4))
  angles = 2 * np.pi * np.concatenate([y * omega, x_at * omega])
  z = (x[..., : HEAD // 2] + 1j * x[..., HEAD // 2 :]) * np.exp(1j * angles)
  return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize('grid', ((4, 4), (2, 6), (1, 1)))
def test_every_patch_turns_by_its_centre(grid):
  rows, cols = grid
  x = drawn(2 + rows * cols)
  found = posemb.rotate(x, posemb.rope2d(HEAD, grid, prefix=2))
  np.testing.assert_array_equal(found[:, :2], x[:, :2])
  for i in range(rows * cols):
    centre = (2 * (i // cols) + 1) / rows - 1, (2 * (i % cols) + 1) / cols - 1
    want = turned(np.asarray(x[:, 2 + i]), *centre)
    np.testing.assert_allclose(found[:, 2 + i], want, atol=2e-6)


def test_scores_depend_on_offsets_alone():
  """One query and one key everywhere: equal scores along each diagonal."""
  q, k = drawn(1), drawn(1, seed=1)
  rotation = posemb.rope2d(HEAD, (1, 6))
  q, k = (
    np.asarray(posemb.rotate(jnp.repeat(x, 6, 1), rotation))[0, :, 0]
    for x in (q, k)
  )
  scores = q @ k.T
  np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
  assert scores.std() > 0.1


def test_bf16_is_rounded_once():
  """Angles and products are f32, whatever the heads' type."""
  x = drawn(16).astype(jnp.bfloat16)
  rotation = posemb.rope2d(HEAD, (4, 4))
  found = posemb.rotate(x, rotation)
  want = posemb.rotate(x.astype(jnp.float32), rotation).astype(jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, want)
