"""FSQ against the papers' formulas, and its index order, which is a format."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import quantizers

CONVENTIONS = ('centered', 'cosmos')


def fsq(levels, convention, **fields):
  section = dict(
    name='fsq', levels=tuple(levels), convention=convention, projection=False
  )
  return quantizers.build(section | fields, len(levels), 'float32')


@pytest.mark.parametrize('levels', ((2, 3, 9), (8, 5, 4), (16, 255, 900)))
@pytest.mark.parametrize('convention', CONVENTIONS)
def test_indices_are_their_codes_and_latents_reach_all_values(
  levels, convention
):
  quantizer = fsq(levels, convention)

  def both_ways(q, indices):
    codes = q.indices_to_codes(indices)
    return codes, q.codes_to_indices(codes)

  indices = jnp.arange(min(math.prod(levels), 4096))
  apply = functools.partial(quantizer.apply, {}, method=both_ways)
  codes, back = jax.jit(apply)(indices)
  np.testing.assert_array_equal(back, indices)
  assert len(np.unique(codes, axis=0)) == len(indices)
  # Extreme latents reach every outer value and no further.
  line = np.append(np.linspace(-4, 4, 40001, dtype='f4'), [-30, 30])
  out = jax.jit(lambda z: quantizer.apply({}, z))(line[:, None] + np.zeros(3))
  assert [len(np.unique(channel)) for channel in out.codes.T] == [*levels]
  assert out.indices.min() >= 0
  assert out.indices.max() < quantizer.codebook_size


@pytest.mark.parametrize(
  'convention, levels, digits, index',
  [
    # The last digit is least significant, as in meshgrid "ij".
    ('centered', (8, 5, 4), (0, 0, 1), 1),
    ('centered', (8, 5, 4), (0, 1, 0), 4),
    ('centered', (8, 5, 4), (7, 4, 3), 159),
    # The first digit is least significant.
    ('cosmos', (8, 5, 4), (1, 0, 0), 1),
    ('cosmos', (8, 5, 4), (0, 1, 0), 8),
    ('cosmos', (8, 5, 4), (0, 0, 3), 120),
  ],
)
def test_index_order(convention, levels, digits, index):
  half = np.array(levels) // 2
  codes = {
    'centered': np.array(digits) - (np.array(levels) - 1) / 2,
    'cosmos': (np.array(digits) - half) / half,
  }[convention]
  quantizer = fsq(levels, convention)
  found = quantizer.apply({}, jnp.array(codes), method='codes_to_indices')
  assert int(found) == index


def equal_off_ties(quantizer, z, unrounded, index, codes):
  """Indices and codes, where f32 and f64 must round to the same digit."""
  out = quantizer.apply({}, jnp.array(z))
  sure = (np.abs(unrounded - np.floor(unrounded) - 0.5) > 1e-4).all(-1)
  assert sure.mean() > 0.99
  np.testing.assert_array_equal(np.asarray(out.indices)[sure], index[sure])
  np.testing.assert_allclose(
    np.asarray(out.codes)[sure], codes[sure], rtol=1e-6
  )


def test_cosmos_is_the_papers_formula():
  levels = np.array([8, 8, 8, 5, 5, 5])
  z = np.random.default_rng(0).normal(0, 2, (500, 6))
  half = (levels - 1) * (1 + 1e-3) / 2
  off = np.where(levels % 2 == 0, 0.5, 0)
  x = np.tanh(z + np.arctanh(off / half)) * half - off
  rounded = np.round(x)
  strides = np.cumprod([1, *levels[:-1]])
  index = ((rounded + levels // 2) * strides).sum(-1)
  codes = rounded / (levels // 2)
  equal_off_ties(fsq(levels.tolist(), 'cosmos'), z, x, index, codes)


def test_centered_is_the_original_specification():
  levels = np.array([8, 5, 4])
  z = np.random.default_rng(0).normal(0, 2, (500, 3))
  half = (levels - 1) / 2
  x = np.tanh(z) * half + half
  digits = np.clip(np.round(x), 0, levels - 1)
  index = (digits * np.array([20, 4, 1])).sum(-1)
  equal_off_ties(fsq(levels.tolist(), 'centered'), z, x, index, digits - half)


@pytest.mark.parametrize('levels', [(8, 5, 4), (7, 5, 5, 5), (3, 900, 2)])
def test_clip_is_the_pytorch_projects_rounding(levels):
  """Of what its projection gives, in units of levels: no tanh."""
  z = np.random.default_rng(0).normal(0, max(levels) / 3, (2000, len(levels)))
  half = (np.array(levels) - 1) / 2
  digits = np.clip(np.round(z + half), 0, 2 * half)
  places = [math.prod(levels[i + 1 :]) for i in range(len(levels))]
  quantizer = fsq(levels, 'centered', bound='clip')
  codes = digits - half
  equal_off_ties(quantizer, z, z + half, (digits * places).sum(-1), codes)
  # Both ends of every channel are reached, so the clip is at work.
  np.testing.assert_array_equal([codes.min(0), codes.max(0)], [-half, half])


def test_centered_has_no_epsilon_to_outgrow():
  assert fsq((2048, 4), 'centered').codebook_size == 8192
