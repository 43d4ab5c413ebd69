"""The law of DESIGN's quantizers, for each one and each of its forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny

GRIDS = {'square': (16, 16), '2:1': (32, 16), '1:3': (8, 24)}
KERNELS = (None, 1, 3)
DTYPES = ('float32', 'bfloat16')
# Each dtype, kernel and grid; `make test-slow` has their whole product.
QUICK = (
  ('float32', None, 'square'),
  ('float32', None, '1:3'),
  ('float32', 3, 'square'),
  ('bfloat16', 1, '2:1'),
)


def bits(x):
  """The bytes of an array: -0.0 is not 0.0 here."""
  x = np.asarray(x)
  return x.view({4: np.uint32, 2: np.uint16}[x.dtype.itemsize])


@functools.lru_cache(maxsize=4)
def made(kind, dtype, kernel):
  post = None if kernel is None else dict(kernel=kernel)
  return tiny.built(tiny.model(kind, depth=1, dtype=dtype, post_quant=post))


def lookups(tokenizer, variables, indices, codes):
  """(indices_to_codes(indices), codes_to_indices(codes)) of the quantizer."""
  return tokenizer.apply(
    variables,
    method=lambda t: (
      t.quantizer.indices_to_codes(indices),
      t.quantizer.codes_to_indices(codes),
    ),
  )


@pytest.mark.parametrize(
  ('dtype', 'kernel', 'grid'),
  [
    pytest.param(*form, marks=() if form in QUICK else pytest.mark.slow)
    for form in itertools.product(DTYPES, KERNELS, GRIDS)
  ],
)
@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_decode_is_the_forward(kind, dtype, kernel, grid):
  """Codes, indices and pixels agree bitwise, all jitted."""
  tokenizer, variables = made(kind, dtype, kernel)
  encode, decode, reconstruct, look = (
    jax.jit(functools.partial(f, tokenizer), compiler_options=tiny.AS_USERS)
    for f in (
      vqrae_jax.encode_to_indices,
      vqrae_jax.decode_from_indices,
      vqrae_jax.reconstruct,
      lookups,
    )
  )
  h, w = GRIDS[grid]
  images = tiny.images(2, h, w)
  out = reconstruct(variables, images)
  indices = encode(variables, images)
  assert indices.shape == (2, *tokenizer.index_shape(h, w))
  assert indices.dtype == jnp.int32
  assert indices.min() >= 0 and indices.max() < tokenizer.codebook_size
  assert len(np.unique(indices)) > 4, 'the test saw few codes'
  np.testing.assert_array_equal(indices, out.quantizer.indices)
  codes = out.quantizer.codes
  assert codes.dtype == jnp.float32
  looked_up, back = look(variables, indices, codes)
  np.testing.assert_array_equal(bits(codes), bits(looked_up))
  np.testing.assert_array_equal(back, indices)
  painted = decode(variables, indices)
  assert painted.dtype == jnp.float32
  np.testing.assert_array_equal(bits(painted), bits(np.clip(out.images, 0, 1)))


@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_decode_is_the_forward_eagerly(kind):
  tokenizer, variables = made(kind, 'float32', 3)
  images = tiny.images(1)
  out = vqrae_jax.reconstruct(tokenizer, variables, images)
  indices = vqrae_jax.encode_to_indices(tokenizer, variables, images)
  painted = vqrae_jax.decode_from_indices(tokenizer, variables, indices)
  np.testing.assert_array_equal(bits(painted), bits(jnp.clip(out.images, 0, 1)))


@pytest.mark.parametrize('kind', ('fsq-centered', 'simvq-l2'))
def test_post_quant_in_latent_space(kind):
  """The convolution after the projection is part of the same tail."""
  config = tiny.model(kind, depth=1, post_quant=dict(kernel=3, space='latent'))
  tokenizer, variables = tiny.built(config)
  kernel = variables['params']['quantizer']['post_conv']['kernel']
  assert kernel.shape == (3, 3, 32, 32)
  images = tiny.images(2)
  encode, decode, reconstruct = (
    jax.jit(functools.partial(f, tokenizer), compiler_options=tiny.AS_USERS)
    for f in (
      vqrae_jax.encode_to_indices,
      vqrae_jax.decode_from_indices,
      vqrae_jax.reconstruct,
    )
  )
  painted = decode(variables, encode(variables, images))
  want = np.clip(reconstruct(variables, images).images, 0, 1)
  np.testing.assert_array_equal(bits(painted), bits(want))


@pytest.mark.parametrize(
  ('norm', 'dtype'),
  [
    ('channel', 'float32'),
    ('position', 'bfloat16'),
    pytest.param('channel', 'bfloat16', marks=pytest.mark.slow),
    pytest.param('position', 'float32', marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('kind', ('fsq-cosmos', 'vq-ema', 'simvq-cosine'))
def test_decode_is_the_forward_of_normalised_latents(kind, norm, dtype):
  """Normalising and its inverse are inside the law, jitted and eagerly."""
  tokenizer, variables = tiny.normalised(kind, norm, depth=1, dtype=dtype)
  images = tiny.images(2)
  doors = [
    functools.partial(f, tokenizer)
    for f in (
      vqrae_jax.encode_to_indices,
      vqrae_jax.decode_from_indices,
      vqrae_jax.reconstruct,
    )
  ]
  jitted = [jax.jit(f, compiler_options=tiny.AS_USERS) for f in doors]
  for encode, decode, reconstruct in (jitted, doors):
    indices = encode(variables, images)
    assert len(np.unique(indices)) > 4, 'the test saw few codes'
    out = reconstruct(variables, images)
    np.testing.assert_array_equal(indices, out.quantizer.indices)
    painted = decode(variables, indices)
    np.testing.assert_array_equal(
      bits(painted), bits(np.clip(out.images, 0, 1))
    )


@pytest.mark.parametrize('norm', ('channel', 'position'))
def test_continuous_decodes_its_codes(norm):
  """`none` has no indices: its codes through the tail are the forward."""
  tokenizer, variables = tiny.normalised('none', norm, depth=1)

  def decode(variables, codes):
    return tokenizer.apply(
      variables, method=lambda t: t._inference_tail(codes)[0]
    )

  options = dict(compiler_options=tiny.AS_USERS)
  reconstruct = functools.partial(vqrae_jax.reconstruct, tokenizer)
  out = jax.jit(reconstruct, **options)(variables, tiny.images(2))
  painted = jax.jit(decode, **options)(variables, out.quantizer.codes)
  np.testing.assert_array_equal(bits(painted), bits(out.images))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_training_forward_uses_the_same_codes(kind, dtype):
  tokenizer, variables = made(kind, dtype, None)

  @jax.jit
  def both(variables, images):
    train = tokenizer.apply(variables, images, train=True)
    codes = tokenizer.apply(
      variables,
      train.quantizer.indices,
      method=lambda t, i: t.quantizer.indices_to_codes(i),
    )
    return train.quantizer.codes, codes

  in_forward, looked_up = both(variables, tiny.images(2))
  np.testing.assert_array_equal(bits(in_forward), bits(looked_up))


@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_any_leading_shape(kind):
  """Latents f[n d], f[b n d] and f[b gh gw d] get equal indices."""
  tokenizer, variables = made(kind, 'float32', None)
  latents = vqrae_jax.encode(tokenizer, variables, tiny.images(2))

  def indices(z):
    return tokenizer.apply(
      variables, z, method=lambda t, z: t.quantizer(z).indices
    )

  whole = indices(latents)
  d = latents.shape[-1]
  for shape in ((-1, d), (2, -1, d), (1, 2, *latents.shape[1:3], d)):
    np.testing.assert_array_equal(
      indices(latents.reshape(shape)).ravel(), whole.ravel()
    )


def test_every_registered_quantizer_is_under_the_law():
  from vqrae_jax.quantizers import QUANTIZERS

  tried = {q['name'] for q in tiny.QUANTIZERS.values()}
  assert tried | {'none'} == set(QUANTIZERS)


def test_continuous_passes_latents_and_says_it_has_no_indices():
  tokenizer, variables = tiny.built(tiny.model('none'))
  images = tiny.images(2)
  out = vqrae_jax.reconstruct(tokenizer, variables, images)
  np.testing.assert_array_equal(out.quantizer.codes, out.latents)
  assert out.quantizer.indices is None and tokenizer.codebook_size == 0
  with pytest.raises(vqrae_jax.UserError, match='continuous'):
    vqrae_jax.encode_to_indices(tokenizer, variables, images)
