"""Metrics as mergeable sums: add batches, merge hosts, read off at the end.

Reconstructions are clipped to [0, 1] and rounded to 8 bits, as a picture that
is saved. PSNR and SSIM equal scikit-image's to 1e-6. SSIM is
dm_pix's: gaussian window of 11, sigma 1.5, data range 1. LPIPS and rFID need
the networks of `pretrained/networks.py`. Sums are f64, on the host.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.evaluate.fid import Moments, frechet_distance
from vqrae_jax.losses.perceptual import lpips_distances
from vqrae_jax.nn.inception import InceptionV3
from vqrae_jax.nn.vgg import MIN_SIDE
from vqrae_jax.types import LossInputs, Tree

SSIM_WINDOW = 11
METRICS = ('lpips', 'rfid')  # that need a network


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
    lpips: the sum of each image's LPIPS; NaN without its network.
    originals, reconstructions: moments of their Inception features; 0 without
      the network.
  """

  images: int = 0
  pixels: int = 0
  squared: float = 0.0
  psnr: float = 0.0
  ssim: float = 0.0
  counts: np.ndarray | int = 0
  lpips: float = 0.0
  originals: Moments | int = 0
  reconstructions: Moments | int = 0

  def merge(self, other: 'Sums') -> 'Sums':
    """Both sets as one."""
    return Sums(*map(operator.add, vars(self).values(), vars(other).values()))

  def results(
    self, reference: tuple[np.ndarray, np.ndarray] | None = None
  ) -> dict[str, float]:
    """psnr (of the pooled MSE), psnr_mean (over images), ssim (of images of
    11 pixels or more); with their networks lpips and rfid; with counts
    codes_used, usage, perplexity and effective_bits over the set.

    With several codes per token, usage and perplexity are means over them,
    codes_used and effective_bits (per token) are sums.

    Args:
      reference: (mean, covariance) of the features that rfid is the distance
        to; None for those of the originals.
    """
    mse = max(self.squared / max(self.pixels, 1), 1e-10)
    n = max(self.images, 1)
    results = {
      'images': self.images,
      'psnr': -10 * math.log10(mse),
      'psnr_mean': self.psnr / n,
    }
    for name in ('ssim', 'lpips'):
      if math.isfinite(total := getattr(self, name)):
        results[name] = total / n
    if isinstance(self.reconstructions, Moments):
      reference = reference or self.originals.statistics()
      own = self.reconstructions.statistics()
      results['rfid'] = frechet_distance(reference, own)
    if np.ndim(self.counts):
      used, nats = (self.counts > 0).sum(-1), entropy(self.counts)
      results |= {
        'codes_used': int(used.sum()),
        'usage': float(used.mean() / self.counts.shape[-1]),
        'perplexity': float(np.exp(nats).mean()),
        'effective_bits': float(nats.sum() / math.log(2)),
      }
    return results


def entropy(counts: np.ndarray) -> np.ndarray:
  """The entropy of counts [... k] in nats, f64[...]; 0 if all are 0."""
  p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


# Of a run or an evaluation, in the order of `table`.
FIGURES = (
  ('psnr', 'PSNR, dB (pooled error)', '.2f'),
  ('psnr_mean', 'PSNR, dB (mean over images)', '.2f'),
  ('psnr_block_mean', 'PSNR of block means, dB', '.2f'),
  ('psnr_shuffled', 'PSNR with codes shuffled, dB', '.2f'),
  ('ssim', 'SSIM', '.4f'),
  ('lpips', 'LPIPS (VGG)', '.4f'),
  ('rfid', 'rFID', '.3f'),
  ('codes_used', 'codes used', ',d'),
  ('usage', 'codebook usage', '.1%'),
  ('perplexity', 'perplexity of the codes', ',.1f'),
  ('effective_bits', 'effective bits per token', '.2f'),
  ('bits_per_image', 'bits per image, nominal', ',.0f'),
  ('knn', 'k-NN accuracy of latents', '.1%'),
  ('knn_quantized', '  after quantization', '.1%'),
  ('linear', 'linear probe of latents', '.1%'),
  ('linear_quantized', '  after quantization', '.1%'),
  ('train_seconds', 'training, s', '.0f'),
  ('images_per_second', 'images/s', '.0f'),
  ('data_wait', 'time waiting for data', '.1%'),
)


def table(figures: Mapping[str, Any]) -> str:
  """Those of `FIGURES` that are there, a line each."""
  return '\n'.join(
    f'  {words:28} {format(figures[key], form):>10}'
    for key, words, form in FIGURES
    if figures.get(key) is not None
  )


@jax.jit
def image_rows(
  images: jax.Array, targets: jax.Array, networks: Tree
) -> dict[str, jax.Array]:
  """Figures of each image, f32[b] (features [b 2048]).

  Args:
    images: f[b h w 3], clipped and rounded here.
    targets: uint8 [b h w 3].
    networks: {"lpips", "rfid": arrays of `networks.load`}, any of them or none.

  Returns:
    squares, psnr, ssim, and with their networks lpips, original and
    reconstruction (features).
  """
  import dm_pix

  images = jnp.round(jnp.clip(images.astype(jnp.float32), 0, 1) * 255)
  originals = targets.astype(jnp.float32)
  recon, target = images / 255, originals / 255
  squares = ((recon - target) ** 2).sum((1, 2, 3))
  mse = jnp.maximum(squares / math.prod(images.shape[1:]), 1e-10)
  rows = {
    'squares': squares,
    'psnr': -10 * jnp.log10(mse),
    'ssim': jnp.full(len(images), jnp.nan),
  }
  if min(images.shape[1:3]) >= SSIM_WINDOW:
    rows['ssim'] = dm_pix.ssim(
      recon, target, filter_size=SSIM_WINDOW, filter_sigma=1.5
    )
  if 'lpips' in networks:
    if min(images.shape[1:3]) < MIN_SIDE:
      raise UserError(f'LPIPS needs images of {MIN_SIDE} pixels a side')
    rows['lpips'] = lpips_distances(LossInputs(recon, target, networks))
  if 'rfid' in networks:
    params = {'params': networks['rfid']['net']}
    both = InceptionV3().apply(params, jnp.concatenate([originals, images]))
    rows['original'], rows['reconstruction'] = jnp.split(both, 2)
  return rows


def sums_of(rows: dict[str, np.ndarray], pixels: int) -> Sums:
  """The sums of `image_rows`' output for images of `pixels` values each."""
  total = {n: np.asarray(x, np.float64).sum(0) for n, x in rows.items()}
  n = len(rows['psnr'])
  sums = Sums(
    n, n * pixels, *(float(total[x]) for x in ('squares', 'psnr', 'ssim'))
  )
  sums.lpips = float(total.get('lpips', math.nan))
  if 'original' in rows:
    sums.originals = Moments.of(rows['original'])
    sums.reconstructions = Moments.of(rows['reconstruction'])
  return sums


def compare(images, targets, count: int) -> Sums:
  """The sums of one batch, of its first `count` rows; see `image_rows`."""
  rows = image_rows(images, targets, {})
  rows = {name: np.asarray(x)[:count] for name, x in rows.items()}
  return sums_of(rows, math.prod(targets.shape[1:]))
