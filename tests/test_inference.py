"""The public API: light to import, pure, and clear when misused."""

import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.ops import codes

IMAGES = tiny.images(2)
FLOATS = IMAGES / np.float32(255)
HEAVY = ('orbax', 'grain', 'optax', 'torch', 'transformers', 'tensorflow')

# Its two functions count as well: a downstream pipeline touches them.
PROBE = """
import sys
import vqrae_jax
vqrae_jax.encode_to_indices, vqrae_jax.build_tokenizer
print(*sys.modules)
"""


def test_import_is_light():
  """Nothing that only training or conversion needs is imported."""
  modules = subprocess.check_output([sys.executable, '-c', PROBE], text=True)
  assert not {*HEAVY} & {*modules.split()}


@pytest.mark.parametrize(
  'kind, posemb', [('fsq-cosmos', 'rope2d'), ('simvq-cosine', None)]
)
def test_jit_vmap_and_symbolic_export(kind, posemb, monkeypatch):
  """Exported, a count of tokens is a symbol, and goes through the loop over
  chunks of 10 tokens."""
  config = tiny.model(kind, depth=1)
  for part in ('encoder', 'decoder') if posemb else ():
    config[part]['vit'] |= dict(posemb=posemb)
  tokenizer, variables = tiny.built(config)
  images = jnp.asarray(tiny.images(6)) / 255.0
  encode = functools.partial(vqrae_jax.encode_to_indices, tokenizer)
  decode = functools.partial(vqrae_jax.decode_from_indices, tokenizer)
  indices = jax.jit(encode)(variables, images)

  stacked = images.reshape(2, 3, *images.shape[1:])
  mapped = jax.jit(jax.vmap(encode, (None, 0)))(variables, stacked)
  np.testing.assert_array_equal(mapped.reshape(indices.shape), indices)

  monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', 96 * 10)
  (b,) = export.symbolic_shape('b')
  recon = jax.jit(decode)(variables, indices)
  for fn, x, want in ((encode, images, indices), (decode, indices, recon)):
    symbolic = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
    stored = export.export(jax.jit(fn))(variables, symbolic).serialize()
    found = export.deserialize(stored).call(variables, x)
    np.testing.assert_allclose(found, want, atol=1e-5)


as_users = functools.partial(jax.jit, compiler_options=tiny.AS_USERS)


def bits(x):
  return np.asarray(x).tobytes()


@pytest.mark.parametrize(
  'kind, norm, options',
  [
    ('simvq-cosine', 'channel', dict(post_quant=dict(kernel=3))),
    ('multiscale', 'channel', dict(dtype='bfloat16')),
    (
      'fsq-cosmos',
      'position',
      dict(dtype='bfloat16', post_quant=dict(kernel=3, space='latent')),
    ),
  ],
)
def test_decoding_indices_is_reconstruct(kind, norm, options):
  """To the last bit, both jitted, and in f32 both eager."""
  tokenizer, variables = tiny.normalised(kind, norm, depth=1, **options)
  names = 'encode_to_indices', 'decode_from_indices', 'reconstruct'
  eager = [functools.partial(getattr(vqrae_jax, n), tokenizer) for n in names]
  jitted = [as_users(f) for f in eager]
  for encode, decode, reconstruct in (
    (jitted, eager) if 'dtype' not in options else (jitted,)
  ):
    indices = encode(variables, IMAGES)
    assert len(np.unique(indices)) > 4, 'the test saw few codes'
    out = reconstruct(variables, IMAGES)
    np.testing.assert_array_equal(indices, out.quantizer.indices)
    recon = decode(variables, indices)
    assert recon.dtype == jnp.float32
    assert bits(recon) == bits(np.clip(out.images, 0, 1))


def test_numpy_indices_decode_like_others():
  """Those of a dump are; NumPy's division may round otherwise."""
  tokenizer, variables = tiny.built(tiny.model('fsq-symmetric', depth=1))
  shape, size = tokenizer.index_shape(16, 16), tokenizer.codebook_size
  indices = np.random.default_rng(0).integers(size, size=(2, *shape))
  decode = functools.partial(vqrae_jax.decode_from_indices, tokenizer)
  found = decode(variables, indices.astype(np.uint16))
  np.testing.assert_array_equal(found, decode(variables, jnp.asarray(indices)))


def test_continuous_decodes_its_codes():
  """`none` has no indices: decoding its codes is the forward."""
  tokenizer, variables = tiny.normalised('none', 'channel', depth=1)
  reconstruct = functools.partial(vqrae_jax.reconstruct, tokenizer)
  out = as_users(reconstruct)(variables, IMAGES)
  decode = functools.partial(tokenizer.apply, method='decode_codes')
  recon, *_ = as_users(decode)(variables, out.quantizer.codes)
  assert bits(recon) == bits(out.images)
  with pytest.raises(vqrae_jax.UserError, match='continuous'):
    vqrae_jax.encode_to_indices(tokenizer, variables, IMAGES)


@pytest.fixture(scope='module')
def plain():
  """(tokenizer, variables) of EMA-VQ, eager and small."""
  return tiny.built(tiny.model('vq-ema', depth=1, projection=True))


def test_each_half_needs_only_its_own_variables(plain):
  tokenizer, variables = plain
  params, codebook = variables['params'], variables['codebook']

  def only(*names):
    return {'params': {n: params[n] for n in names}, 'codebook': codebook}

  half = only('encoder', 'quantizer')
  indices = vqrae_jax.encode_to_indices(tokenizer, half, IMAGES)
  other = only('quantizer', 'decoder')
  recon = vqrae_jax.decode_from_indices(tokenizer, other, indices)
  assert recon.shape == (2, 16, 16, 3)
  with pytest.raises(vqrae_jax.UserError, match='params/decoder/'):
    vqrae_jax.decode_from_indices(tokenizer, half, indices)


@pytest.mark.parametrize('kind', ('vq-gradient', 'gumbel'))
def test_what_init_gives_will_do(kind):
  """Tables of parameters, which a saved tokenizer has baked."""
  tokenizer = vqrae_jax.build_tokenizer(tiny.model(kind))
  variables = jax.jit(tokenizer.init)(jax.random.key(0), IMAGES[:1])
  indices = vqrae_jax.encode_to_indices(tokenizer, variables, IMAGES)
  images = vqrae_jax.decode_from_indices(tokenizer, variables, indices)
  assert images.shape == IMAGES.shape


def test_an_empty_batch_gives_an_empty_answer(plain):
  images = IMAGES[:0]
  latents = vqrae_jax.encode(*plain, images)
  indices = vqrae_jax.encode_to_indices(*plain, images)
  recon = vqrae_jax.decode_from_indices(*plain, indices)
  out = vqrae_jax.reconstruct(*plain, images)
  assert latents.shape == (0, 4, 4, 32) and indices.shape == (0, 4, 4)
  assert recon.shape == out.images.shape == (0, 16, 16, 3)


def test_variables_of_another_tokenizer_name_the_leaf(plain):
  tokenizer, variables = plain
  other = tiny.model('vq-ema', depth=2, num_codes=65, projection=True)
  _, wrong = tiny.built(other)
  with pytest.raises(vqrae_jax.UserError) as error:
    vqrae_jax.encode_to_indices(tokenizer, wrong, IMAGES)
  for leaf in ('codebook/quantizer/codes', 'blocks/attention/key/kernel'):
    assert leaf in str(error.value)
  for function in (vqrae_jax.encode, vqrae_jax.decode_from_indices):
    with pytest.raises(vqrae_jax.UserError, match='dict, Tokenizer'):
      inspect.unwrap(function)(variables, tokenizer, IMAGES)  # no import hook


def test_explicit_axes_are_refused(plain):
  """`jax.make_mesh` makes them by default; with Auto axes all is well."""

  def encoded(kind):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
    split = jax.NamedSharding(mesh, PartitionSpec('data'))
    images = jax.device_put(tiny.images(8), split)
    return vqrae_jax.encode_to_indices(*plain, images)

  assert encoded(AxisType.Auto).shape == (8, 4, 4)
  with pytest.raises(vqrae_jax.UserError, match=r'AxisType\.Auto'):
    encoded(AxisType.Explicit)


def test_canonical_is_float32_whatever_the_tokenizer_runs_in():
  config = tiny.model('simvq-l2')
  plain, variables = tiny.built(config)
  half = vqrae_jax.build_tokenizer(config | dict(dtype='bfloat16'))
  encode = functools.partial(vqrae_jax.encode_to_indices, precision='canonical')
  encode, images = jax.jit(encode, static_argnums=0), tiny.images(4)
  np.testing.assert_array_equal(
    encode(half, variables, images), encode(plain, variables, images)
  )
  with pytest.raises(vqrae_jax.UserError, match='did you mean "canonical"'):
    vqrae_jax.encode(plain, variables, images, precision='canonic')


def test_reconstruct_gives_losses_if_asked():
  model = tiny.built(tiny.model('simvq-l2'))
  assert vqrae_jax.reconstruct(*model, IMAGES).losses is None
  out = vqrae_jax.reconstruct(*model, IMAGES, losses=True)
  assert set(out.losses) == {'l1', 'l2', 'commit', 'codebook'}
  error = np.asarray(out.images, np.float64) - IMAGES / 255.0
  np.testing.assert_allclose(out.losses['l1'], np.abs(error).mean(), rtol=1e-5)
  np.testing.assert_allclose(out.losses['l2'], (error**2).mean(), rtol=1e-5)


def test_inside_a_callers_shard_map():
  """Each device searches alone; no second shard_map is nested."""
  images, spec = tiny.images(8), PartitionSpec('data')
  encode = functools.partial(
    vqrae_jax.encode_to_indices, *tiny.built(tiny.model('vq-ema'))
  )
  with jax.set_mesh(sharding.make_mesh()):
    mapped = jax.shard_map(encode, in_specs=spec, out_specs=spec)
    found = jax.jit(mapped)(images)
  np.testing.assert_array_equal(found, jax.jit(encode)(images))


@pytest.mark.parametrize(
  'images, words',
  [
    (np.zeros((2, 18, 16, 3), np.uint8), '18x16 is no multiple of .* patch 4'),
    (np.zeros((2, 0, 16, 3), np.uint8), '0x16'),
    (np.zeros((2, 16, 16, 3), np.int32), 'int32'),
    (np.zeros((2, 16, 16, 4), np.uint8), 'channels last'),
    (np.zeros((16, 16, 3), np.uint8), r'images\[None\]'),
    (np.zeros((2, 16, 16), np.uint8), 'channel axis to grey'),
    (np.zeros((2, 16, 16, 1), np.uint8), 'grey images 3 times'),
    ([[0.0]], 'list'),
    (FLOATS * 255, r'\[0, 1\]: divide'),
    (jnp.asarray(FLOATS) * 2 - 1, r'\(x \+ 1\) / 2'),
    (FLOATS + np.nan, 'nan'),
    (FLOATS.astype(jnp.bfloat16) * 2, r'\[0, 1\]'),
  ],
)
def test_bad_images_say_what_is_right(images, words, plain):
  with pytest.raises(vqrae_jax.UserError, match=words) as e:
    vqrae_jax.encode_to_indices(*plain, images)
  assert '\n' not in str(e.value)


def test_traced_values_are_not_checked(plain):
  """Inside jit any image gives indices, and any index an image."""
  tokenizer, variables = plain
  encode = jax.jit(functools.partial(vqrae_jax.encode_to_indices, tokenizer))
  decode = jax.jit(functools.partial(vqrae_jax.decode_from_indices, tokenizer))
  for scale in (300.0, np.nan):
    indices = encode(variables, FLOATS * np.float32(scale))
    assert indices.min() >= 0 and indices.max() < tokenizer.codebook_size
  for index, nearest in ((99, 63), (-99, 0)):
    have, want = (np.full((1, 4, 4), i, np.int32) for i in (index, nearest))
    assert bits(decode(variables, have)) == bits(decode(variables, want))


@pytest.mark.parametrize(
  'indices, words',
  [
    (np.zeros((2, 4, 4)), 'float64'),
    (np.zeros((4, 4), np.int32), 'axes'),
    (np.full((1, 4, 4), -1), r'\[-1, -1\].*codebook_size=64'),
    (jnp.full((1, 4, 4), 64), r'\[64, 64\].*codes 0 to 63'),
    (np.full((1, 4, 4), 2**32 + 1), 'codebook_size=64'),
    (np.full((1, 4, 4), 255, np.uint8), 'codebook_size=64'),
  ],
)
def test_bad_indices_say_what_is_right(indices, words, plain):
  with pytest.raises(vqrae_jax.UserError, match=words):
    vqrae_jax.decode_from_indices(*plain, indices)


def test_bad_indices_of_several_codes():
  """-1 leaves a stage out; fewer or more of them are no indices."""
  tokenizer, variables = tiny.built(tiny.model('residual-vq', depth=1))
  decode = functools.partial(
    jax.eval_shape,
    functools.partial(vqrae_jax.decode_from_indices, tokenizer, variables),
  )
  assert tokenizer.index_shape(16, 16) == (4, 4, 2)
  assert decode(np.zeros((1, 4, 4, 2), int)).shape == (1, 16, 16, 3)
  with pytest.raises(vqrae_jax.UserError, match='4 axes .b gh gw q.'):
    decode(np.zeros((1, 4, 4), int))
  with pytest.raises(vqrae_jax.UserError, match='quantizer.stages=2'):
    decode(np.zeros((1, 4, 4, 3), int))
  with pytest.raises(vqrae_jax.UserError, match=r'\[-2, -2\].*, and -1'):
    at_hand = np.full((1, 4, 4, 2), -2)
    vqrae_jax.decode_from_indices(tokenizer, variables, at_hand)
