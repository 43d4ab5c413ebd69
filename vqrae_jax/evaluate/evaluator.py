"""Evaluation on photographs cut into a fixed grid of tiles.

Every tile passes through indices: images -> tokens -> images, the path that a
user takes. Figures are over all tiles together; the baseline replaces each
block of the tokenizer's patch by its mean colour, and shuffled codes show
that what the tokens say matters.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from vqrae_jax import inference
from vqrae_jax.data import pipeline
from vqrae_jax.data.decode import EncodedImages, ImageDecodeError
from vqrae_jax.data.sources import Images
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import metrics
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.types import Tree


def block_mean(tiles: np.ndarray, block: int) -> np.ndarray:
  """f32[n h w 3]: every block x block square replaced by its mean."""
  n, h, w, c = tiles.shape
  x = tiles.reshape(n, h // block, block, w // block, block, c)
  mean = x.mean((2, 4), keepdims=True)
  return np.broadcast_to(mean, x.shape).reshape(tiles.shape)


def _bound(fn: Callable, tokenizer: Tokenizer, variables: Tree) -> Callable:
  """A door function, jitted, waiting for its images or indices."""
  return functools.partial(_jitted(fn), tokenizer, variables)


@functools.cache
def _jitted(fn: Callable) -> Callable:
  """One jit a function: a shape compiles once, however many images come."""
  return jax.jit(fn, static_argnums=0)


def check_tiles(source: EncodedImages, tile: int) -> None:
  """Every photograph holds a tile and can be decoded: sizes are read first.

  Raises:
    UserError: with how many do not and the first of them.
  """
  sizes = [source.size(i) for i in range(len(source))]
  small = [i for i, size in enumerate(sizes) if min(size) < tile]
  if small:
    h, w = sizes[small[0]]
    more = f' (and {len(small) - 1} more)' if small[1:] else ''
    raise UserError(
      f'the held-out photograph {source.names[small[0]]} of {h}x{w}{more} is '
      f'smaller than eval.tile={tile}; lower it, or leave such out by '
      'eval.exclude'
    )
  for i in range(len(source)):
    try:
      source[i]
    except ImageDecodeError as e:
      raise UserError(
        f'a held-out photograph: {e}; mend it, or leave it out by eval.exclude'
      ) from None


def in_batches(fn: Callable, rows: np.ndarray, batch_size: int) -> np.ndarray:
  """fn over rows in batches of one shape; the last is padded, then cut."""
  out = []
  for start in range(0, len(rows), batch_size):
    part = rows[start : start + batch_size]
    short = batch_size - len(part)
    padded = np.pad(part, [(0, short)] + [(0, 0)] * (part.ndim - 1))
    out.append(np.asarray(fn(padded))[: len(part)])
  return np.concatenate(out)


def _sums(images, targets, batch_size) -> metrics.Sums:
  total = metrics.Sums()
  for start in range(0, len(images), batch_size):
    part = slice(start, start + batch_size)
    total = total.merge(metrics.compare(images[part], targets[part]))
  return total


def bits_per_image(tokenizer: Tokenizer, h: int, w: int) -> float:
  """Tokens x log2(K): the size of an image's code, before entropy coding."""
  tokens = math.prod(tokenizer.index_shape(h, w))
  return tokens * math.log2(tokenizer.codebook_size)


def tiles_of(source: Images, tile: int) -> np.ndarray:
  """uint8 [n tile tile 3]: every photograph cut from its top left corner,
  remainders dropped.

  Raises:
    UserError: no photograph holds a tile.
  """
  cut = [pipeline.tiles(source[i], (tile, tile)) for i in range(len(source))]
  tiles = np.concatenate(cut)
  if not len(tiles):
    raise UserError(f'no photograph holds a tile of {tile} px')
  return tiles


def measure(
  tokenizer: Tokenizer,
  variables: Tree,
  tiles: np.ndarray,
  batch_size: int,
  place: Callable = np.asarray,
  read: Callable = np.asarray,
) -> tuple[metrics.Sums, np.ndarray | None]:
  """A tokenizer on tiles: images -> indices -> images where it is discrete.

  Args:
    tokenizer, variables: what is measured.
    tiles: uint8 [n t t 3], t a multiple of the decoder's patch.
    batch_size: tiles at once.
    place: lays a batch of tiles where the variables lie.
    read: brings results to this host.

  Returns:
    (sums, with code counts if it is discrete; i32 indices of all tiles, or
    None).
  """
  targets = tiles.astype(np.float32) / 255

  def bound(fn):
    fn = _bound(fn, tokenizer, variables)
    return lambda rows: fn(place(rows))

  if not tokenizer.codebook_size:
    run = bound(inference.reconstruct)
    images = in_batches(lambda x: read(run(x).images), tiles, batch_size)
    return _sums(images, targets, batch_size), None
  encode = bound(inference.encode_to_indices)
  decode = bound(inference.decode_from_indices)
  indices = in_batches(lambda x: read(encode(x)), tiles, batch_size)
  painted = in_batches(lambda x: read(decode(x)), indices, batch_size)
  total = _sums(painted, targets, batch_size)
  q = tokenizer.quantizer.codes_per_token
  total.counts = np.stack(
    [
      np.bincount(column, minlength=tokenizer.codebook_size)
      for column in indices.reshape(-1, q).T
    ]
  )
  return total, indices


def evaluate_tiles(
  tokenizer: Tokenizer,
  variables: Tree,
  source: Images,
  tile: int,
  batch_size: int = 32,
) -> dict[str, float]:
  """The figures of a tokenizer on photographs it has not seen.

  Args:
    tokenizer, variables: what is measured.
    source: the photographs; each is cut into tile x tile pixels from its top
      left corner, remainders dropped.
    tile: a multiple of the decoder's patch.
    batch_size: tiles at once.

  Returns:
    images, psnr (pooled MSE), psnr_mean, psnr_block_mean, ssim, and for a
    discrete tokenizer psnr_shuffled, codes_used, usage, perplexity and
    bits_per_image.
  """
  tokenizer.grid(tile, tile)
  tiles = tiles_of(source, tile)
  targets = tiles.astype(np.float32) / 255
  baseline = _sums(
    block_mean(targets, tokenizer.patch_size), targets, batch_size
  )
  total, indices = measure(tokenizer, variables, tiles, batch_size)
  figures = total.results()
  figures['psnr_block_mean'] = baseline.results()['psnr']
  if indices is None:
    return figures
  decode = _bound(inference.decode_from_indices, tokenizer, variables)
  shuffled = np.random.default_rng(0).permutation(indices.ravel())
  shuffled = in_batches(decode, shuffled.reshape(indices.shape), batch_size)
  return figures | {
    'psnr_shuffled': _sums(shuffled, targets, batch_size).results()['psnr'],
    'bits_per_image': bits_per_image(tokenizer, tile, tile),
  }


def crop_to(image: np.ndarray, multiple: int) -> np.ndarray:
  """The centre of uint8 [h w 3] whose sides are multiples of `multiple`."""
  h, w = (n // multiple * multiple for n in image.shape[:2])
  if not (h and w):
    raise UserError(
      f'an image of {image.shape[0]}x{image.shape[1]} is smaller than '
      f'{multiple} pixels, the least this tokenizer takes here'
    )
  top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
  return image[top : top + h, left : left + w]


def reconstruct_tiled(
  tokenizer: Tokenizer,
  variables: Tree,
  image: np.ndarray,
  tile: int,
  batch_size: int = 32,
  whole: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """A photograph painted tile by tile, each from its own tokens.

  Args:
    tokenizer, variables: the tokenizer.
    image: uint8 [h w 3], of any size.
    tile: the side that each tile has, a multiple of the patch.
    batch_size: tiles at once.
    whole: the image is one piece, cropped to a multiple of `tile`.

  Returns:
    (uint8 the centre of `image` that whole tiles cover, f32 the same painted,
    in [0, 1]).
  """
  image = crop_to(image, tile)
  sides = image.shape[:2] if whole else (tile, tile)
  if whole:
    batch_size = 1
  h, w = (n // s for n, s in zip(image.shape[:2], sides, strict=True))
  run = _bound(inference.reconstruct, tokenizer, variables)
  cut = pipeline.tiles(image, sides)
  painted = in_batches(lambda x: run(x).images, cut, batch_size)
  painted = painted.reshape(h, w, *sides, 3).transpose(0, 2, 1, 3, 4)
  return image, np.clip(painted.reshape(image.shape), 0, 1)


def psnr(original: np.ndarray, painted: np.ndarray) -> float:
  """dB between uint8 [h w 3] and f32 [h w 3] in [0, 1]."""
  mse = np.mean((original / 255.0 - painted) ** 2)
  return float(-10 * np.log10(max(mse, 1e-10)))
