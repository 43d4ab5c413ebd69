"""Latents brought to mean 0 and variance 1 before they are quantised.

As RAE does it (arXiv 2510.11690): (z - mean) / sqrt(var + 1e-5), right after
the encoder, by statistics of a channel or of each position's channels; the
inverse lies before the decoder. Mean and std are data, not parameters: they
lie in the linen collection "codebook" and no step moves them. Files of them
are read in `latent_files.py`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax import weights
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


# ----------------------------------------------------------------------------
# Files of latents' statistics: "mean" and "var", ours and RAE's.
#
# Ours are [d] or [gh gw d] (`python -m vqrae_jax.latent_stats`); RAE's have the
# channel first, [d gh gw]. A file does not say which it is: the model's shape
# does. What becomes of them is in `latents.py`.

_LARGEST = np.finfo(np.float32).max
EPS = 1e-5  # RAE's, added to the variance
COMMAND = 'python -m vqrae_jax.latent_stats'


def read_statistics(source: weights.WeightFile) -> dict[str, np.ndarray]:
  """{"mean", "var"} of a file, as it has them.

  Raises:
    UserError: other arrays, shapes that differ, NaN, a negative variance.
  """
  if set(source) != {'mean', 'var'}:
    has = ', '.join(sorted(source)[:4]) or 'nothing'
    raise UserError(
      f'{source.name} holds no "mean" and "var" of latents, but {has}'
    )
  arrays = {k: np.asarray(h.read()) for k, h in source.items()}
  if arrays['mean'].shape != arrays['var'].shape:
    raise UserError(
      f'{source.name}: mean is {arrays["mean"].shape}, var '
      f'{arrays["var"].shape}; they must be alike'
    )
  if not all((np.abs(x) < _LARGEST).all() for x in arrays.values()):
    raise UserError(
      f'{source.name} holds NaN or infinity in f32; compute it again'
    )
  if (arrays['var'] < 0).any():
    raise UserError(f'{source.name}: var is negative; it is no variance')
  return arrays


def _laid(x: np.ndarray, want: tuple[int, ...], name: str) -> np.ndarray:
  """x as `want` (channel last), from that or from RAE's layout."""
  shape = x.shape[1:] if x.ndim == 4 and x.shape[0] == 1 else x.shape
  x = x.reshape(shape)
  first = (want[-1], *want[:-1])
  if len(want) == 3 and shape == want == first:
    raise UserError(
      f'{name}: {shape} is as many channels as rows and columns, and does not '
      'say whether the channel is first or last'
    )
  if shape == want:
    return x
  if len(want) == 3 and shape == first:
    return np.moveaxis(x, 0, -1)
  also = f', or with the channel first {first}' if len(want) == 3 else ''
  raise UserError(
    f'{name}: mean and var are {x.shape}, the model wants {want}{also}: set '
    f'model.latents to what the file is, or compute it again: {COMMAND}'
  )


def leaves_of(
  path: str, spec: LatentsSpec, latent_dim: int
) -> Mapping[str, np.ndarray]:
  """{"codebook/latents/mean" and "…/std": f32} of a file of statistics.

  Args:
    path: `.npz` (of `latent_stats`, or of `convert`), or RAE's own `.pt`.
      Arrays of the model's shape are taken as they are; [d gh gw] and
      [1 d gh gw] are RAE's, and transposed.
    spec: the model's section, with a norm.
    latent_dim: d.

  Raises:
    UserError: no such file, a damaged one, or one of another shape.
  """
  source = weights.open_weights(path)
  found = read_statistics(source)
  want = stats_shape(spec, latent_dim)
  mean, var = (
    _laid(found[k], want, source.name).astype(np.float64)
    for k in ('mean', 'var')
  )
  return {
    'codebook/latents/mean': mean.astype(np.float32),
    'codebook/latents/std': np.sqrt(var + EPS).astype(np.float32),
  }
