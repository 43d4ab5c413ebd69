"""Fixed sin-cos position embeddings on a 2-d grid.

Sin-cos follows the layout of MAE (arXiv 2111.06377) and of RAE's decoder: the
first half of the channels encodes the column, the second the row, each as
[sin | cos] with frequencies 10000^(-k / (d/4)).
"""

import numpy as np


def _coordinates(n: int, native: int) -> np.ndarray:
  """Coordinates of n tokens on a line of `native` ones: 0, 1, … if equal."""
  return (np.arange(n) + 0.5) * (native / n) - 0.5


def sincos2d(
  width: int, grid: tuple[int, int], native: tuple[int, int]
) -> np.ndarray:
  """f32[gh*gw width], the fixed embedding of `grid` in `native` coordinates.

  At the native grid the coordinates are 0, 1, …; another grid spans the same
  extent, so a wider image is seen through the positions the model knows.
  """
  rows = _coordinates(grid[0], native[0])
  cols = _coordinates(grid[1], native[1])
  omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))

  def line(positions):
    angles = positions[:, None] * omega[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  by_col = np.broadcast_to(line(cols)[None], (*grid, width // 2))
  by_row = np.broadcast_to(line(rows)[:, None], (*grid, width // 2))
  table = np.concatenate([by_col, by_row], axis=-1)
  return table.reshape(-1, width).astype(np.float32)
