"""A patch discriminator with blur pooling (TiTok's, arXiv 2406.07550).

Convolutions with "same" zero padding; the grid is halved with the blur
(1 3 3 1), which prevents aliasing (arXiv 1904.11486). No weights are published:
it starts from random ones. It computes on pixels in [-1, 1], TiTok's on [0, 1]:
the first convolution can learn either.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from vqrae_jax.errors import UserError
from vqrae_jax.nn.spectral import uniform
from vqrae_jax.ops.images import need_floats
from vqrae_jax.specs import DTYPES, at_least, one_of

BLUR = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def halved(x: Array, axis: int) -> Array:
  """Every second sample of `x` blurred along `axis`, zeros beyond its ends."""
  n = x.shape[axis]
  m = -(-n // 2)
  missing = 2 * (m - 1) + len(BLUR) - n
  pads = [(0, 0)] * x.ndim
  pads[axis] = (missing // 2, missing - missing // 2)
  x = jnp.pad(x, pads)
  return sum(
    weight * jax.lax.slice_in_dim(x, i, i + 2 * m - 1, 2, axis)
    for i, weight in enumerate(BLUR)
  )


def max_pooled(x: Array, size: int, axis: int) -> Array:
  """Maxima over `size` equal parts of `axis`, overlapping where n % size.

  By comparing pairs: the gradient of `jnp.max` divides by the number of values
  that equal the maximum, and is NaN if a compiler computes them twice and
  rounds differently (XLA's CPU backend at optimization level 0, 2026-11).
  """
  n = x.shape[axis]
  first = np.arange(size) * n // size
  last = -(-(np.arange(size) + 1) * n // size) - 1
  result = None
  for i in range((last - first).max() + 1):
    at = np.minimum(first + i, last)
    if n % size == 0:
      value = jax.lax.slice_in_dim(x, i, None, n // size, axis)
    else:
      value = jnp.take(x, at, axis)
    result = value if i == 0 else jnp.where(value > result, value, result)
  return result


class PatchGAN(nn.Module):
  """images f32[b h w 3] in [0, 1] -> logits f32[b n], high for real.

  Widths are `hidden` times 1, 1, 2, 4, …; n = pool^2, or the size of the last
  grid if `pool` is 0. The defaults have 1,909,889 parameters.

  Attributes:
    hidden: the width of the first layer, a multiple of `groups`. At least 1
      channel.
    halvings: how often the grid is halved. At least 1.
    groups: of the group norms. At least 1.
    pool: the side that the grid is max-pooled to after the last halving; 0: not
      pooled. At least 0 positions.
    dtype: what it computes in; the model's if omitted. One of "float32",
      "bfloat16".
    remat: whether the gradient recomputes the layers between the halvings; the
      model's if omitted.
  """

  hidden: int = 128
  halvings: int = 3
  groups: int = 32
  pool: int = 16
  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    where = 'discriminator.fields.'
    at_least(1, where, self, 'hidden', 'halvings', 'groups')
    at_least(0, where, self, 'pool')
    one_of(f'{where}dtype', self.dtype, DTYPES)
    if self.hidden % self.groups:
      raise UserError(
        f'{where}hidden={self.hidden} must be a multiple of '
        f'{where}groups={self.groups}'
      )
    super().__post_init__()

  def _conv(self, x: Array, features: int, side: int, name: str) -> Array:
    init = uniform(side * side * x.shape[-1])
    return nn.Conv(
      features,
      (side, side),
      dtype=self.dtype,
      kernel_init=init,
      bias_init=init,
      name=name,
    )(x)

  @nn.compact
  def __call__(self, images: Shaped[Array, 'b h w 3']) -> Float[Array, 'b n']:
    need_floats(images, "the discriminator's images")

    def half(self, x, i):
      if i == 0:
        x = self._conv(2 * x - 1, self.hidden, 5, 'conv_in')
        x = nn.leaky_relu(x, 0.1)
      x = self._conv(x, self.hidden * 2**i, 3, f'conv{i}')
      x = halved(halved(x, 1), 2)
      x = nn.GroupNorm(
        self.groups,
        epsilon=1e-5,
        dtype=self.dtype,
        use_fast_variance=False,
        name=f'norm{i}',
      )(x)
      return nn.leaky_relu(x, 0.1)

    half = nn.remat(half, static_argnums=2) if self.remat else half
    x = images
    for i in range(self.halvings):
      x = half(self, x, i)
    if self.pool:
      x = max_pooled(max_pooled(x, self.pool, 1), self.pool, 2)
    x = nn.leaky_relu(self._conv(x, x.shape[-1], 1, 'conv_mix'), 0.1)
    x = self._conv(x, 1, 5, 'conv_out')
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2]).astype(jnp.float32)
