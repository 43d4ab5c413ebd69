"""Normalized latents: the arithmetic, the files of statistics, the errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax.errors import UserError
from vqrae_jax.models.latents import leaves_of
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.specs import LatentsSpec

NORMS = ('channel', 'position')
CHANNEL, POSITION = LatentsSpec('channel'), LatentsSpec('position', (4, 5))


reconstruct = jax.jit(vqrae_jax.reconstruct, static_argnums=0)


@pytest.mark.parametrize('norm', NORMS)
def test_only_the_quantizer_sees_normalised_latents(norm):
  """The formula, against an equal tokenizer without a norm."""
  tokenizer, variables = tiny.normalised('none', norm)
  plain = build_tokenizer(tiny.model('none'))
  images = tiny.images(2)
  out = reconstruct(tokenizer, variables, images)
  want = reconstruct(plain, {'params': variables['params']}, images)
  np.testing.assert_allclose(out.latents, want.latents, atol=1e-5)
  stats = variables['codebook']['latents']
  normal = (np.asarray(out.latents) - stats['mean']) / stats['std']
  np.testing.assert_allclose(out.quantizer.codes, normal, rtol=1e-5, atol=1e-6)
  # The decoder reads latents again, so its images are those without a norm.
  np.testing.assert_allclose(out.quantizer.z_q, want.latents, atol=1e-5)
  np.testing.assert_allclose(out.images, want.images, atol=1e-5)


def test_channels_take_any_grid_and_positions_their_own():
  wide, indices = tiny.images(1, 8, 24), jnp.zeros((1, 2, 6), jnp.int32)

  def shape(latents, function, x):
    tokenizer = build_tokenizer(tiny.model() | dict(latents=latents))
    init = functools.partial(tokenizer.init, jax.random.key(0))
    run = functools.partial(function, tokenizer)
    return jax.eval_shape(run, jax.eval_shape(init, wide), x).shape

  encode, decode = vqrae_jax.encode_to_indices, vqrae_jax.decode_from_indices
  channel, position = dict(norm='channel'), dict(norm='position', grid=(4, 4))
  assert shape(channel, encode, wide) == (1, 2, 6)
  assert shape(channel, decode, indices) == wide.shape
  for function, x in (encode, wide), (decode, indices):
    with pytest.raises(UserError, match='2x6 .*4x4'):
      shape(position, function, x)


@pytest.mark.parametrize(
  'latents, key',
  [
    (dict(norm='position'), 'norm="position"'),
    (dict(norm='channel', grid=(4, 4)), 'norm="position"'),
    (dict(norm='position', grid=(4, 0)), r'grid=\(4, 0\)'),
    (dict(nrm='channel'), 'model.latents.nrm'),
    ('channel', "model.latents='channel'"),
  ],
)
def test_a_wrong_section_names_its_key(latents, key):
  with pytest.raises(UserError, match=key):
    build_tokenizer(tiny.model() | dict(latents=latents))


def written(tmp_path, mean, var=None, **more):
  var = np.abs(mean) if var is None else var
  np.savez(tmp_path / 's.npz', mean=mean, var=var, **more)
  return str(tmp_path / 's.npz')


def test_both_layouts_are_read(tmp_path):
  """Ours as it is, RAE's transposed; std is sqrt(var + 1e-5)."""
  ours = np.random.default_rng(0).normal(size=(4, 5, 8))
  rae = ours.transpose(2, 0, 1)
  for there in (ours, rae, rae[None]):
    leaves = leaves_of(written(tmp_path, there), POSITION, 8)
    mean, std = (leaves[f'codebook/latents/{k}'] for k in ('mean', 'std'))
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(mean, ours.astype('f4'))
    np.testing.assert_allclose(std, np.sqrt(np.abs(ours) + 1e-5), rtol=1e-6)
  leaves = leaves_of(written(tmp_path, ours[0, 0]), CHANNEL, 8)
  assert leaves['codebook/latents/mean'].shape == (8,)


@pytest.mark.parametrize(
  'spec, arrays, words',
  [
    (CHANNEL, dict(mean=np.ones((4, 5, 8))), r'\(4, 5, 8\).*\(8,\)'),
    (POSITION, dict(mean=np.ones((5, 4, 8))), r'\(5, 4, 8\).*\(4, 5, 8\)'),
    (CHANNEL, dict(mean=np.ones(8), var=np.ones(7)), r'\(8,\) .*\(7,\)'),
    (CHANNEL, dict(mean=np.ones(8), var=-np.ones(8)), 'var'),
    (CHANNEL, dict(mean=np.full(8, np.nan), var=np.ones(8)), 'NaN'),
    (CHANNEL, dict(mean=np.ones(8), var=np.full(8, 1e300)), 'infinity'),
    (CHANNEL, dict(mean=np.ones(8), std=np.ones(8)), '"mean" and "var"'),
    (LatentsSpec('position', (8, 8)), dict(mean=np.ones((8, 8, 8))), 'channel'),
  ],
)
def test_a_misfit_shows_both_sides(spec, arrays, words, tmp_path):
  path = written(tmp_path, **arrays)
  with pytest.raises(UserError, match=words) as error:
    leaves_of(path, spec, 8)
  assert '\n' not in str(error.value) and 's.npz' in str(error.value)
