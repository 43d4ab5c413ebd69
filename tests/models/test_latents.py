"""Normalised latents: what is normalised, by what, and how it is stored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import export, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models import latents as latent_files
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
  # The decoder reads latents again, so it paints what it paints without.
  np.testing.assert_allclose(out.quantizer.z_q, want.latents, atol=1e-5)
  np.testing.assert_allclose(out.images, want.images, atol=1e-5)


def test_codes_start_at_normalised_tokens():
  tokenizer, variables = tiny.normalised('vq-ema', 'channel')
  tokens = tokenizer.apply(
    variables, tiny.images(2), method='project_to_code_space'
  )
  out = vqrae_jax.reconstruct(tokenizer, variables, tiny.images(2))
  stats = variables['codebook']['latents']
  normal = (np.asarray(out.latents) - stats['mean']) / stats['std']
  np.testing.assert_allclose(tokens, normal.reshape(-1, 32), atol=1e-5)


def test_the_door_needs_no_more_than_it_says():
  """Encoder and quantizer to encode, quantizer and decoder to decode."""
  tokenizer, variables = tiny.normalised('fsq-cosmos', 'channel')

  def with_parts(*parts):
    params = {k: variables['params'][k] for k in parts}
    return variables | dict(params=params)

  indices = vqrae_jax.encode_to_indices(
    tokenizer, with_parts('encoder', 'quantizer'), tiny.images(1)
  )
  painted = vqrae_jax.decode_from_indices(
    tokenizer, with_parts('quantizer', 'decoder'), indices
  )
  assert painted.shape == (1, 16, 16, 3)


def test_channels_take_any_grid_and_positions_their_own():
  tokenizer, variables = tiny.normalised('fsq-cosmos', 'channel')
  assert vqrae_jax.reconstruct(
    tokenizer, variables, tiny.images(1, 8, 24)
  ).images.shape == (1, 8, 24, 3)
  tokenizer, variables = tiny.normalised('fsq-cosmos', 'position')
  for call in (vqrae_jax.reconstruct, vqrae_jax.encode_to_indices):
    with pytest.raises(UserError, match='2x6 tokens, .* are of 4x4: resize'):
      call(tokenizer, variables, tiny.images(1, 8, 24))
  with pytest.raises(UserError, match='4x2 tokens, .* are of 4x4'):
    vqrae_jax.decode_from_indices(
      tokenizer, variables, jnp.zeros((1, 4, 2), jnp.int32)
    )


@pytest.mark.parametrize('norm', NORMS)
def test_a_tokenizer_on_disk_has_its_statistics(norm, tmp_path):
  tokenizer, variables = tiny.normalised('simvq-l2', norm)
  mark = export.save_tokenizer(tokenizer, variables, tmp_path / 'tok')
  again, loaded = vqrae_jax.load_tokenizer(tmp_path / 'tok')
  assert again == tokenizer
  for name in ('mean', 'std'):
    np.testing.assert_array_equal(
      loaded['codebook']['latents'][name],
      variables['codebook']['latents'][name],
    )
  np.testing.assert_allclose(
    vqrae_jax.reconstruct(again, loaded, tiny.images(1)).images,
    vqrae_jax.reconstruct(tokenizer, variables, tiny.images(1)).images,
    atol=1e-5,
  )
  # Other statistics are another tokenizer.
  other = tiny.with_statistics(variables, seed=4)
  assert export.save_tokenizer(tokenizer, other, tmp_path / 'other') != mark


def test_what_is_not_normalised_says_nothing_of_it():
  """`norm="none"` is the config without the section, to the last byte."""
  model = tiny.model('vq-ema')
  plain = describe(build_tokenizer(model))
  none = build_tokenizer(model | dict(latents=dict(norm='none')))
  assert describe(none) == plain and 'latents' not in plain
  for latents in (dict(norm='channel'), dict(norm='position', grid=(4, 4))):
    tokenizer = build_tokenizer(model | dict(latents=latents))
    said = json.loads(json.dumps(describe(tokenizer)))
    assert build_tokenizer(said) == tokenizer
    assert describe(tokenizer).items() >= plain.items()


@pytest.mark.parametrize('norm', NORMS)
def test_statistics_are_whole_on_every_device(norm):
  _, variables = tiny.normalised('fsq-cosmos', norm)
  mesh = sharding.make_mesh('fsdp')
  places = trees.flatten(sharding.shardings_for(variables, mesh))
  for name in ('mean', 'std'):
    assert places[f'codebook/latents/{name}'].is_fully_replicated


@pytest.mark.parametrize(
  'latents, words',
  [
    (dict(norm='chanel'), 'did you mean "channel"'),
    (dict(norm='position'), 'goes with norm="position"'),
    (dict(norm='channel', grid=(4, 4)), 'goes with norm="position" and'),
    (dict(norm='position', grid=(4, 0)), r'grid=\(4, 0\) must be'),
    (dict(norm='position', grid=(4,)), r'must be \(rows, columns\)'),
    (dict(nrm='channel'), 'unknown key "model.latents.nrm"; did you mean'),
    ('channel', "model.latents='channel' must be a section"),
  ],
)
def test_a_wrong_section_says_what_is_right(latents, words):
  with pytest.raises(UserError, match=words):
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
    leaves = latent_files.leaves_of(path, POSITION, 8)
    mean, std = (leaves[f'codebook/latents/{k}'] for k in ('mean', 'std'))
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(mean, ours.astype('f4'))
    want = np.sqrt(np.abs(ours) + 1e-5)
    np.testing.assert_allclose(std, want, rtol=1e-6)
  path = written(tmp_path, rng.normal(size=8))
  leaves = latent_files.leaves_of(path, CHANNEL, 8)
  assert leaves['codebook/latents/mean'].shape == (8,)


@pytest.mark.parametrize(
  'spec, arrays, words',
  [
    (CHANNEL, dict(mean=np.ones(7)), r'are \(7,\), the model wants \(8,\)'),
    (CHANNEL, dict(mean=np.ones((4, 5, 8))), r'\(4, 5, 8\), the model wants'),
    (POSITION, dict(mean=np.ones(8)), r'wants \(4, 5, 8\), or .* \(8, 4, 5\)'),
    (POSITION, dict(mean=np.ones((5, 4, 8))), r'\(5, 4, 8\), the model wants'),
    (CHANNEL, dict(mean=np.ones(8), var=np.ones(7)), r'mean is \(8,\), var'),
    (CHANNEL, dict(mean=np.ones(8), var=-np.ones(8)), 'var is negative'),
    (CHANNEL, dict(mean=np.full(8, np.nan), var=np.ones(8)), 'NaN or inf'),
    (CHANNEL, dict(mean=np.ones(8), var=np.full(8, 1e300)), 'NaN or inf'),
    (CHANNEL, dict(mean=np.ones(8), std=np.ones(8)), 'holds no "mean" and'),
    (
      LatentsSpec('position', (8, 8)),
      dict(mean=np.ones((8, 8, 8))),
      'does not say whether the channel is first or last',
    ),
  ],
)
def test_a_file_that_does_not_fit_shows_both_sides(
  spec, arrays, words, tmp_path
):
  path = written(tmp_path, **arrays)
  with pytest.raises(UserError, match=words) as error:
    latent_files.leaves_of(path, spec, 8)
  assert '\n' not in str(error.value) and 's.npz' in str(error.value)


def test_shapes_are_found_without_a_grid_of_their_own():
  """Statistics by position do not stand in the way of a model's shapes."""
  latents = dict(norm='position', grid=(3, 5))
  tokenizer = build_tokenizer(tiny.model() | dict(latents=latents))
  image = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)
  found = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  plain = jax.eval_shape(
    build_tokenizer(tiny.model()).init, jax.random.key(0), image
  )
  assert found['codebook']['latents']['mean'].shape == (3, 5, 32)
  assert jax.tree.leaves(found['params']) == jax.tree.leaves(plain['params'])
