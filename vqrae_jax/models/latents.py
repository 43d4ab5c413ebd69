"""Latents brought to mean 0 and variance 1 before they are quantised.

As RAE does it (arXiv 2510.11690): (z - mean) / sqrt(var + 1e-5), right after
the encoder, by statistics of a channel or of each position's channels; the
inverse lies before the decoder. Mean and std are data, not parameters: they
lie in the linen collection "codebook" and no step moves them. Files of them
are read in `latent_files.py`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError
from vqrae_jax.specs import LatentsSpec


def stats_shape(spec: LatentsSpec, d: int) -> tuple[int, ...]:
  """The shape of mean and std: (d,), or (gh, gw, d)."""
  return (*spec.grid, d) if spec.grid else (d,)


class LatentNorm(nn.Module):
  """Normalises latents f[b gh gw d], and what the decoder reads back.

  Both compute in f32; the leaves are codebook/latents/{mean,std}, f32[d] or
  f32[gh gw d].
  """

  spec: LatentsSpec
  latent_dim: int

  def setup(self):
    shape = stats_shape(self.spec, self.latent_dim)
    self.mean = self.variable('codebook', 'mean', jnp.zeros, shape)
    self.std = self.variable('codebook', 'std', jnp.ones, shape)

  def normalise(
    self, latents: Float[Array, 'b gh gw d']
  ) -> Float[Array, 'b gh gw d']:
    """f[b gh gw d] -> f32, (z - mean) / std.

    Raises:
      UserError: statistics by position, of another grid.
    """
    z = latents.astype(jnp.float32)
    # Parameters are made on an image of one token, and its values are none.
    if self.is_initializing():
      return z
    check_grid(self.spec, z.shape[1:3], 'the image')
    return (z - self.mean.value) / self.std.value

  def inverse(
    self, z_q: Float[Array, 'b gh gw d']
  ) -> Float[Array, 'b gh gw d']:
    """f[b gh gw d] -> the same type, z * std + mean.

    Raises:
      UserError: as `normalise`.
    """
    if self.is_initializing():
      return z_q
    check_grid(self.spec, z_q.shape[1:3], 'the image')
    z = z_q.astype(jnp.float32) * self.std.value + self.mean.value
    return z.astype(z_q.dtype)


def check_grid(spec: LatentsSpec, grid: tuple[int, ...], what: str) -> None:
  """Statistics by position are of the grid that `what` has.

  Raises:
    UserError: they are of another.
  """
  if spec.grid and tuple(grid) != spec.grid:
    (gh, gw), (h, w) = spec.grid, grid
    raise UserError(
      f'{what} has {h}x{w} tokens, and the statistics of latents '
      f'(model.latents, norm="position") are of {gh}x{gw}: resize it to that '
      'many patches, or train with norm="channel", which takes any grid'
    )
