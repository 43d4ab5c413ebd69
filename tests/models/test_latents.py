"""Normalized latents: the arithmetic, the files of statistics, the errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import export, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models.latents import leaves_of
from vqrae_jax.models.tokenizer import build_tokenizer, describe
from vqrae_jax.ops import trees
from vqrae_jax.specs import LatentsSpec

NORMS = ('channel', 'position')
CHANNEL, POSITION = LatentsSpec('channel'), LatentsSpec('position', (4, 5))


@pytest.mark.parametrize('norm', NORMS)
def test_only_the_quantizer_sees_normalised_latents(norm):
  """The formula, against an equal tokenizer without a norm."""
  tokenizer, variables = tiny.normalised('none', norm)
  plain = build_tokenizer(tiny.model('none'))
  images = tiny.images(2)
  out = vqrae_jax.reconstruct(tokenizer, variables, images)
  want = vqrae_jax.reconstruct(plain, {'params': variables['params']}, images)
  np.testing.assert_array_equal(out.latents, want.latents)
  np.testing.assert_array_equal(
    vqrae_jax.encode(tokenizer, variables, images), want.latents
  )
  stats = variables['codebook']['latents']
  normal = (np.asarray(want.latents) - stats['mean']) / stats['std']
  np.testing.assert_allclose(out.quantizer.codes, normal, rtol=1e-5, atol=1e-6)
  # The decoder reads latents again, so its images are those without a norm.
  np.testing.assert_allclose(out.quantizer.z_q, want.latents, atol=1e-5)
  np.testing.assert_allclose(out.images, want.images, atol=1e-5)


def test_codes_are_initialized_with_normalised_tokens():
  tokenizer, variables = tiny.normalised('vq-ema', 'channel')
  tokens, latents = jax.jit(
    lambda v, x: tokenizer.apply(
      v, x, method=lambda m, x: (m.project_to_code_space(x), m.encode(x))
    )
  )(variables, tiny.images(2))
  stats = variables['codebook']['latents']
  normal = (np.asarray(latents) - stats['mean']) / stats['std']
  np.testing.assert_allclose(tokens, normal.reshape(-1, 32), atol=1e-5)


def test_channels_take_any_grid_and_positions_their_own():
  """Encoding needs encoder and quantizer, decoding quantizer and decoder."""
  tokenizer, variables = tiny.normalised('fsq-cosmos', 'channel')

  def with_parts(*parts):
    params = {k: variables['params'][k] for k in parts}
    return variables | dict(params=params)

  indices = vqrae_jax.encode_to_indices(
    tokenizer, with_parts('encoder', 'quantizer'), tiny.images(1, 8, 24)
  )
  images = vqrae_jax.decode_from_indices(
    tokenizer, with_parts('quantizer', 'decoder'), indices
  )
  assert images.shape == (1, 8, 24, 3)
  tokenizer, variables = tiny.normalised('fsq-cosmos', 'position')
  for call in (vqrae_jax.reconstruct, vqrae_jax.encode_to_indices):
    with pytest.raises(UserError, match='2x6 .*4x4'):
      call(tokenizer, variables, tiny.images(1, 8, 24))
  with pytest.raises(UserError, match='4x2 .*4x4'):
    vqrae_jax.decode_from_indices(
      tokenizer, variables, jnp.zeros((1, 4, 2), jnp.int32)
    )


@pytest.mark.parametrize('norm', NORMS)
def test_a_tokenizer_on_disk_has_its_statistics(norm, tmp_path):
  tokenizer, variables = tiny.normalised('fsq-cosmos', norm)
  mark = export.save_tokenizer(tokenizer, variables, tmp_path / 'tok')
  again, loaded = vqrae_jax.load_tokenizer(tmp_path / 'tok')
  assert again == tokenizer
  have, want = (v['codebook']['latents'] for v in (loaded, variables))
  for name in ('mean', 'std'):
    np.testing.assert_array_equal(have[name], want[name])
  # Other statistics are another tokenizer.
  other = tiny.with_statistics(variables, seed=4)
  assert export.save_tokenizer(tokenizer, other, tmp_path / 'other') != mark
  # Every device has all of them.
  mesh = sharding.make_mesh('fsdp')
  placed = trees.flatten(sharding.shardings_for(variables, mesh))
  for name in ('mean', 'std'):
    assert placed[f'codebook/latents/{name}'].is_fully_replicated


def test_no_norm_is_a_config_without_the_section():
  model = tiny.model('vq-ema')
  plain = describe(build_tokenizer(model))
  none = build_tokenizer(model | dict(latents=dict(norm='none')))
  assert describe(none) == plain and 'latents' not in plain
  for latents in (dict(norm='channel'), dict(norm='position', grid=(4, 4))):
    tokenizer = build_tokenizer(model | dict(latents=latents))
    config = json.loads(json.dumps(describe(tokenizer)))
    assert build_tokenizer(config) == tokenizer
    assert describe(tokenizer).items() >= plain.items()


@pytest.mark.parametrize(
  'latents, key',
  [
    (dict(norm='chanel'), 'did you mean "channel"'),
    (dict(norm='position'), 'norm="position"'),
    (dict(norm='channel', grid=(4, 4)), 'norm="position"'),
    (dict(norm='position', grid=(4, 0)), r'grid=\(4, 0\)'),
    (dict(norm='position', grid=(4,)), 'grid'),
    (dict(nrm='channel'), 'model.latents.nrm'),
    ('channel', "model.latents='channel'"),
  ],
)
def test_a_wrong_section_names_its_key(latents, key):
  with pytest.raises(UserError, match=key):
    build_tokenizer(tiny.model() | dict(latents=latents))


def written(tmp_path, mean, var=None, name='s.npz', **more):
  var = np.abs(mean) if var is None else var
  np.savez(tmp_path / name, **{'mean': mean, 'var': var} | more)
  return str(tmp_path / name)


def test_both_layouts_are_read(tmp_path):
  """Ours as it is, RAE's transposed; std is sqrt(var + 1e-5)."""
  rng = np.random.default_rng(0)
  ours = rng.normal(size=(4, 5, 8))
  for name, there in (
    ('ours.npz', ours),
    ('rae.npz', ours.transpose(2, 0, 1)),
    ('batched.npz', ours.transpose(2, 0, 1)[None]),
  ):
    path = written(tmp_path, there, name=name)
    leaves = leaves_of(path, POSITION, 8)
    mean, std = (leaves[f'codebook/latents/{k}'] for k in ('mean', 'std'))
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(mean, ours.astype('f4'))
    want = np.sqrt(np.abs(ours) + 1e-5)
    np.testing.assert_allclose(std, want, rtol=1e-6)
  path = written(tmp_path, rng.normal(size=8))
  leaves = leaves_of(path, CHANNEL, 8)
  assert leaves['codebook/latents/mean'].shape == (8,)


@pytest.mark.parametrize(
  'spec, arrays, words',
  [
    (CHANNEL, dict(mean=np.ones(7)), r'\(7,\).*\(8,\)'),
    (CHANNEL, dict(mean=np.ones((4, 5, 8))), r'\(4, 5, 8\).*\(8,\)'),
    (POSITION, dict(mean=np.ones(8)), r'\(4, 5, 8\).*\(8, 4, 5\)'),
    (POSITION, dict(mean=np.ones((5, 4, 8))), r'\(5, 4, 8\).*\(4, 5, 8\)'),
    (CHANNEL, dict(mean=np.ones(8), var=np.ones(7)), r'\(8,\) .*\(7,\)'),
    (CHANNEL, dict(mean=np.ones(8), var=-np.ones(8)), 'var'),
    (CHANNEL, dict(mean=np.full(8, np.nan), var=np.ones(8)), 'NaN'),
    (CHANNEL, dict(mean=np.ones(8), var=np.full(8, 1e300)), 'infinity'),
    (CHANNEL, dict(mean=np.ones(8), std=np.ones(8)), '"mean" and "var"'),
    (LatentsSpec('position', (8, 8)), dict(mean=np.ones((8, 8, 8))), 'channel'),
  ],
)
def test_a_file_that_does_not_fit_shows_both_sides(
  spec, arrays, words, tmp_path
):
  path = written(tmp_path, **arrays)
  with pytest.raises(UserError, match=words) as error:
    leaves_of(path, spec, 8)
  assert '\n' not in str(error.value) and 's.npz' in str(error.value)


def test_shapes_do_not_depend_on_the_grid_of_statistics():
  latents = dict(norm='position', grid=(3, 5))
  tokenizer = build_tokenizer(tiny.model() | dict(latents=latents))
  image = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)
  have = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  plain = jax.eval_shape(
    build_tokenizer(tiny.model()).init, jax.random.key(0), image
  )
  assert have['codebook']['latents']['mean'].shape == (3, 5, 32)
  assert jax.tree.leaves(have['params']) == jax.tree.leaves(plain['params'])
