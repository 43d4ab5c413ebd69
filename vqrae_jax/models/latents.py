"""Latents normalized to mean 0 and variance 1 before quantization.

As in RAE (arXiv 2510.11690): (z - mean) / sqrt(var + 1e-5), directly after the
encoder, with statistics per channel, or per channel and position; the inverse
is applied before the decoder. Mean and std are data, not parameters: they are
in the linen collection "codebook", and no training step changes them.

A statistics file has the arrays "mean" and "var". Ours are [d] or [gh gw d]
(`python -m vqrae_jax.latent_stats`); RAE's have the channel first, [d gh gw].
The model's shape determines the layout.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError
from vqrae_jax.specs import LatentsSpec
from vqrae_jax.weights import files as weights

EPS = 1e-5  # RAE's, added to the variance
COMMAND = 'python -m vqrae_jax.latent_stats'


def stats_shape(spec: LatentsSpec, d: int) -> tuple[int, ...]:
  """The shape of mean and std: (d,), or (gh, gw, d)."""
  return (*spec.grid, d) if spec.grid else (d,)


class LatentNorm(nn.Module):
  """Normalizes latents f[b gh gw d] and denormalizes them for the decoder;
  with the norm "none", the identity, without variables.

  Both compute in f32; the leaves are codebook/latents/{mean,std}, f32[d] or
  f32[gh gw d].
  """

  spec: LatentsSpec
  latent_dim: int

  def setup(self):
    if self.spec.norm == 'none':
      return
    shape = stats_shape(self.spec, self.latent_dim)
    self.mean = self.variable('codebook', 'mean', jnp.zeros, shape)
    self.std = self.variable('codebook', 'std', jnp.ones, shape)

  def normalise(
    self, latents: Float[Array, 'b gh gw d']
  ) -> Float[Array, 'b gh gw d']:
    """f[b gh gw d] -> f32, (z - mean) / std: as the quantizer reads them.

    Raises:
      UserError: the statistics are per position, for another grid.
    """
    if self.spec.norm == 'none':
      return latents
    z = latents.astype(jnp.float32)
    # Initialization uses an image of one token, and only its shapes.
    if self.is_initializing():
      return z
    check_grid(self.spec, z.shape[1:3], 'the image')
    return (z - self.mean.value) / self.std.value

  def inverse(
    self, z_q: Float[Array, 'b gh gw d']
  ) -> Float[Array, 'b gh gw d']:
    """f[b gh gw d] -> the same type, z * std + mean: as the decoder reads it.

    Raises:
      UserError: as `normalise`.
    """
    if self.spec.norm == 'none' or self.is_initializing():
      return z_q
    check_grid(self.spec, z_q.shape[1:3], 'the image')
    z = z_q.astype(jnp.float32) * self.std.value + self.mean.value
    return z.astype(z_q.dtype)


def check_grid(spec: LatentsSpec, grid: tuple[int, ...], what: str) -> None:
  """Checks that `what` has the grid of the per-position statistics.

  Raises:
    UserError: it has another grid.
  """
  if spec.grid and tuple(grid) != spec.grid:
    (gh, gw), (h, w) = spec.grid, grid
    raise UserError(
      f'{what} has {h}x{w} tokens, but the statistics of latents '
      f'(model.latents, norm="position") are of {gh}x{gw}: resize it to that '
      'many patches, or train with norm="channel", which takes any grid'
    )


def read_statistics(source: weights.WeightFile) -> dict[str, np.ndarray]:
  """{"mean", "var"} of a file, in its own shapes.

  Raises:
    UserError: other arrays, shapes that differ, values that are not finite in
      f32, a negative variance.
  """
  if set(source) != {'mean', 'var'}:
    has = ', '.join(sorted(source)[:4]) or 'nothing'
    raise UserError(
      f'{source.name} must hold "mean" and "var" of latents; it holds {has}'
    )
  arrays = {k: np.asarray(array.read()) for k, array in source.items()}
  mean, var = arrays['mean'], arrays['var']
  limit = np.finfo(np.float32).max
  if mean.shape != var.shape:
    fault = f'mean is {mean.shape} and var {var.shape}; they must be equal'
  elif not all((np.abs(x) < limit).all() for x in (mean, var)):
    fault = 'it holds NaN or infinity in f32; compute it again'
  elif (var < 0).any():
    fault = 'var is negative'
  else:
    return arrays
  raise UserError(f'{source.name}: {fault}')


def _channels_last(x: np.ndarray, want: tuple[int, ...], name: str):
  """x in the shape `want`; x has that shape or RAE's layout."""
  shape = x.shape[1:] if x.ndim == 4 and x.shape[0] == 1 else x.shape
  x = x.reshape(shape)
  first = (want[-1], *want[:-1])
  if len(want) == 3 and shape == want == first:
    raise UserError(
      f'{name}: {shape} does not show whether the channel is first or last'
    )
  if shape == want:
    return x
  if len(want) == 3 and shape == first:
    return np.moveaxis(x, 0, -1)
  also = f', or with the channel first {first}' if len(want) == 3 else ''
  raise UserError(
    f'{name}: mean and var are {x.shape}, the model wants {want}{also}: set '
    f'model.latents accordingly, or compute the statistics again: {COMMAND}'
  )


def leaves_of(
  path: str, spec: LatentsSpec, latent_dim: int
) -> Mapping[str, np.ndarray]:
  """{"codebook/latents/mean" and "…/std": f32} from a statistics file.

  Args:
    path: `.npz` (from `latent_stats` or `convert`), or RAE's own `.pt`.
      Arrays in the model's shape are used directly; RAE's, [d gh gw] or
      [1 d gh gw], are transposed.
    spec: the model's section, with a norm.
    latent_dim: d.

  Raises:
    UserError: no such file, a damaged one, or one of another shape.
  """
  source = weights.open_weights(path)
  want = stats_shape(spec, latent_dim)
  arrays = read_statistics(source)
  mean, var = (
    _channels_last(arrays[k], want, source.name).astype(np.float64)
    for k in ('mean', 'var')
  )
  return {
    'codebook/latents/mean': mean.astype(np.float32),
    'codebook/latents/std': np.sqrt(var + EPS).astype(np.float32),
  }
