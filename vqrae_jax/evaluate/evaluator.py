"""Evaluation on images cut into a fixed grid of tiles.

Every tile passes through indices, images -> tokens -> images, as for a user.
Each tile is measured separately; pictures of large images blend their tiles
(`reconstruct_tiled`). Tiles come in batches from the loader, metrics are
summed over all of them, and only the tiles' indices are kept. The baseline
replaces each block of the tokenizer's patch by its mean colour; shuffled codes
show that the content of the tokens matters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import inference
from vqrae_jax.data import pipeline
from vqrae_jax.data.decode import EncodedImages, ImageDecodeError
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


@functools.cache
def _jitted(fn: Callable) -> Callable:
  """One jit per function: each shape compiles once for any number of images."""
  return jax.jit(fn, static_argnums=0)


def check_tiles(source: EncodedImages, tile: int) -> None:
  """Checks that every image is large enough for a tile and can be decoded;
  sizes are read first.

  Raises:
    UserError: with the number of images that fail and the first of them.
  """
  sizes = [source.size(i) for i in range(len(source))]
  small = [i for i, size in enumerate(sizes) if min(size) < tile]
  if small:
    h, w = sizes[small[0]]
    more = f' (and {len(small) - 1} more)' if small[1:] else ''
    raise UserError(
      f'the held-out image {source.names[small[0]]} of {h}x{w}{more} is '
      f'smaller than eval.tile={tile}; lower it, or leave such images out: '
      f'eval.exclude=("{source.names[small[0]]}", …)'
    )
  for _, image in pipeline.each_image(source):
    if isinstance(image, ImageDecodeError):
      raise UserError(
        f'{image}; it is a held-out image: replace it, or leave it out with '
        'eval.exclude'
      )


def bits_per_image(tokenizer: Tokenizer, h: int, w: int) -> float:
  """Tokens x log2(K): the size of an image's code, before entropy coding."""
  tokens = math.prod(tokenizer.index_shape(h, w))
  return tokens * math.log2(tokenizer.codebook_size)


def tiles_of(source: pipeline.Images, tile: int) -> np.ndarray:
  """uint8 [n tile tile 3]: all tiles at once, of a few images."""
  images = map(source.__getitem__, range(len(source)))
  return np.concatenate([pipeline.tiles(x, (tile, tile)) for x in images])


def tile_batches(
  source: pipeline.Images, tile: int, batch_size: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
  """`pipeline.eval_batches` of tiles: every image cut from its top left
  corner, remainders dropped."""
  cut = functools.partial(pipeline.tiles, size=(tile, tile))
  return pipeline.eval_batches(source, cut, batch_size)


@dataclasses.dataclass
class Measured:
  """A batch of images through a tokenizer.

  Attributes:
    owners: for each of the n rows, the image that it belongs to.
    sums: over the batch.
    psnr: f64[n], of each image.
    indices: i32[n …], or None.
    latents: f32[n 2 d], each image's mean over tokens before and after
      quantization.
  """

  owners: list[int]
  sums: metrics.Sums
  psnr: np.ndarray
  indices: np.ndarray | None
  latents: np.ndarray


def _read(tokenizer, variables, images):
  """(indices or images, latents before and after quantization [b 2 d])."""
  out = inference.reconstruct(tokenizer, variables, images)
  means = [x.mean((1, 2)) for x in (out.latents, out.quantizer.z_q)]
  latents = jnp.stack(means, 1).astype(jnp.float32)
  # If indices are returned, the decoder's output is unused and not computed.
  return (
    out.quantizer.indices if tokenizer.codebook_size else out.images,
    latents,
  )


def measure(
  tokenizer: Tokenizer,
  variables: Tree,
  batches: Iterable[tuple[np.ndarray, list[int]]],
  place: Callable = np.asarray,
  read: Callable = np.asarray,
  networks: Tree | None = None,
) -> Iterator[Measured]:
  """A tokenizer on images: images -> indices -> images where it is discrete.

  Args:
    tokenizer, variables: what is measured.
    batches: those of `pipeline.eval_batches`, of sides that are multiples of
      the decoder's patch.
    place: moves a batch to the variables' devices.
    read: moves results to where they are compared.
    networks: those of LPIPS and rFID (`metrics.image_rows`), if requested.

  Yields:
    The results of a batch, without padding rows.
  """

  def run(fn, rows):
    return _jitted(fn)(tokenizer, variables, rows)

  for images, owners in batches:
    n, placed = len(owners), place(images)
    found, latents = run(_read, placed)
    indices = None
    if tokenizer.codebook_size:
      indices = np.array(read(found))
      found = run(inference.decode_from_indices, place(indices))
      indices = indices[:n]
    rows = metrics.image_rows(read(found), images, networks or {})
    rows = {name: np.asarray(x)[:n] for name, x in rows.items()}
    sums = metrics.sums_of(rows, math.prod(images.shape[1:]))
    if indices is not None:
      columns = indices.reshape(-1, tokenizer.quantizer.codes_per_token).T
      k = tokenizer.codebook_size
      # A code that is left out (-1) is none.
      counts = [np.bincount(x[x >= 0], minlength=k) for x in columns]
      sums.counts = np.stack(counts)
    latents = np.array(read(latents))[:n]
    yield Measured(owners, sums, rows['psnr'].astype(float), indices, latents)


def evaluate_tiles(
  tokenizer: Tokenizer,
  variables: Tree,
  source: pipeline.Images,
  tile: int,
  batch_size: int = 32,
  networks: Tree | None = None,
) -> dict[str, float]:
  """The figures of a tokenizer on images it has not seen.

  With a discrete tokenizer the images are read twice: codes are shuffled over
  all tiles, which needs every index first.

  Args:
    tokenizer, variables: what is measured.
    source: the images; each is cut into tile x tile pixels from its top left
      corner, remainders dropped.
    tile: a multiple of the decoder's patch.
    batch_size: tiles at once.
    networks: as in `measure`.

  Returns:
    `metrics.Sums.results`, psnr_block_mean, and for a discrete tokenizer
    psnr_shuffled and bits_per_image.
  """
  tokenizer.index_shape(tile, tile)
  baseline = metrics.Sums()

  def batches():
    nonlocal baseline
    for tiles, owners in tile_batches(source, tile, batch_size):
      means = block_mean(tiles.astype(np.float32) / 255, tokenizer.patch_size)
      baseline = baseline.merge(metrics.compare(means, tiles, len(owners)))
      yield tiles, owners

  total, found = metrics.Sums(), []
  for batch in measure(tokenizer, variables, batches(), networks=networks):
    total = total.merge(batch.sums)
    found.append(batch.indices)
  if not total.images:
    raise UserError(f'no image holds a tile of {tile} px')
  figures = total.results()
  figures['psnr_block_mean'] = baseline.results()['psnr']
  if not tokenizer.codebook_size:
    return figures
  # Tokens change places, each with all of its codes.
  indices = np.concatenate(found)
  codes = indices.reshape(-1, tokenizer.quantizer.codes_per_token)
  order = np.random.default_rng(0).permutation(len(codes))
  order = codes[order].reshape(indices.shape)
  at, shuffled = 0, metrics.Sums()
  decode = _jitted(inference.decode_from_indices)
  for tiles, owners in tile_batches(source, tile, batch_size):
    count = len(owners)
    rows = np.zeros_like(indices, shape=(batch_size, *indices.shape[1:]))
    rows[:count] = order[at : at + count]
    images, at = decode(tokenizer, variables, rows), at + count
    shuffled = shuffled.merge(metrics.compare(images, tiles, count))
  return figures | {
    'psnr_shuffled': shuffled.results()['psnr'],
    'bits_per_image': bits_per_image(tokenizer, tile, tile),
  }


def crop_to(image: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
  """The centre of uint8 [h w 3] that full tiles cover."""
  h, w = (n // t * t for n, t in zip(image.shape, tile, strict=False))
  if not (h and w):
    raise UserError(
      f'an image of {image.shape[0]}x{image.shape[1]} is smaller than '
      f'{tile[0]}x{tile[1]} pixels, the least this tokenizer takes here'
    )
  top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
  return image[top : top + h, left : left + w]


def _quantized(tokenizer, variables, images):
  return inference.reconstruct(tokenizer, variables, images).quantizer.z_q


def _decoded(tokenizer, variables, z_q):
  return tokenizer.apply(variables, z_q, method='decode')[0]


def _in_batches(
  fn: Callable, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
  """What fn gives for each row; `batch_size` at once, of which zeros fill the
  last."""
  for at in range(0, len(rows), batch_size):
    part = np.stack(rows[at : at + batch_size])
    padding = [(0, batch_size - len(part))] + [(0, 0)] * (part.ndim - 1)
    yield from np.asarray(fn(np.pad(part, padding)))[: len(part)]


def decode_tiles(
  tokenizer: Tokenizer,
  variables: Tree,
  z_q: np.ndarray,
  window: tuple[int, int],
  batch_size: int = 32,
) -> np.ndarray:
  """The latents of many tiles as one image.

  They are decoded in windows of a tile's size, half a tile apart. Overlapping
  windows are averaged, weighted by a pixel's distance from the window's border,
  so that tiles have no visible edges.

  Args:
    tokenizer, variables: the tokenizer.
    z_q: f[gh gw d], at least a window.
    window: tokens of a tile, high and wide.
    batch_size: windows at once.

  Returns:
    f32[h w 3] in [0, 1].
  """
  p, size = tokenizer.patch_size, z_q.shape[:2]
  at = [
    (slice(top, top + window[0]), slice(left, left + window[1]))
    for top in _starts(size[0], window[0])
    for left in _starts(size[1], window[1])
  ]
  run = functools.partial(_jitted(_decoded), tokenizer, variables)
  sides = (np.arange(n * p) for n in window)
  weight = np.outer(*(np.minimum(x, x[::-1]) + 1.0 for x in sides))[..., None]
  total = np.zeros((size[0] * p, size[1] * p, 3), np.float32)
  weights = np.zeros_like(total[..., :1])
  windows = [z_q[part] for part in at]  # views
  for part, image in zip(
    at, _in_batches(run, windows, batch_size), strict=True
  ):
    pixels = tuple(slice(s.start * p, s.stop * p) for s in part)
    total[pixels] += weight * image
    weights[pixels] += weight
  return np.clip(total / weights, 0, 1)


def _starts(tokens: int, window: int) -> list[int]:
  """Where windows begin: half of one apart, the last at the end."""
  last = tokens - window
  return [*range(0, last, max(window // 2, 1)), last]


def reconstruct_tiled(
  tokenizer: Tokenizer,
  variables: Tree,
  image: np.ndarray,
  tile: int | tuple[int, int],
  batch_size: int = 32,
  whole: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """An image reconstructed from the tokens of its tiles (`decode_tiles`).

  Args:
    tokenizer, variables: the tokenizer.
    image: uint8 [h w 3], of any size.
    tile: the side or (h, w) of each tile, multiples of the patch.
    batch_size: tiles at once.
    whole: the image is one piece, cropped to a multiple of `tile`.

  Returns:
    (uint8 the centre of `image` that full tiles cover, f32 its reconstruction
    in [0, 1]).
  """
  tile = (tile, tile) if isinstance(tile, int) else tile
  image = crop_to(image, tile)
  size = image.shape[:2] if whole else tile
  batch_size = 1 if whole else batch_size
  run = functools.partial(_jitted(_quantized), tokenizer, variables)
  tiles = pipeline.tiles(image, size)
  z_q = np.stack([*_in_batches(run, tiles, batch_size)])
  joined = pipeline.join_tiles(z_q, image.shape[1] // size[1])
  recon = decode_tiles(tokenizer, variables, joined, z_q.shape[1:3], batch_size)
  return image, recon


def psnr(original: np.ndarray, recon: np.ndarray) -> float:
  """dB between uint8 [h w 3] and f32 [h w 3] in [0, 1]."""
  mse = np.mean((original / 255.0 - recon) ** 2)
  return float(-10 * np.log10(max(mse, 1e-10)))
