"""From images to batches, the same whatever the number of hosts.

Global sample i of a run is a pure function of the seed and i: which image (a
new permutation each epoch), which crop, whether flipped, and which images
replace one that cannot be read; with several sizes, the size is a function of
the seed and the step. Step s reads samples [s B, (s+1) B), and host p of P
takes rows [p B/P, (p+1) B/P) of them. So the step is the only position to save.
`eval_batches` takes every image once, in order.

Images stay uint8 here; the device scales them to [0, 1].
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from vqrae_jax.data.decode import MAX_PIXELS, EncodedImages, ImageDecodeError
from vqrae_jax.errors import UserError

CROPS = ('random', 'center', 'squash')
Images = EncodedImages | Sequence[np.ndarray]  # each uint8 [h w 3]
# This many unreadable draws in a row are no coincidence.
MAX_DRAWS = 16
# Batches read ahead: the next one, and one more for threads that find no image
# left to read in it.
_AHEAD = 2
_SIZES = 105  # keeps these draws apart from others of the same seed


@dataclasses.dataclass(frozen=True)
class Augment:
  """How an image of a source becomes a training image.

  Attributes:
    size: (h, w) of the training image, in pixels.
    resize: the shorter side before cropping, in pixels; a pair draws it log-
      uniformly between the two; None keeps the image's own size (one
      smaller than `size` is always brought up to it).
    crop: "random", "center", or "squash": the full image is resized to `size`,
      whatever its aspect ratio, and `resize` is not used.
    flip: mirror half of the images left to right.
  """

  size: tuple[int, int]
  resize: int | tuple[int, int] | None = None
  crop: str = 'random'
  flip: bool = True

  @property
  def ample(self) -> int:
    """Pixels a side that a decoder must keep: twice the largest shorter side
    after resizing; if images keep their own size, more than any has."""
    if self.crop == 'squash':
      return 2 * max(self.size)
    if self.resize is None:
      return MAX_PIXELS
    return 2 * max(np.max(self.resize).item(), *self.size)


def augment_image(
  image: np.ndarray | Image.Image, augment: Augment, rng: np.random.Generator
) -> np.ndarray:
  """RGB, uint8 [h w 3] -> uint8 [*augment.size 3], by the draws of `rng`.

  Bicubic (PIL). Only the part that the crop keeps is resized; where six pixels
  or more become one, it is first reduced by a whole factor.
  """
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  return np.asarray(_augmented(image, augment, rng))


def _augmented(image: Image.Image, augment: Augment, rng) -> Image.Image:
  w, h = image.size
  ch, cw = augment.size
  if augment.crop == 'squash':
    image = image.resize((cw, ch), Image.BICUBIC, reducing_gap=3)
    return _flipped(image, augment, rng)
  side = augment.resize or min(h, w)
  if isinstance(side, tuple):
    low, high = side
    side = round(low * (high / low) ** rng.random())
  rh, rw = resized(h, w, side, augment.size)
  if augment.crop == 'random':
    top, left = rng.integers(rh - ch + 1), rng.integers(rw - cw + 1)
  else:
    top, left = (rh - ch) // 2, (rw - cw) // 2
  image, _ = window(image, (rh, rw), (top, left), augment.size)
  return _flipped(image, augment, rng)


def centre_crop(
  image: np.ndarray | Image.Image,
  size: tuple[int, int],
  side: int | None = None,
) -> np.ndarray:
  """RGB, uint8 [h w 3] -> uint8 [*size 3]: the centre, once the shorter side is
  `side` pixels; None keeps the image's own size."""
  augment = Augment(size, side, crop='center', flip=False)
  return augment_image(image, augment, np.random.default_rng(0))


def resized(
  h: int, w: int, side: int, size: tuple[int, int]
) -> tuple[int, int]:
  """(h, w) of an image resized to a shorter side of `side`, or of more if a
  window of `size` needs it."""
  fit = max(size[0] * min(h, w) / h, size[1] * min(h, w) / w)
  side = max(side, math.ceil(fit))
  rh, rw = (max(side, round(n * side / min(h, w))) for n in (h, w))
  return rh, rw


def window(
  image: Image.Image,
  full: tuple[int, int],
  corner: tuple[int, int],
  size: tuple[int, int],
) -> tuple[Image.Image, tuple[float, float, float, float]]:
  """A window of an image resized to `full`, and its box in the given image:
  (left, top, right, bottom) in pixels, which may be fractions.

  Args:
    image: RGB.
    full: (h, w) of the resized image.
    corner: (top, left) of the window in the resized image.
    size: (h, w) of the window.
  """
  (w, h), (rh, rw), (top, left), (ch, cw) = image.size, full, corner, size
  box = left * w / rw, top * h / rh, (left + cw) * w / rw, (top + ch) * h / rh
  box = tuple(map(min, box, (w, h, w, h)))
  if (rh, rw) == (h, w):
    return image.crop((left, top, left + cw, top + ch)), box
  # First reduced by a whole factor where six pixels or more become one.
  return image.resize((cw, ch), Image.BICUBIC, box=box, reducing_gap=3), box


def _flipped(image: Image.Image, augment: Augment, rng) -> Image.Image:
  if augment.flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return image


def _global_order(n: int, seed: int) -> grain.MapDataset:
  """i -> (i, image): a new permutation of n images each epoch."""
  # Endless in practice; grain's own endless length overflows when batched.
  epochs = 2**48 // n
  order = grain.MapDataset.range(n).seed(seed)
  if n >= 4096:
    order = order.shuffle().repeat(epochs)
    return order.map_with_index(lambda i, photo: (i, int(photo)))

  # grain's shuffle takes 1.6 ms a sample for 8 images, .02 for 1000
  # (grain 0.2.18, 2026-11): a small epoch's permutation is drawn in one call.
  @functools.lru_cache(maxsize=4)
  def permutation(epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)

  order = order.repeat(epochs)
  return order.map_with_index(lambda i, _: (i, int(permutation(i // n)[i % n])))


def reading_threads() -> int:
  """The number of decoding threads: the cores this process may use, 2 to 16."""
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return min(max(cores, 2), 16)


class TrainBatches:
  """One host's share of the endless sequence of training batches."""

  def __init__(
    self,
    source: EncodedImages,
    augments: Sequence[Augment],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Args:
    source: the images.
    augments: how each becomes a training image; of several each step draws
      one.
    batch_size: B, over all hosts: a multiple of P.
    seed: of the order and of the crops.
    process_index, process_count: p and P.
    """
    local = batch_size // process_count
    self._source, self._seed, self._augments = source, seed, augments
    self._unreadable: dict[str, str] = {}
    self._lock = threading.Lock()
    order = _global_order(len(source), seed)
    # The draws of sample i are those of grain's `random_map`, from a Philox of
    # last counter i. The call itself would cost as much as a crop of 32 pixels.
    state = order.random_map(lambda _, rng: rng.bit_generator.state)[0]
    self._key = state['state']['key']
    self._batches = order.batch(local)
    self._first, self._stride = process_index, process_count

  def _draw(self, index: int, photo: int) -> tuple[Image.Image, int, int]:
    """(image, its index in the source, unreadable draws before it) of a sample.

    Substitutes are a function of seed, index and attempt, so that every host
    and every restart draws the same.
    """
    for attempt in range(MAX_DRAWS):
      if attempt:
        rng = np.random.default_rng((self._seed, index, attempt))
        photo = int(rng.integers(len(self._source)))
      try:
        return self._source.picture(photo), photo, attempt
      except ImageDecodeError as e:
        with self._lock:
          self._unreadable[self._source.name(photo)] = e.reason
        last = e
    raise UserError(
      f'{MAX_DRAWS} images drawn in a row are unreadable; the last: {last}'
    )

  @property
  def unreadable(self) -> dict[str, str]:
    """{name: reason} of the images that this host could not read so far.

    A copy; `iterate` reads ahead, so images of later steps may be in it.
    """
    with self._lock:
      return dict(self._unreadable)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This host's rows of the batch of a step.

    Returns:
      images: uint8 [b h w 3].
      index: int64 [b], the number of the sample in the run.
      photo: int64 [b], the index of its image in the source.
      skipped: int32 [b], 1 where the image that was drawn first is unreadable.

    Raises:
      UserError: `MAX_DRAWS` unreadable draws in a row.
    """
    batch, fill = self._empty(step)
    fill(range(len(batch['index'])))
    return batch

  def _empty(self, step: int) -> tuple[dict, Callable[[Iterable[int]], None]]:
    """(this host's batch of a step, not yet read; a function to read rows)."""
    index, photo = self._batches[step * self._stride + self._first]
    augment = self._augments[0]
    if (several := len(self._augments)) > 1:
      draw = np.random.default_rng((self._seed, step, _SIZES))
      augment = self._augments[draw.integers(several)]
    images = np.empty((len(index), *augment.size, 3), np.uint8)
    # NumPy's copy would let another thread take the interpreter: 1 % an image.
    flat, size = memoryview(images).cast('B'), 3 * math.prod(augment.size)
    skipped = np.empty(len(index), np.int32)

    def fill(rows):
      # One generator, set for each row: a new one costs 3 % of an image.
      philox = np.random.Philox(key=self._key)
      rng, state = np.random.Generator(philox), philox.state
      for row in rows:
        i = int(index[row])
        image, photo[row], attempts = self._draw(i, int(photo[row]))
        skipped[row] = attempts > 0
        state['state']['counter'][:] = 0, 0, 0, i
        philox.state = state
        pixels = _augmented(image, augment, rng).tobytes()
        flat[row * size : (row + 1) * size] = pixels

    batch = dict(images=images, index=index, photo=photo, skipped=skipped)
    return batch, fill

  def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches from `start_step` on, read ahead by threads.

    A thread takes the next image that no other has taken, so that all of them
    work on the batch that is needed next. They end with the iterator, after the
    image that each is at: if they outlived it, a kernel may start the next
    iterator's on one core.
    """
    reading: collections.deque = collections.deque()
    threads = reading_threads()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      try:
        for step in itertools.count(start_step):
          batch, fill = self._empty(step)
          rows = iter(range(len(batch['index'])))  # which the threads share
          work = [pool.submit(fill, rows) for _ in range(threads)]
          reading.append((batch, rows, work))
          if len(reading) > _AHEAD:
            batch, _, work = reading[0]
            for part in work:
              part.result()
            reading.popleft()
            yield batch
      finally:
        for _, rows, _ in reading:
          for _ in rows:  # none is left to read
            pass


def tiles(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[h w …] -> [n *size …]: an image cut into a grid from its top left.

  The remainder at the right and the bottom is dropped.
  """
  h, w = (n // s for n, s in zip(image.shape[:2], size, strict=True))
  image = image[: h * size[0], : w * size[1]]
  image = image.reshape(h, size[0], w, size[1], *image.shape[2:])
  return image.swapaxes(1, 2).reshape(h * w, *size, *image.shape[4:])


def join_tiles(tiles: np.ndarray, columns: int) -> np.ndarray:
  """[n th tw …] -> [h w …], the inverse of `tiles`, `columns` tiles wide."""
  n, th, tw, *rest = tiles.shape
  rows = tiles.reshape(n // columns, columns, th, tw, *rest).swapaxes(1, 2)
  return rows.reshape(n // columns * th, columns * tw, *rest)


def each_image(
  source: Images,
  cut: Callable[[np.ndarray], np.ndarray] = lambda image: image,
  indices: Sequence[int] | None = None,
) -> Iterator[tuple[int, np.ndarray | ImageDecodeError]]:
  """(index, cut(image)) of every image in order, read ahead by threads.

  An image that cannot be read yields its error instead.
  """
  indices = range(len(source)) if indices is None else indices

  def read(i):
    try:
      return int(indices[i]), cut(source[indices[i]])
    except ImageDecodeError as e:
      return int(indices[i]), e

  # One image per thread, and two waiting.
  threads = reading_threads()
  ahead = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=threads + 2
  )
  images = grain.MapDataset.range(len(indices)).map(read)
  return iter(images.to_iter_dataset(ahead) if len(indices) else ())


def eval_batches(
  source: Images,
  cut: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  indices: Sequence[int] | None = None,
  unreadable: Callable[[int, ImageDecodeError], None] | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
  """Batches of all images once, in order; only a few images are in memory.

  Args:
    source: the images.
    cut: uint8 [h w 3] -> uint8 [n *size 3], the rows of one image.
    batch_size: rows of a batch.
    indices: which images; all if None.
    unreadable: called for each image that cannot be read; None raises.

  Yields:
    (uint8 [batch_size *size 3], the index of each row's image). The last batch
    is padded with zeros; its list of indices is shorter.

  Raises:
    ImageDecodeError: an image cannot be read and `unreadable` is None.
  """
  waiting: list = []  # rows: less than a batch, plus those of one image
  owners: list[int] = []
  for index, rows in each_image(source, cut, indices):
    if isinstance(rows, ImageDecodeError):
      if unreadable is None:
        raise rows
      unreadable(index, rows)
      continue
    waiting += list(rows)
    owners += [index] * len(rows)
    while len(waiting) >= batch_size:
      yield np.stack(waiting[:batch_size]), owners[:batch_size]
      del waiting[:batch_size], owners[:batch_size]
  if waiting:
    missing = batch_size - len(waiting)
    padding = [np.zeros_like(waiting[0])] * missing
    yield np.stack(waiting + padding), owners


def one_ahead(
  run: Callable[[np.ndarray], Any],
  batches: Iterable[tuple[np.ndarray, list[int]]],
) -> Iterator[np.ndarray]:
  """`run` of the batches of `eval_batches`, the rows that count of each.

  The next batch is dispatched before the results of one are waited for.
  """
  waiting: tuple[Any, int] | None = None
  for images, owners in batches:
    dispatched = run(images), len(owners)
    if waiting is not None:
      yield np.asarray(waiting[0])[: waiting[1]]
    waiting = dispatched
  if waiting is not None:
    yield np.asarray(waiting[0])[: waiting[1]]
