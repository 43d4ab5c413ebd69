"""Metrics as mergeable sums: add batches, merge hosts, read off at the end.

PSNR and SSIM come from dm_pix (equal to scikit-image's to 1e-6). Images are
in [0, 1], clipped. SSIM: gaussian window of 11, sigma 1.5, data range 1.
"""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11


@dataclasses.dataclass
class Sums:
  """Sums over a set of images; `merge` adds two sets.

  Attributes:
    images: how many.
    pixels: how many values.
    squared: the summed squared error over values.
    psnr: the sum of each image's PSNR in dB (mse at least 1e-10).
    ssim: the sum of each image's SSIM; NaN if images are under 11 pixels.
    counts: int64[q k] code counts; 0 without codes.
  """

  images: int = 0
  pixels: int = 0
  squared: float = 0.0
  psnr: float = 0.0
  ssim: float = 0.0
  counts: np.ndarray | int = 0

  def merge(self, other: 'Sums') -> 'Sums':
    """Both sets as one."""
    return Sums(*map(operator.add, vars(self).values(), vars(other).values()))

  def results(self) -> dict[str, float]:
    """psnr (of the pooled MSE), psnr_mean (over images), ssim (of images of
    11 pixels or more) and, with counts, codes_used, usage and perplexity over
    the set."""
    mse = max(self.squared / max(self.pixels, 1), 1e-10)
    n = max(self.images, 1)
    results = {
      'images': self.images,
      'psnr': -10 * math.log10(mse),
      'psnr_mean': self.psnr / n,
    }
    if math.isfinite(self.ssim):
      results['ssim'] = self.ssim / n
    if np.ndim(self.counts):
      used = (self.counts > 0).sum(-1)
      results |= {
        'codes_used': int(used.sum()),
        'usage': float(used.mean() / self.counts.shape[-1]),
        'perplexity': float(np.exp(entropy(self.counts)).mean()),
      }
    return results


def entropy(counts: np.ndarray) -> np.ndarray:
  """The entropy of counts [... k] in nats, f64[...]; 0 if all are 0."""
  p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@jax.jit
def _batch_sums(images, targets, valid):
  import dm_pix

  images = jnp.clip(images.astype(jnp.float32), 0.0, 1.0)
  squares = ((images - targets) ** 2).sum((1, 2, 3))
  mse = jnp.maximum(squares / math.prod(images.shape[1:]), 1e-10)
  if min(images.shape[1:3]) >= SSIM_WINDOW:
    ssim = dm_pix.ssim(
      images, targets, filter_size=SSIM_WINDOW, filter_sigma=1.5
    )
  else:
    ssim = jnp.full(images.shape[0], jnp.nan)
  rows = jnp.stack([squares, -10 * jnp.log10(mse), ssim])
  return jnp.where(valid, rows, 0.0).sum(1)


def compare(images, targets, count: int) -> Sums:
  """The sums of one batch.

  Args:
    images: f[b h w 3], clipped here to [0, 1].
    targets: uint8 [b h w 3].
    count: so many rows count; the others only pad the batch.
  """
  targets = targets.astype(np.float32) / 255
  sums = _batch_sums(images, targets, np.arange(len(targets)) < count)
  pixels = count * math.prod(targets.shape[1:])
  return Sums(count, pixels, *np.asarray(sums, np.float64).tolist())
