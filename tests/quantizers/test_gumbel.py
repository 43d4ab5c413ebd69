"""Gumbel-softmax against its formulas in plain torch, and its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from vqrae_jax import quantizers
from vqrae_jax.ops import codes as code_ops

B, N, D, K = 2, 5, 6, 9
Z = jax.random.normal(jax.random.key(0), (B, N, D))
KEYS = jax.random.split(jax.random.key(1), B)


def made():
  quantizer = quantizers.build(dict(name='gumbel', num_codes=K), D, 'float32')
  return quantizer, quantizer.init(jax.random.key(2), Z)


def training(quantizer, variables, z=Z, keys=KEYS, temperature=0.7, **losses):
  random = dict(samples=keys, temperature=temperature)

  @jax.jit
  def run(variables, z, random):
    return quantizer.apply(variables, z, train=True, random=random, **losses)

  return run(variables, z, random)


def test_values_and_gradients_are_the_formulas():
  """A hard sample, straight through to the softmax; KL to uniform codes."""
  torch = pytest.importorskip('torch')
  quantizer, variables = made()
  weights = np.array(jax.random.normal(jax.random.key(3), Z.shape))

  def total(params, z):
    out = training(quantizer, {'params': params}, z, losses=('kl',))
    return jnp.sum(weights * out.z_q) + 0.3 * out.losses['kl'], out

  (by_params, by_z), out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(
    variables['params'], Z
  )

  # Each token's noise comes from its sample's key and its place.
  draw = jax.jit(
    lambda key, i: jax.random.gumbel(jax.random.fold_in(key, i), (K,))
  )
  noise = [[draw(key, i) for i in range(N)] for key in KEYS]
  x, kernel, bias, codes = (
    torch.from_numpy(np.array(a)).requires_grad_()
    for a in (Z, *(variables['params'][n] for n in ('kernel', 'bias', 'codes')))
  )
  logits = x @ kernel + bias
  noisy = logits + torch.from_numpy(np.array(noise))
  soft = (noisy / 0.7).softmax(-1)
  hard = torch.nn.functional.one_hot(noisy.argmax(-1), K) + soft - soft.detach()
  z_q, p = hard @ codes, logits.softmax(-1)
  kl = (p * (p * K).log()).sum(-1).mean()
  ((torch.from_numpy(weights) * z_q).sum() + 0.3 * kl).backward()
  np.testing.assert_array_equal(out.indices, noisy.argmax(-1))
  np.testing.assert_allclose(out.z_q, z_q.detach(), atol=1e-5)
  np.testing.assert_allclose(out.losses['kl'], kl.item(), rtol=1e-5)
  for found, want in (
    (by_z, x), (by_params['kernel'], kernel), (by_params['bias'], bias),
    (by_params['codes'], codes),
  ):  # fmt: skip
    want = want.grad.numpy()
    np.testing.assert_allclose(
      found, want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


def test_draws_belong_to_samples_and_none_are_made_at_inference():
  quantizer, variables = made()
  z = jnp.broadcast_to(Z[:1], Z.shape)
  both = training(quantizer, variables, z).indices
  alone = training(quantizer, variables, z[1:], KEYS[1:]).indices
  np.testing.assert_array_equal(both[1:], alone)
  assert (both[0] != both[1]).any()
  logits = Z @ variables['params']['kernel'] + variables['params']['bias']
  for out in (
    quantizer.apply(variables, Z),
    quantizer.apply(variables, Z, train=True),
  ):
    np.testing.assert_array_equal(out.indices, logits.argmax(-1))


def test_codes_are_drawn_as_the_softmax_says():
  quantizer, variables = made()
  z = jnp.broadcast_to(Z[:1, :1], (1, 4000, D))
  found = training(quantizer, variables, z, KEYS[:1]).stats['counts'][0] / 4000
  logits = Z[0, 0] @ variables['params']['kernel']
  np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=0.03)


def test_exported_with_a_symbolic_batch(monkeypatch):
  """A count of tokens is a symbol, and goes through chunks of 3 tokens."""
  quantizer, variables = made()
  want = quantizer.apply(variables, Z).indices
  monkeypatch.setattr(code_ops, 'SCORES_PER_CHUNK', K * 3)
  (b,) = export.symbolic_shape('b')
  encode = jax.jit(
    lambda z: quantizer.apply(variables, z, method='latents_to_indices')
  )
  z = jax.ShapeDtypeStruct((b, N, D), jnp.float32)
  np.testing.assert_array_equal(export.export(encode)(z).call(Z), want)
