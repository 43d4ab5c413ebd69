"""Fixed positions on a 2-d grid: sin-cos to add, rotations of queries and keys.

Sin-cos follows the layout of MAE (arXiv 2111.06377) and of RAE's decoder: the
first half of the channels encodes the column, the second the row, each as
[sin | cos] with frequencies 10000^(-k / (d/4)).

Rotations are those of DINOv3 (2508.10104; RoPE, 2104.09864) in normalised
coordinates: rows and columns each run from -1 to 1 whatever the grid, so no
grid needs interpolation. DINOv3's random shifts and scales of them in training
are omitted.
"""

from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

ROPE_BASE = 100.0  # the only base that `encoders/dinov3.py` accepts
Rotation = tuple[Float[ArrayLike, 'n c'], Float[ArrayLike, 'n c']]


def _numpy_of(grid: tuple) -> ModuleType:
  return np if all(isinstance(n, int) for n in grid) else jnp


def _coordinates(n: int, native: int) -> ArrayLike:
  """Coordinates of n tokens on a line of `native` ones: 0, 1, … if equal."""
  return (_numpy_of((n,)).arange(n) + 0.5) * (native / n) - 0.5


def sincos2d(
  width: int, grid: tuple[int, int], native: tuple[int, int]
) -> ArrayLike:
  """f32[gh*gw width], the fixed embedding of `grid` in `native` coordinates.

  At the native grid the coordinates are 0, 1, …; another grid spans the same
  extent, so a larger image has positions within the trained range.
  """
  rows, cols = map(_coordinates, grid, native)
  return sincos_at(width, rows, cols)


def sincos_at(width: int, rows: ArrayLike, cols: ArrayLike) -> ArrayLike:
  """f32[gh*gw width], the fixed embedding of these coordinates."""
  grid = rows.shape[0], cols.shape[0]
  xp = _numpy_of(grid)
  omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))

  def line(positions):
    angles = positions[:, None] * omega[None]
    return xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=1)

  by_col = xp.broadcast_to(line(cols)[None], (*grid, width // 2))
  by_row = xp.broadcast_to(line(rows)[:, None], (*grid, width // 2))
  table = xp.concatenate([by_col, by_row], axis=-1)
  return table.reshape(-1, width).astype(np.float32)


def rope2d(head: int, grid: tuple[int, int], prefix: int = 0) -> Rotation:
  """f32 (cosines, sines) [prefix+gh*gw head/2] of the tokens' angles.

  A patch whose centre is at (y, x), both in (-1, 1), has the angles 2π·y·ω and
  then 2π·x·ω with ω_k = 100^(-k / (head/4)). Prefix tokens have the angle 0.

  Args:
    head: channels of a head, a multiple of 4.
    grid: rows and columns of patches.
    prefix: tokens before the patches.
  """
  xp = _numpy_of(grid)
  omega = ROPE_BASE ** (-np.arange(head // 4) / (head / 4))
  rows, cols = ((2 * xp.arange(n) + 1) / n - 1 for n in grid)
  centres = xp.stack(xp.meshgrid(rows, cols, indexing='ij'), axis=-1)
  angles = 2 * np.pi * centres.reshape(-1, 2, 1) * omega
  angles = xp.pad(angles.reshape(-1, head // 2), ((prefix, 0), (0, 0)))
  return xp.cos(angles).astype(np.float32), xp.sin(angles).astype(np.float32)


def rotate(
  x: Float[Array, 'b n heads d'], rotation: Rotation
) -> Float[Array, 'b n heads d']:
  """Rotates channels k and d/2 + k of every head by the token's angle k.

  Computes in f32; the result has the dtype of x.
  """
  cos, sin = (jnp.asarray(a)[:, None] for a in rotation)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)
