"""Spectral norm (arXiv 1802.05957): kernels over their largest singular value.

The value sigma = v'Wu comes from two vectors in the collection "spectral". A
call only reads them; `advance` updates them, once per update, before the
discriminator's gradient. Gradients go through W, not through the vectors.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

EPS = 1e-12  # torch's, the least that both norms divide by


def _unit(x: Array) -> Array:
  # The root's slope at zero never matters: nothing here is differentiated.
  return x / jnp.maximum(jnp.linalg.norm(x), EPS)


def _matrix(kernel: Array) -> Array:
  """[k c o] (or any kernel, outputs last) as the matrix [k*c o]."""
  return kernel.reshape(-1, kernel.shape[-1])


def _iterate(kernel: Array, u: Array) -> tuple[Array, Array]:
  """One power iteration: u f32[o] -> (u, v f32[k*c])."""
  w = _matrix(kernel)
  v = _unit(jnp.einsum('io,o->i', w, u, precision='highest'))
  return _unit(jnp.einsum('io,i->o', w, v, precision='highest')), v


def sigma(kernel: Array, u: Array, v: Array) -> Float[Array, '']:
  """v'Wu, differentiable in the kernel alone."""
  u, v = jax.lax.stop_gradient((u, v))
  return jnp.einsum('i,io,o->', v, _matrix(kernel), u, precision='highest')


def advance(params: Mapping, spectral: Mapping) -> dict[str, Array]:
  """One power iteration for every kernel that has vectors in `spectral`, all of
  them {leaf name: leaf}; {} stays {}."""
  moved = {}
  for name in spectral:
    home, _, last = name.rpartition('/')
    if last == 'u':
      u, v = _iterate(params[f'{home}/kernel'], spectral[name])
      moved |= {name: u, f'{home}/v': v}
  return jax.lax.stop_gradient(moved)


def uniform(fan_in: int) -> nn.initializers.Initializer:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's initialization."""
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class SpectralConv(nn.Module):
  """A circular convolution along tokens, its kernel divided by sigma.

  [b n c] -> [b n features]; `kernel` tokens wide, odd, at most n. Computes in
  `dtype`, sigma in f32.
  """

  features: int
  kernel: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b n c']) -> Float[Array, 'b n o']:
    shape = (self.kernel, x.shape[-1], self.features)
    init = uniform(self.kernel * x.shape[-1])
    kernel = self.param('kernel', init, shape)
    bias = self.param('bias', init, (self.features,))

    first = (None, None)
    if self.is_initializing():
      # One iteration, or sigma could be negative.
      key = self.make_rng('params')
      first = _iterate(kernel, _unit(jax.random.normal(key, shape[-1:])))
    u = self.variable('spectral', 'u', lambda: first[0]).value
    v = self.variable('spectral', 'v', lambda: first[1]).value
    kernel = (kernel / sigma(kernel, u, v)).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.kernel == 1:  # a product: XLA compiles it several times as fast
      y = x @ kernel[0]
    else:
      side = self.kernel // 2
      x = jnp.pad(x, ((0, 0), (side, side), (0, 0)), mode='wrap')
      y = jax.lax.conv_general_dilated(
        x, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
      )
    return y + bias.astype(self.dtype)
