"""The Fréchet distance between two sets of features (arXiv 1706.08500).

|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of the sets' means and covariances.
Sums are f64 and merge in any order. With C = A A^T the trace of the root is the
sum of the singular values of A1^T A2: no root of a product is taken, so that
singular covariances (fewer images than features) are exact too, and equal sets
are at distance 0.
"""

import dataclasses
import os
import zipfile
import zlib

import numpy as np
from scipy.linalg import lapack

from vqrae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over features: how many, f64[d] of them, f64[d d] of their outer
  products."""

  count: int
  total: np.ndarray
  products: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> 'Moments':
    """Of f[n d]; n may be 0."""
    x = np.asarray(features, np.float64)
    return cls(len(x), x.sum(0), x.T @ x)

  def __add__(self, other: 'Moments | int') -> 'Moments':
    """Of both sets together; 0 is the empty one."""
    if isinstance(other, int):
      return self
    return Moments(
      self.count + other.count,
      self.total + other.total,
      self.products + other.products,
    )

  __radd__ = __add__

  def statistics(self) -> tuple[np.ndarray, np.ndarray]:
    """(mean f64[d], unbiased covariance f64[d d])."""
    mean = self.total / self.count
    squares = self.products - self.count * np.outer(mean, mean)
    return mean, squares / max(self.count - 1, 1)


def load_statistics(
  path: str | os.PathLike, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """(mean, covariance) of a file as pytorch-fid and guided-diffusion write it:
  an .npz with "mu" [d] and "sigma" [d d].

  Raises:
    UserError: no such file, other arrays, or another `width` d.
  """
  try:
    with np.load(path) as file:
      mean, covariance = (np.asarray(file[n], float) for n in ('mu', 'sigma'))
  except (
    OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile,
    zlib.error,
  ) as e:  # fmt: skip
    raise UserError(
      f'{path} cannot be read as an .npz of statistics, "mu" and "sigma" '
      f'({e!r:.100})'
    ) from None
  if mean.shape != (width,) or covariance.shape != (width, width):
    raise UserError(
      f'{path} has "mu" {list(mean.shape)} and "sigma" '
      f'{list(covariance.shape)}; features have {width} channels'
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(f'{path} has NaN or infinity in "mu" or "sigma"')
  return mean, covariance


def _factor(covariance: np.ndarray) -> np.ndarray:
  """A [d r] with A A^T = the covariance, of rank r but for rounding: a Cholesky
  factor whose pivots are the largest variances that are left."""
  least = np.finfo(float).eps * len(covariance) * np.diag(covariance).max()
  found, pivots, rank, _ = lapack.dpstrf(covariance, tol=least, lower=1)
  factor = np.empty((len(covariance), rank))
  factor[pivots - 1] = np.tril(found)[:, :rank]
  return factor


def frechet_distance(
  one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> float:
  """Between two (mean f[d], covariance f[d d])."""
  (m1, c1), (m2, c2) = one, other
  if not (np.isfinite(c1).all() and np.isfinite(c2).all()):
    return float('nan')
  roots = np.linalg.svd(_factor(c1).T @ _factor(c2), compute_uv=False)
  distance = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2)
  return float(distance - 2 * roots.sum())
