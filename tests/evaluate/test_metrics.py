"""PSNR and SSIM against scikit-image; merging; the evaluator's path."""

import functools
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import metrics as peer

import vqrae_jax
from tests import tiny
from vqrae_jax.data import pipeline
from vqrae_jax.errors import read_json
from vqrae_jax.evaluate import evaluator, metrics, visualize
from vqrae_jax.files import write_json
from vqrae_jax.losses.perceptual import lpips
from vqrae_jax.pretrained import networks
from vqrae_jax.types import LossInputs


def pairs(n=3, side=24):
  rng = np.random.default_rng(0)
  targets = tiny.images(n, side, side)
  images = targets / 255 + rng.normal(0, 0.1, targets.shape)
  return np.clip(images, 0, 1).astype(np.float32), targets


def test_figures_without_a_value(tmp_path):
  """JSON has no NaN, and a table no line for it."""
  path = tmp_path / 'm.json'
  write_json(path, {'psnr': float('nan'), 'ssim': 0.5, 'more': [float('inf')]})
  found = read_json(path)
  assert found == {'psnr': None, 'ssim': 0.5, 'more': [None]}
  shown = metrics.table(found)
  assert 'SSIM' in shown and 'PSNR' not in shown


def test_against_scikit_image():
  images, targets = pairs()
  found = metrics.compare(images, targets, 3).results()
  # Of 8 bits, as a picture that is saved.
  images, targets = np.round(images * 255) / 255, targets / 255
  options = dict(
    data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, full=True,
  )  # fmt: skip
  both = list(zip(images, targets, strict=True))
  psnr = [peer.peak_signal_noise_ratio(t, i, data_range=1) for i, t in both]
  ssim = [
    peer.structural_similarity(t, i, **options)[1][5:-5, 5:-5].mean()
    for i, t in both
  ]
  np.testing.assert_allclose(found['psnr_mean'], np.mean(psnr), rtol=1e-5)
  np.testing.assert_allclose(found['ssim'], np.mean(ssim), atol=1e-5)
  pooled = peer.peak_signal_noise_ratio(targets, images, data_range=1)
  np.testing.assert_allclose(found['psnr'], pooled, rtol=1e-5)


def test_lpips_is_the_losss():
  """Of each image, on what is saved as a picture."""
  draw = functools.partial(networks.random, 'lpips', widths=(4, 4, 6, 8, 8))
  weights = {'lpips': jax.jit(draw)(jax.random.key(0))}
  images, targets = pairs()
  rows = metrics.image_rows(images * 1.5 - 0.2, targets, weights)
  images = np.round(np.clip(images * 1.5 - 0.2, 0, 1) * 255) / 255
  targets = targets.astype('f4') / 255
  for i, found in enumerate(rows['lpips']):
    pair = (x[i : i + 1].astype('f4') for x in (images, targets))
    want = jax.jit(lpips)(LossInputs(*pair, weights))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_parts_merge_to_the_sum():
  images, targets = pairs(5)
  want = metrics.compare(images, targets, 5)
  parts = metrics.compare(images[:2], targets[:2], 2).merge(
    metrics.compare(images[2:], targets[2:], 3)
  )
  twice = [np.tile(x, (2, 1, 1, 1)) for x in (images, targets)]
  padded = metrics.compare(*twice, 5)
  for other in (parts, padded):
    for key, value in want.results().items():
      np.testing.assert_allclose(other.results()[key], value, rtol=1e-5)
  a, b = (metrics.Sums(counts=np.array([n])) for n in ([1, 0, 3], [0, 0, 1]))
  found = a.merge(metrics.Sums()).merge(b).results()
  assert found['codes_used'] == 2
  entropy = -np.log([0.2, 0.8]) @ [0.2, 0.8]
  np.testing.assert_allclose(found['perplexity'], np.exp(entropy))


built = functools.cache(lambda kind: tiny.built(tiny.model(kind)))
reconstruct = jax.jit(vqrae_jax.reconstruct, static_argnums=0)


def db(images, targets):
  """PSNR of the pooled error."""
  images = np.round(np.clip(images, 0, 1) * 255) / 255
  return peer.peak_signal_noise_ratio(targets / 255.0, images, data_range=1)


@pytest.mark.parametrize('kind', ('fsq-cosmos', 'none'))
def test_tiles_go_through_tokens(kind):
  """Eight tiles of two images in batches of three: the last is padded."""
  tokenizer, variables = built(kind)
  photos = [tiny.images(1, 35, 50)[0], tiny.images(1, 16, 33)[0]]
  found = evaluator.evaluate_tiles(tokenizer, variables, photos, 16, 3)
  tiles = np.concatenate([pipeline.tiles(p, (16, 16)) for p in photos])
  assert found['images'] == 2 * 3 + 2 == len(tiles)
  out = reconstruct(tokenizer, variables, tiles)
  np.testing.assert_allclose(found['psnr'], db(out.images, tiles), rtol=1e-4)
  blocks = (tiles / 255).reshape(-1, 4, 4, 4, 4, 3)
  means = blocks.mean((2, 4), keepdims=True).repeat(4, 2).repeat(4, 4)
  means = means.reshape(tiles.shape)
  np.testing.assert_allclose(found['psnr_block_mean'], db(means, tiles), 1e-4)
  assert ('codes_used' in found) == (kind != 'none')
  if kind != 'none':
    indices = np.asarray(out.quantizer.indices)
    assert found['codes_used'] == len(np.unique(indices))
    np.testing.assert_allclose(found['bits_per_image'], 16 * np.log2(64000))
    # Codes change places over all tiles, not within a batch.
    order = np.random.default_rng(0).permutation(indices.ravel())
    shuffled = jax.jit(vqrae_jax.decode_from_indices, static_argnums=0)(
      tokenizer, variables, order.reshape(indices.shape)
    )
    np.testing.assert_allclose(
      found['psnr_shuffled'], db(shuffled, tiles), 1e-4
    )


class Counted:
  """n images of one tile each, which knows how many of them are held."""

  def __init__(self, n):
    self.n, self.most, self.live = n, 0, weakref.WeakValueDictionary()

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    image = self.live[i] = tiny.images(1, 16, 16, seed=i)[0].copy()
    self.most = max(self.most, len(self.live))
    return image


def test_evaluation_holds_a_few_images_however_many_there_are(monkeypatch):
  monkeypatch.setattr(evaluator.pipeline, 'reading_threads', lambda: 2)
  tokenizer, variables = built('fsq-cosmos')
  source = Counted(200)
  found = evaluator.evaluate_tiles(tokenizer, variables, source, 16, 3)
  assert found['images'] == 200
  # A batch, a decoder's output a thread, and what waits between them.
  assert source.most <= 3 + 2 * 2 + 2 + 4 and len(source.live) <= 3


def test_a_whole_image_is_reconstructed_in_place():
  tokenizer, variables = built('fsq-cosmos')
  image = tiny.images(1, 50, 37)[0]
  original, recon = evaluator.reconstruct_tiled(
    tokenizer, variables, image, 4, whole=True
  )
  np.testing.assert_array_equal(original, image[1:49, :36])
  want = reconstruct(tokenizer, variables, original[None]).images[0]
  np.testing.assert_allclose(recon, np.clip(want, 0, 1), atol=1e-5)


@pytest.mark.parametrize(
  'kind, norm',
  [('fsq-cosmos', 'none'), ('none', 'none'), ('fsq-cosmos', 'position')],
)
def test_tiles_blend(kind, norm):
  """2 x 3 tiles of 16 pixels and 4 x 4 tokens: windows begin at every second
  token, and a pixel counts by how far inside of a window it lies."""
  made = built(kind) if norm == 'none' else tiny.normalised(kind, norm)
  image = tiny.images(1, 36, 50)[0]
  original, recon = evaluator.reconstruct_tiled(*made, image, 16, batch_size=4)
  np.testing.assert_array_equal(original, image[2:34, 1:49])
  z_q = np.zeros((8, 12, made[0].latent_dim), 'f4')
  images = {}
  for y, x in itertools.product(range(0, 8, 4), range(0, 12, 4)):
    tile = original[4 * y : 4 * y + 16, 4 * x : 4 * x + 16]
    out = reconstruct(*made, tile[None])
    images[y, x] = out.images[0]
    z_q[y : y + 4, x : x + 4] = out.quantizer.z_q[0]
  inside = np.array([*range(1, 9), *range(8, 0, -1)])
  weight = np.outer(inside, inside)[..., None]
  total, weights = np.zeros((32, 48, 3)), np.zeros((32, 48, 1))
  for y, x in itertools.product(range(0, 5, 2), range(0, 9, 2)):
    window = jnp.asarray(z_q[None, y : y + 4, x : x + 4])
    found, *_ = made[0].apply(made[1], window, method='decode')
    if (y, x) in images:
      np.testing.assert_allclose(found[0], images[y, x], atol=1e-5)
    at = slice(4 * y, 4 * y + 16), slice(4 * x, 4 * x + 16)
    total[at] += weight * np.asarray(found[0])
    weights[at] += weight
  np.testing.assert_allclose(recon, np.clip(total / weights, 0, 1), atol=1e-5)


@pytest.mark.filterwarnings('error')
def test_rounding_is_not_truncation_and_nan_is_black():
  x = np.array([[[-0.1, 0.4999 / 255, 254.6 / 255], [np.nan, np.inf, 1]]])
  want = [[[0, 0, 255], [0, 255, 255]]]
  np.testing.assert_array_equal(visualize.to_uint8(x), want)


def test_the_page_shows_both_rows_at_their_own_size():
  photos = [tiny.images(1, 40, 60)[0], tiny.images(1, 30, 200)[0]]
  recon = [255 - p for p in photos]
  page = visualize.comparison(photos, recon, ['a', 'b' * 90], 'title')
  page = np.asarray(page)
  for image in (*photos, *recon):
    windows = np.lib.stride_tricks.sliding_window_view(page, image.shape)
    corners = (windows[..., 0, 0, :] == image[0, 0]).all(-1)
    assert (windows[corners] == image).all((1, 2, 3)).any()


@pytest.mark.parametrize('d', (1, 2, 6))
def test_a_code_has_one_colour(d):
  rng = np.random.default_rng(0)
  indices = rng.integers(5, size=(2, 4, 3))
  codes = rng.normal(size=(5, d))
  page = visualize.token_map(codes[indices], (8, 12))
  assert page.shape == (2, 8, 12, 3) and page.dtype == np.uint8
  cells = page[:, ::2, ::4].reshape(-1, 3)
  colours = {i: {*map(tuple, cells[indices.ravel() == i])} for i in range(5)}
  assert all(len(found) == 1 for found in colours.values())
  if d > 1:
    assert len(set.union(*colours.values())) == 5
  np.testing.assert_array_equal(
    page, page[:, ::2, ::4].repeat(2, 1).repeat(4, 2)
  )
  assert not visualize.token_map(np.zeros((1, 2, 2, d)), (2, 2)).any()
