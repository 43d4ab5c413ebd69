"""PSNR and SSIM against scikit-image; merging; the evaluator's path."""

import numpy as np
import pytest
from skimage import metrics as peer

import vqrae_jax
from tests import tiny
from vqrae_jax.evaluate import evaluator, metrics, visualize


def pairs(n=3, side=24):
  rng = np.random.default_rng(0)
  targets = tiny.images(n, side, side) / 255.0
  images = np.clip(targets + rng.normal(0, 0.1, targets.shape), 0, 1)
  return images.astype(np.float32), targets.astype(np.float32)


def test_against_scikit_image():
  images, targets = pairs()
  found = metrics.compare(images, targets).results()
  psnr = [
    peer.peak_signal_noise_ratio(t, i, data_range=1)
    for i, t in zip(images, targets, strict=True)
  ]
  ssim = [
    peer.structural_similarity(
      t,
      i,
      data_range=1,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
      full=True,
    )[1][5:-5, 5:-5].mean()
    for i, t in zip(images, targets, strict=True)
  ]
  np.testing.assert_allclose(found['psnr_mean'], np.mean(psnr), rtol=1e-5)
  np.testing.assert_allclose(found['ssim'], np.mean(ssim), atol=1e-5)
  pooled = -10 * np.log10(((images - targets) ** 2).mean())
  np.testing.assert_allclose(found['psnr'], pooled, rtol=1e-5)


def test_parts_merge_to_the_whole():
  images, targets = pairs(5)
  whole = metrics.compare(images, targets)
  parts = metrics.compare(images[:2], targets[:2]).merge(
    metrics.compare(images[2:], targets[2:])
  )
  padded = metrics.compare(
    np.concatenate([images, images]),
    np.concatenate([targets, targets * 0]),
    np.arange(10) < 5,
  )
  for other in (parts, padded):
    for key, value in whole.results().items():
      np.testing.assert_allclose(other.results()[key], value, rtol=1e-5)


def test_counts_merge():
  a = metrics.Sums(counts=np.array([[1, 0, 3]]))
  b = metrics.Sums(counts=np.array([[0, 0, 1]]))
  found = a.merge(metrics.Sums()).merge(b).results()
  assert found['codes_used'] == 2
  p = np.array([1, 4]) / 5
  entropy = -(p * np.log(p)).sum()
  np.testing.assert_allclose(found['perplexity'], np.exp(entropy))


class Photos(list):
  names = ('one', 'two')


@pytest.mark.parametrize('kind', ('fsq-cosmos', 'none'))
def test_tiles_go_through_tokens(kind):
  tokenizer, variables = tiny.built(tiny.model(kind))
  photos = Photos([tiny.images(1, 35, 50)[0], tiny.images(1, 16, 33)[0]])
  found = evaluator.evaluate_tiles(tokenizer, variables, photos, 16, 4)
  assert found['images'] == 2 * 3 + 2
  tiles = np.concatenate(
    [np.stack([p[i : i + 16, j : j + 16] for i in range(0, p.shape[0] - 15, 16)
               for j in range(0, p.shape[1] - 15, 16)]) for p in photos]
  )  # fmt: skip
  out = vqrae_jax.reconstruct(tokenizer, variables, tiles)
  error = np.clip(out.images, 0, 1) - tiles / 255.0
  np.testing.assert_allclose(
    found['psnr'], -10 * np.log10((error**2).mean()), rtol=1e-4
  )
  assert ('codes_used' in found) == (kind != 'none')
  if kind != 'none':
    assert found['codes_used'] == len(np.unique(out.quantizer.indices))
    np.testing.assert_allclose(found['bits_per_image'], 16 * np.log2(64000))


def test_block_mean():
  x = np.arange(4 * 4 * 3, dtype=np.float32).reshape(1, 4, 4, 3)
  mean = evaluator.block_mean(x, 2)
  np.testing.assert_allclose(mean[0, :2, :2, 0], x[0, :2, :2, 0].mean())
  assert evaluator.block_mean(x, 1) is not x
  np.testing.assert_array_equal(evaluator.block_mean(x, 1), x)


@pytest.mark.parametrize('whole', (True, False))
def test_a_photograph_is_painted_in_place(whole):
  tokenizer, variables = tiny.built(tiny.model())
  image = tiny.images(1, 50, 37)[0]
  multiple = 4 if whole else 16
  original, painted = evaluator.reconstruct_tiled(
    tokenizer, variables, image, multiple, whole=whole
  )
  h, w = (48, 36) if whole else (48, 32)
  top, left = (50 - h) // 2, (37 - w) // 2
  np.testing.assert_array_equal(original, image[top : top + h, left : left + w])
  part = original if whole else original[16:32, :16]
  found = painted if whole else painted[16:32, :16]
  want = vqrae_jax.reconstruct(tokenizer, variables, part[None]).images[0]
  np.testing.assert_allclose(found, np.clip(want, 0, 1), atol=1e-5)


def test_rounding_is_not_truncation():
  x = np.array([[[-0.1, 0.4999 / 255, 254.6 / 255]]])
  np.testing.assert_array_equal(visualize.to_uint8(x), [[[0, 0, 255]]])


def test_the_page_shows_both_rows_at_their_own_size():
  photos = [tiny.images(1, 40, 60)[0], tiny.images(1, 30, 200)[0]]
  painted = [255 - p for p in photos]
  page = np.asarray(
    visualize.comparison(photos, painted, ['a', 'b' * 90], 'title')
  )
  for image in (*photos, *painted):
    h, w = image.shape[:2]
    hits = [
      (page[i : i + h, j : j + w] == image).all()
      for i in range(page.shape[0] - h + 1)
      for j in range(page.shape[1] - w + 1)
      if (page[i, j] == image[0, 0]).all()
    ]
    assert any(hits)
