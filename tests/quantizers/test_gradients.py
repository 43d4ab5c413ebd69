"""Gradients through quantisation against the analytic ones, to 1e-6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax import quantizers
from vqrae_jax.ops import codes

D = 6


def made(kind, **fields):
  section = tiny.quantizer(kind) | dict(projection=False) | fields
  if section['name'] == 'fsq':
    section['levels'] = (8, 5, 4, 7, 2, 3)
  elif section['name'] in ('lfq', 'bsq'):
    section['bits'] = D
  else:
    section['code_dim'] = D
  quantizer = quantizers.build(section, D, 'float32')
  z = jax.random.normal(jax.random.key(0), (5, 7, D))
  return quantizer, tiny.drawn(quantizer, z), z


def gradient(quantizer, variables, z, weights):
  """d(sum weights * z_q) / dz of the training forward."""

  def total(z):
    return jnp.sum(weights * quantizer.apply(variables, z, train=True).z_q)

  return jax.jit(jax.grad(total))(z)


def analytic(kind, quantizer, variables, z, w):
  z, w = np.asarray(z, np.float64), np.asarray(w, np.float64)
  if kind == 'fsq-centered':
    half = (np.array(quantizer.levels) - 1) / 2
    return w * half * (1 - np.tanh(z) ** 2)
  if kind == 'fsq-cosmos':
    levels = np.array(quantizer.levels)
    half = (levels - 1) * (1 + quantizer.epsilon) / 2
    shift = np.arctanh(np.where(levels % 2 == 0, 0.5, 0) / half)
    return w * half * (1 - np.tanh(z + shift) ** 2) / (levels // 2)
  if kind == 'lfq' or kind.startswith('vq'):
    return w
  if kind == 'gumbel':  # without draws, at a temperature of 1
    params = variables['params']
    logits = z @ params['kernel'] + params['bias']
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    by_p = w @ np.asarray(params['codes'], np.float64).T
    by_logit = p * (by_p - (p * by_p).sum(-1, keepdims=True))
    return by_logit @ np.asarray(params['kernel'], np.float64).T
  # z -> sqrt(D) z / |z|: the part of w across z, over the token's RMS.
  rms = np.sqrt((z**2).mean(-1, keepdims=True))
  if kind == 'bsq':
    w = w / np.sqrt(D)
  unit = z / rms
  return (w - unit * (w * unit).mean(-1, keepdims=True)) / rms


@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_surrogate_derivative(kind):
  quantizer, variables, z = made(kind)
  weights = jax.random.normal(jax.random.key(2), z.shape)
  found = np.asarray(gradient(quantizer, variables, z, weights))
  want = analytic(kind, quantizer, variables, z, weights)
  error = np.abs(found - want).max() / np.abs(want).max()
  assert error < 1e-6, error


def test_simvq_without_normalisation_passes_straight():
  quantizer, variables, z = made('simvq-l2', normalize=False)
  weights = jax.random.normal(jax.random.key(2), z.shape)
  found = gradient(quantizer, variables, z, weights)
  np.testing.assert_array_equal(found, weights)


def test_the_rotation_turns_gradients_with_the_token():
  """By the scaled rotation's transpose, written out as a matrix; the value is
  the code, and nothing but the gradient changes."""
  quantizer, variables, z = made('vq-gradient', rotation=True)
  weights = jax.random.normal(jax.random.key(2), z.shape)
  found = np.asarray(gradient(quantizer, variables, z, weights))
  out = quantizer.apply(variables, z, train=True)
  rotated = codes.rotate(z, out.codes)
  np.testing.assert_allclose(rotated, out.codes, atol=1e-5)
  want = np.zeros(z.shape)
  for at in np.ndindex(z.shape[:-1]):
    a, b = np.asarray(z[at], np.float64), np.asarray(out.codes[at], np.float64)
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine, plane = u @ v, np.outer(v, u) - np.outer(u, v)
    # Rodrigues' formula in any number of dimensions.
    matrix = np.eye(D) + plane + plane @ plane / (1 + cosine)
    np.testing.assert_allclose(matrix @ u, v, atol=1e-9)
    want[at] = np.linalg.norm(b) / np.linalg.norm(a) * matrix.T @ weights[at]
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
  plain, _, _ = made('vq-gradient')
  assert plain.apply(variables, z, train=True).losses == out.losses


def test_opposite_and_absent_tokens_have_finite_gradients():
  """Where no plane of rotation is defined."""
  z = jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
  target = jnp.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
  found = jax.grad(lambda z: codes.rotate(z, target).sum())(z)
  assert np.isfinite(found).all()


@pytest.mark.parametrize('kind', ('vq-gradient', 'simvq-l2', 'simvq-cosine'))
def test_each_loss_moves_its_own_side(kind):
  """commit moves latents only, codebook moves codes only; both are means."""
  quantizer, variables, z = made(kind)
  out = quantizer.apply(variables, z, train=True)
  np.testing.assert_allclose(out.losses['commit'], out.losses['codebook'])

  def loss(params, z, name):
    v = variables | {'params': params}
    return quantizer.apply(v, z, train=True).losses[name]

  for name, moved in (('commit', 'z'), ('codebook', 'params')):
    by_params, by_z = jax.grad(loss, (0, 1))(variables['params'], z, name)
    size = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(by_params))
    assert (size > 0) == (moved == 'params')
    assert (float(jnp.abs(by_z).sum()) > 0) == (moved == 'z')


@pytest.mark.parametrize('distance', ('l2', 'cosine'))
def test_gradients_of_few_tokens_are_those_of_the_table(distance):
  """SimVQ's map learns from the rows that few tokens read, from the table if
  they are many."""
  quantizer, variables, z = made(f'simvq-{distance}', num_codes=32)
  assert 2 * z[0, :, 0].size <= 32 < 2 * z[..., 0].size

  @jax.jit
  @jax.grad
  def gradient(params, z):
    v = variables | {'params': params}
    return quantizer.apply(v, z, train=True).losses['codebook']

  many = gradient(variables['params'], z)
  few = [gradient(variables['params'], part) for part in z]
  found = jax.tree.map(lambda *parts: sum(parts) / len(parts), *few)
  for name, want in many.items():
    size = jnp.abs(want).max()
    assert size > 1e-3
    np.testing.assert_allclose(found[name], want, atol=1e-5 * size)


@pytest.mark.parametrize('few', (False, True))
def test_codes_beside_a_gradient_are_those_of_their_indices(few):
  """Bitwise, in a table that is normalized."""
  quantizer, variables, z = made('simvq-cosine', num_codes=96 if few else 32)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(params, z):
    v = variables | {'params': params}
    out = quantizer.apply(v, z, train=True)
    return out.losses['codebook'], (out.codes, out.indices)

  _, (found, indices) = run(variables['params'], z)
  read = functools.partial(quantizer.apply, method='indices_to_codes')
  np.testing.assert_array_equal(found, jax.jit(read)(variables, indices))


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-l2', 'fsq-cosmos'))
def test_latents_that_are_not_finite_reach_the_decoder(kind):
  """In training, where a step is skipped by its losses: of a frozen encoder
  without `commit` no other has them."""
  quantizer, variables, z = made(kind)
  out = quantizer.apply(variables, z.at[0, 0, 0].set(jnp.nan), train=True)
  assert not jnp.isfinite(out.z_q[0, 0]).all()


def test_straight_through_is_exact_in_bf16():
  s = jax.random.normal(jax.random.key(0), (4096,)).astype(jnp.bfloat16)
  q = jax.random.normal(jax.random.key(1), (4096,)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(jax.jit(codes.straight_through)(s, q), q)
