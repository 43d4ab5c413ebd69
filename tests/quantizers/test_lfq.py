"""Sign codes: the order of their bits, which is a format, and their entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import quantizers


def made(name, bits, **fields):
  section = dict(name=name, bits=bits, projection=False)
  return quantizers.build(section | fields, bits, 'float32')


@pytest.mark.parametrize('name, size', [('lfq', 1.0), ('bsq', 3**-0.5)])
def test_indices_and_codes_are_pinned(name, size):
  """The last channel is least significant; 0 counts as below."""
  quantizer = made(name, 3)
  z = jnp.array([[-1.0, -2, 0.5], [3, 0, -1], [0, 1, 0], [2, 1, 7]])
  out = quantizer.apply({}, z)
  np.testing.assert_array_equal(out.indices, [1, 4, 2, 7])
  signs = [[-1, -1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, 1]]
  np.testing.assert_allclose(out.codes, np.array(signs) * size, rtol=1e-7)


@pytest.mark.parametrize('name', ('lfq', 'bsq'))
def test_as_many_bits_as_an_index_holds(name):
  quantizer = made(name, 30)
  indices = jnp.array([0, 1, 2**29, 2**30 - 1, 715827882])
  codes = quantizer.apply({}, indices, method='indices_to_codes')
  assert len(np.unique(codes, axis=0)) == 5
  back = quantizer.apply({}, codes, method='codes_to_indices')
  np.testing.assert_array_equal(back, indices)


def binary_entropies(z, size, temperature):
  """f64 p[n c] of a channel's bit being 1, and entropy of such."""
  p = 1 / (1 + np.exp(-4 * size * np.asarray(z, 'f8') / temperature))
  entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
  return p, entropy


@pytest.mark.parametrize('name, bits', [('lfq', 14), ('bsq', 6)])
def test_the_entropy_by_bits(name, bits):
  """Without `entropy_bits` BSQ's and a large LFQ's: the sum over bits."""
  quantizer = made(name, bits, entropy_gamma=0.3, entropy_temperature=0.9)
  z = jax.random.normal(jax.random.key(0), (2, 20, bits))
  run = jax.jit(
    lambda z: quantizer.apply({}, z, losses=('entropy',)).losses['entropy']
  )
  x = np.asarray(z, 'f8').reshape(-1, bits)
  if name == 'bsq':
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
  size = bits**-0.5 if name == 'bsq' else 1
  p, entropy = binary_entropies(x, size, 0.9)
  want = entropy(p).sum(-1).mean() - 0.3 * entropy(p.mean(0)).sum()
  np.testing.assert_allclose(run(z), want, rtol=1e-5)


def test_bits_taken_together_have_no_more_entropy():
  """A token's is the same however they are grouped; the mean's is less where
  bits depend on each other."""
  z = jax.random.normal(jax.random.key(0), (300, 2)).repeat(2, -1)

  def entropy(together, gamma):
    quantizer = made(
      'lfq', 4, entropy_bits=together, entropy_gamma=gamma,
      entropy_temperature=1.0,
    )  # fmt: skip
    run = lambda z: quantizer.apply({}, z, losses=('entropy',))  # noqa: E731
    return jax.jit(run)(z).losses['entropy']

  own = [entropy(g, 0.0) for g in (1, 2)]
  np.testing.assert_allclose(own[0], own[1], rtol=1e-5)
  by_one, by_two = (own[0] - entropy(g, 1.0) for g in (1, 2))
  assert by_one > 1.05 * by_two > 0
