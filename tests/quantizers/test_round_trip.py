"""The round-trip property of every quantizer, without encoder and decoder.

Codes inside the forward equal `indices_to_codes(indices)` bitwise, and
`codes_to_indices` is the inverse: in each form, dtype, grid and post_quant
kernel, the forward compiled apart from the lookups, as users compile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax import quantizers
from vqrae_jax.errors import UserError

D = 32


def compiled(quantizer, method):
  apply = functools.partial(quantizer.apply, method=method)
  return jax.jit(apply, compiler_options=tiny.AS_USERS)


F32, BF16 = ('float32', 3, (2, 6)), ('bfloat16', 1, (4, 4))
# Beside others of their class: in bf16 only the map out differs.
SLOW = {
  (kind, BF16) for kind in ('lfq', 'gumbel', *tiny.CONVERTED, *tiny.FURTHER)
}
SLOW.add(('vq-unit', F32))  # its table is in the contract's tokenizers


@pytest.mark.parametrize(
  'kind, dtype, kernel, grid',
  [
    pytest.param(kind, *row, marks=[pytest.mark.slow] * ((kind, row) in SLOW))
    for kind in sorted(tiny.FORMS.keys() - tiny.NESTED)
    for row in (F32, BF16)
  ],
)
def test_round_trip(kind, dtype, kernel, grid):
  check_round_trip(kind, dtype, kernel, grid)


@pytest.mark.parametrize('kind', tiny.NESTED)
def test_round_trip_of_several_codes(kind):
  check_round_trip(kind, 'bfloat16', 3, (2, 6))


def check_round_trip(kind, dtype, kernel, grid):
  section = tiny.quantizer(kind, post_quant=dict(kernel=kernel))
  if kind == 'multiscale':
    gh, gw = grid
    section['scales'] = ((1, gw // 2), (gh, gw))
  quantizer = quantizers.build(section, D, dtype)
  z = jax.random.normal(jax.random.key(0), (2, *grid, D), dtype)
  variables = tiny.drawn(quantizer, z, seed=1)

  if kind == 'vq-affine':
    codebook = variables['codebook']
    for n, name in enumerate(('token_mean', 'token_var')):
      key = jax.random.key(n)
      codebook[name] = jax.random.uniform(key, codebook[name].shape) + 0.1

  def forward(q, z):
    return q(z), q(z, train=True)

  def lookups(q, z, codes):
    indices = q.latents_to_indices(z)
    if kind == 'multiscale':  # it needs the grid
      flat = indices
    else:
      flat = q.latents_to_indices(z.reshape(-1, D)).reshape(indices.shape)
    if kind.startswith(('residual', 'multiscale')):
      back = q.codes_to_indices(q.indices_to_stage_codes(indices))
    else:
      back = q.codes_to_indices(codes)
    searches = q.latents_to_searches(z)
    return indices, flat, q.indices_to_codes(indices), back, searches

  out, train = compiled(quantizer, forward)(variables, z)
  indices, flat, codes, back, searches = compiled(quantizer, lookups)(
    variables, z, out.codes
  )
  assert out.z_q.shape == z.shape and out.z_q.dtype == dtype
  assert indices.shape == (2, *quantizer.index_shape(grid))
  assert indices.ndim == 1 + len(quantizer.index_axes)
  assert indices.dtype == jnp.int32
  assert indices.min() >= 0 and indices.max() < quantizer.codebook_size
  assert len(np.unique(indices)) > 4, 'the test saw few codes'
  for same in (out.indices, train.indices, back, flat):
    np.testing.assert_array_equal(same, indices)
  assert codes.dtype == jnp.float32
  for same in (out.codes, train.codes):
    assert np.asarray(same).tobytes() == np.asarray(codes).tobytes()
  check_searches(quantizer, searches, np.asarray(indices))
  counts = out.stats['counts']
  assert counts.shape == (quantizer.codes_per_token, quantizer.codebook_size)
  assert counts.dtype == jnp.int32 and counts.sum() == indices.size


def check_searches(quantizer, searches, indices):
  """They choose the indices, each the nearest row of its table."""
  assert len(searches) == len({name for name, _ in quantizer.search_names})
  found = [np.asarray(s.indices).reshape(len(indices), -1) for s in searches]
  join = np.concatenate if quantizer.index_axes == ('n',) else np.stack
  np.testing.assert_array_equal(join(found, -1).reshape(indices.shape), indices)
  for tokens, table, index in searches:
    if table is not None:
      squares = np.square(tokens[..., None, :] - table).sum(-1)
      own = np.take_along_axis(squares, np.asarray(index)[..., None], -1)
      assert (own[..., 0] <= squares.min(-1) + 1e-4).all()


def test_every_quantizer_has_a_form():
  named = {q['name'] for q in tiny.FORMS.values()}
  assert named | {'none'} == set(quantizers.QUANTIZERS)


def test_continuous_passes_latents_and_has_no_indices():
  quantizer = quantizers.build(dict(name='none'), D, 'float32')
  z = jnp.ones((2, 3, D))
  out = quantizer.apply({}, z)
  np.testing.assert_array_equal(out.codes, z)
  assert out.indices is None and quantizer.codebook_size == 0
  for method in ('latents_to_indices', 'indices_to_codes', 'codes_to_indices'):
    with pytest.raises(UserError, match='continuous'):
      quantizer.apply({}, z, method=method)


@pytest.mark.parametrize(
  'kind, fields, key',
  [
    ('fsq-centered', dict(bound='tan'), '"tanh"'),
    ('fsq-centered', dict(adapter_in='mlp'), 'quantizer.bound="clip"'),
    ('fsq-cosmos', dict(bound='clip'), 'convention="centered"'),
    ('fsq-fourier', dict(projection=False), 'quantizer.projection=True'),
    ('fsq-centered', dict(levels=(8, 1)), 'levels'),
    ('fsq-centered', dict(levels=(64,) * 6), '2147483648'),
    ('fsq-centered', dict(levels='8,8'), 'levels'),
    ('fsq-centered', dict(level=(8, 8)), '"levels"'),
    ('fsq-centered', dict(convention='center'), '"centered"'),
    ('fsq-centered', dict(projection=False), '3 channels, latents 32'),
    ('fsq-cosmos', dict(levels=(8, 5), epsilon=0.5), 'epsilon=0.5'),
    ('fsq-cosmos', dict(levels=(2048, 4)), 'epsilon=0.001'),
    ('fsq-cosmos', dict(preserve_symmetry=1), 'preserve_symmetry=1'),
    ('fsq-centered', dict(preserve_symmetry=True), 'convention="cosmos"'),
    ('fsq-cosmos', dict(noise_dropout=0.5), 'preserve_symmetry=True'),
    ('fsq-symmetric', dict(noise_dropout=1.5), 'noise_dropout=1.5'),
    ('fsq-fourier', dict(projection='mlp'), 'projection=True'),
    ('lfq', dict(bits=31), 'bits=31 .*grouped'),
    ('fsq-cosmos', dict(levels=(64,) * 6), 'levels.*grouped'),
    ('lfq', dict(bits=0), 'bits=0'),
    ('lfq', dict(bits=20000), 'bits=20000 .*grouped'),
    ('fsq-cosmos', dict(levels=(2,) * 1000), '1000 numbers .*grouped'),
    ('fsq-centered', dict(levels=(2**25,)), 'levels.*16777216'),
    ('bsq', dict(entropy_bits=3), 'entropy_bits=3'),
    ('lfq', dict(num_codes=8), 'num_codes'),
    ('gumbel', dict(num_codes=0), 'num_codes=0'),
    ('vq-ema', dict(distance='cos'), '"cosine"'),
    ('vq-ema', dict(projection='linear'), "projection='linear'"),
    ('vq-ema', dict(entropy_temperature=0.0), 'entropy_temperature'),
    ('vq-ema', dict(update='sgd'), 'gradient'),
    ('vq-cosine', dict(affine=True), 'affine=True .*"l2"'),
    ('vq-ema', dict(decay=1.0), 'decay'),
    ('vq-ema', dict(num_codes=0), 'num_codes'),
    ('vq-ema', dict(epsilon=-1.0), 'epsilon'),
    ('vq-ema', dict(code_dim=-3), 'code_dim=-3'),
    ('vq-ema', dict(code_dim=5), '5 channels, latents 32'),
    ('vq-ema', dict(latent_dim=7), 'latent_dim'),
    ('vq-ema', dict(dtype='foo'), 'model.dtype'),
    ('vq-ema', dict(post_quant=dict(kernel=2)), 'odd'),
    ('vq-ema', dict(post_quant=dict(kernal=3)), '"kernel"'),
    ('vq-ema', dict(post_quant=dict(space='pixel')), 'post_quant.space'),
    ('simvq-l2', dict(basis_std=0.0), 'basis_std'),
    ('simvq-l2', dict(code_dim=0), 'code_dim'),
    ('simvq-l2', dict(code_scale='unit'), 'distance="cosine"'),
    ('simvq-cosine', dict(code_scale='one'), 'code_scale='),
    ('none', dict(code_dim=-3), 'code_dim=-3'),
  ],
)
def test_errors_name_the_key(kind, fields, key):
  with pytest.raises(UserError, match=key):
    quantizer = quantizers.build(tiny.quantizer(kind, **fields), D, 'float32')
    jax.eval_shape(quantizer.init, jax.random.key(0), jnp.zeros((2, D)))
