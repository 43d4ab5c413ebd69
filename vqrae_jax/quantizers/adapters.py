"""Maps between latents and FSQ's few channels that are more than linear.

The PyTorch project trained FSQ between a three-layer MLP and a Fourier
unprojection; these are their shapes, so that its checkpoints load. They are
no defaults: sin and cos of codes times large frequencies turn faster than the
codes' steps, so a straight-through gradient through them points nowhere (its
correlation with the true one was -.05, against .995 of a plain MLP).

What it does not do: round, or know an index (`fsq.py`).
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.ops.codes import HIGHEST

MLP_WIDTH = 512
FREQUENCIES = 128
FREQUENCY_STD = 10.0
NORM_EPS = 1e-5


def _norm(dtype: str, name: str) -> nn.Module:
  return nn.LayerNorm(NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


class MlpIn(nn.Module):
  """f32[... d] -> f32[... c]: norm, three layers, tanh, a gain a channel."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _norm('float32', 'norm')(x)
    for i, width in enumerate((MLP_WIDTH, MLP_WIDTH, self.features)):
      x = jax.nn.gelu(x, approximate=False) if i else x
      x = nn.Dense(width, precision=HIGHEST, name=f'dense{i}')(x)
    gain = nn.initializers.constant(3.0)
    return jnp.tanh(x) * self.param('gain', gain, (self.features,))


class FourierOut(nn.Module):
  """Codes [... c] -> [... d]: sin and cos of 2 pi codes @ frequencies, then
  three layers with norms between."""

  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, frequencies: Array) -> Array:
    turns = jnp.matmul(
      2 * math.pi * x.astype(jnp.float32), frequencies, precision=HIGHEST
    )
    x = jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], -1)
    x = x.astype(self.dtype)
    for i in range(3):
      if i:
        x = _norm(self.dtype, f'norm{i - 1}')(x)
        x = jax.nn.gelu(x, approximate=False)
      x = nn.Dense(
        self.features, dtype=self.dtype, precision=HIGHEST, name=f'dense{i}'
      )(x)
    return x
