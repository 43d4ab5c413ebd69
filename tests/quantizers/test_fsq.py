"""FSQ against the papers' formulas, and its index order, which is a format."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import quantizers
from vqrae_jax.quantizers import fsq as fsq_lib


def fsq(levels, convention, **fields):
  section = dict(
    name='fsq', levels=tuple(levels), convention=convention, projection=False
  )
  return quantizers.build(section | fields, len(levels), 'float32')


@pytest.mark.parametrize('levels', ((2, 3, 9), (8, 5, 4), (16, 255, 900)))
@pytest.mark.parametrize('convention', ('centered', 'cosmos'))
def test_indices_are_their_codes_and_latents_reach_all_values(
  levels, convention
):
  quantizer = fsq(levels, convention)
  indices = jnp.arange(min(math.prod(levels), 4096))
  codes = quantizer.apply({}, indices, method='indices_to_codes')
  back = quantizer.apply({}, codes, method='codes_to_indices')
  np.testing.assert_array_equal(back, indices)
  assert len(np.unique(codes, axis=0)) == len(indices)
  # Extreme latents reach every outer value and no further.
  line = jnp.append(jnp.linspace(-4, 4, 40001), jnp.array([-30, 30]))
  out = quantizer.apply({}, line[:, None] + jnp.zeros(3))
  assert [len(np.unique(channel)) for channel in out.codes.T] == [*levels]
  assert out.indices.min() >= 0
  assert out.indices.max() < quantizer.codebook_size


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
  # The first digit is least significant.
  strides = np.cumprod([1, *levels[:-1]])
  index = ((rounded + levels // 2) * strides).sum(-1)
  codes = rounded / (levels // 2)
  equal_off_ties(fsq(levels.tolist(), 'cosmos'), z, x, index, codes)


@pytest.mark.parametrize(
  'bound, levels',
  [
    ('tanh', (8, 5, 4)),
    # The PyTorch project's, of latents in units of levels.
    ('clip', (8, 5, 4)),
    ('clip', (7, 5, 5, 5)),
    ('clip', (3, 900, 2)),
  ],
)
def test_centered_is_the_original_specification(bound, levels):
  spread = 2 if bound == 'tanh' else max(levels) / 3
  z = np.random.default_rng(0).normal(0, spread, (2000, len(levels)))
  half = (np.array(levels) - 1) / 2
  x = half + (np.tanh(z) * half if bound == 'tanh' else z)
  digits = np.clip(np.round(x), 0, 2 * half)
  # The last digit is least significant, as in meshgrid "ij".
  places = [math.prod(levels[i + 1 :]) for i in range(len(levels))]
  quantizer = fsq(levels, 'centered', bound=bound)
  equal_off_ties(quantizer, z, x, (digits * places).sum(-1), digits - half)
  # Both ends of every channel are reached, so the clip is at work.
  np.testing.assert_array_equal(
    [digits.min(0), digits.max(0)], [0 * half, 2 * half]
  )


def test_centered_has_no_epsilon_to_outgrow():
  assert fsq((2048, 4), 'centered').codebook_size == 8192


def test_noise_dropout_moves_what_the_decoder_reads():
  """A share of the values, by at most a half, inside [-1, 1], by the sample's
  key; codes and indices stay."""
  quantizer = fsq(
    (8, 5, 4), 'cosmos', preserve_symmetry=True, noise_dropout=0.3
  )
  z = jax.random.normal(jax.random.key(0), (2, 4000, 3))
  keys = jax.random.split(jax.random.key(1), 2)
  run = jax.jit(
    lambda z, keys: quantizer.apply({}, z, train=True, random={'samples': keys})
  )
  out, still = run(z, keys), quantizer.apply({}, z)
  np.testing.assert_array_equal(out.codes, still.codes)
  np.testing.assert_array_equal(out.indices, still.indices)
  np.testing.assert_array_equal(still.z_q, still.codes)
  noise = np.asarray(out.z_q - out.codes)
  inner = np.abs(out.codes) < 0.4  # nothing is clipped
  drawn = noise[inner] != 0
  assert abs(drawn.mean() - 0.3) < 0.02
  assert abs(noise[inner][drawn].mean()) < 0.02
  assert abs(noise[inner][drawn].std() - 12**-0.5) < 0.01
  assert np.abs(noise).max() <= 0.5 and np.abs(out.z_q).max() <= 1
  swapped = run(z[::-1], keys[::-1])
  np.testing.assert_array_equal(swapped.z_q[::-1], out.z_q)
  gradient = jax.grad(lambda z: run(z, keys).z_q[inner].sum())(z)
  want = (1 - np.tanh(z) ** 2) * inner
  np.testing.assert_allclose(gradient, want, atol=1e-5)


FORMS = {
  'centered': dict(convention='centered'),
  'clip': dict(convention='centered', bound='clip'),
  'cosmos': dict(convention='cosmos'),
  'symmetric': dict(convention='cosmos', preserve_symmetry=True),
}


def entropy_by_hand(z, levels, form, temperature, gamma, groups):
  """f64, every code of a group written out."""
  levels, total = np.array(levels), 0.0
  if form == 'clip':
    x = z + (levels - 1) / 2
  elif form == 'cosmos':
    half, even = (levels - 1) * (1 + 1e-3) / 2, (levels % 2 == 0) / 2
    x = np.tanh(z + np.arctanh(even / half)) * half - even + levels // 2
  else:
    x = (np.tanh(z) + 1) * (levels - 1) / 2
  for group in groups:
    codes = np.stack(np.meshgrid(*(np.arange(levels[c]) for c in group)), -1)
    codes = codes.reshape(-1, len(group))
    scores = -((x[:, None, group] - codes) ** 2).sum(-1) / temperature
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    own = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    total += own.mean() + gamma * mean @ np.log(np.maximum(mean, 1e-300))
  return total


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
  'together, groups', [(2**16, [[0, 1, 2]]), (20, [[0, 1], [2]])]
)
def test_the_entropy_is_that_of_whole_codes(
  form, together, groups, monkeypatch
):
  """In steps of a level, whatever the convention's units; its gradient too."""
  monkeypatch.setattr(fsq_lib, 'TOGETHER', together)
  levels, fields = (3, 4, 2), dict(entropy_temperature=0.7, entropy_gamma=0.3)
  quantizer = fsq(levels, **FORMS[form], **fields)

  @jax.jit
  @jax.value_and_grad
  def run(z):
    return quantizer.apply({}, z, losses=('entropy',)).losses['entropy']

  z = np.random.default_rng(0).normal(size=(20, 3))
  value, gradient = run(jnp.asarray(z, jnp.float32))

  def by_hand(z):
    return entropy_by_hand(z, levels, form, 0.7, 0.3, groups)

  np.testing.assert_allclose(value, by_hand(z), rtol=1e-5)
  way = np.random.default_rng(1).normal(size=z.shape)
  slope = (by_hand(z + 1e-5 * way) - by_hand(z - 1e-5 * way)) / 2e-5
  np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-5)


def test_the_entropy_of_thousands_of_levels():
  """f32 tells their digits apart to 1e-4, and no more is lost."""
  quantizer = fsq((4096,), 'centered', bound='clip', entropy_gamma=0.0)
  z = np.random.default_rng(0).uniform(-2000, 2000, (20, 1)).astype('f4')
  found = quantizer.apply({}, jnp.asarray(z), losses=('entropy',)).losses
  want = entropy_by_hand(z.astype('f8'), (4096,), 'clip', 0.1, 0.0, [[0]])
  np.testing.assert_allclose(found['entropy'], want, rtol=1e-3)
