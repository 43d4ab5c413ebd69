"""Mean and variance of many arrays, exact in f64 and in any order.

Chan, Golub and LeVeque's merge of (count, mean, sum of squares about it): two
halves merged are the whole, whatever the halves. Sums of squares about zero
would lose what this keeps where a mean is far from zero.

The host computes in f64, since accelerators have no f64 of any speed and f32
sums would depend on how tokens were cut into batches. A core takes 2.5 ms for
an image of 256 tokens of 1024 channels (2026-11), beside the device and about
as long as decoding its photograph.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Of `count` values each: f64 `mean`, and `m2`, squares about it."""

  count: int
  mean: np.ndarray
  m2: np.ndarray

  @classmethod
  def of(cls, rows: np.ndarray) -> 'Moments':
    """Of f[n …]: over its first axis, n above 0."""
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(0)
    return cls(len(rows), mean, ((rows - mean) ** 2).sum(0))

  def merge(self, other: 'Moments') -> 'Moments':
    """Of both together."""
    n = self.count + other.count
    if not n:
      return self
    delta = other.mean - self.mean
    share = other.count / n
    return Moments(
      n,
      self.mean + delta * share,
      self.m2 + other.m2 + delta**2 * (self.count * share),
    )

  @property
  def variance(self) -> np.ndarray:
    """f64 m2 / count, the population's."""
    return self.m2 / max(self.count, 1)

  @classmethod
  def none(cls, shape: tuple[int, ...]) -> 'Moments':
    """Of nothing: what a merge leaves as it is."""
    return cls(0, np.zeros(shape), np.zeros(shape))

  def packed(self) -> np.ndarray:
    """f64[1 + 2 n], from which `unpacked` makes it again, bit for bit."""
    parts = [self.count], self.mean.ravel(), self.m2.ravel()
    return np.concatenate(parts).astype(np.float64)

  @classmethod
  def unpacked(cls, row: np.ndarray, shape: tuple[int, ...]) -> 'Moments':
    """`packed` backwards."""
    mean, m2 = row[1:].reshape(2, *shape)
    return cls(int(row[0]), mean, m2)
