"""Moments of an encoder's latents over photographs, each taken once.

Threads read and crop ahead, the device encodes, and the host sums in f64 what
the batch before gave. Sums of tokens do not know batches, so neither their
size nor the number of hosts moves the result beyond f64's last digits.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vqrae_jax.data.decode import Unreadable
from vqrae_jax.data.pipeline import Augment, augment_image, reading_threads
from vqrae_jax.data.sources import Photographs
from vqrae_jax.evaluate.moments import Moments


@dataclasses.dataclass(frozen=True)
class Measured:
  """What some photographs gave.

  Attributes:
    moments: of latents f64[d], over tokens, or f64[gh gw d], over images.
    images: photographs that were encoded.
    skipped: photographs that could not be read.
  """

  moments: Moments
  images: int
  skipped: int


def spread(count: int, wanted: int | None) -> range | list[int]:
  """`wanted` of `count` indices, evenly spaced: listings go class by class."""
  if wanted is None:
    return range(count)
  return [i * count // wanted for i in range(wanted)]


def crops(
  source: Photographs,
  indices: Sequence[int],
  size: tuple[int, int],
  skip: Callable[[str, str], None],
) -> Iterator[np.ndarray]:
  """uint8 [*size 3]: the centre of each photograph that can be read, in order.

  Args:
    source: the photographs.
    indices: which of them.
    size: (h, w); the photograph is resized until it just covers that.
    skip: is told (name, reason) of each that cannot be read.
  """
  # The shortest side that any photograph may have and cover the crop.
  augment = Augment(size, resize=min(size), crop='center', flip=False)
  rng = np.random.default_rng(0)  # asked for nothing

  def read(index):
    return augment_image(source[index], augment, rng)

  threads = reading_threads()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting: collections.deque = collections.deque()
    ahead = iter(indices)
    while True:
      while len(waiting) < 4 * threads:
        index = next(ahead, None)
        if index is None:
          break
        waiting.append((index, pool.submit(read, index)))
      if not waiting:
        return
      index, image = waiting.popleft()
      try:
        yield image.result()
      except Unreadable as e:
        skip(source.name(index), e.reason)


def batches(
  images: Iterable[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """(uint8 [b h w 3], how many of its rows count): the last is padded."""
  rows = []
  for image in images:
    rows.append(image)
    if len(rows) == batch_size:
      yield np.stack(rows), batch_size
      rows = []
  if rows:
    short = batch_size - len(rows)
    yield np.stack(rows + [np.zeros_like(rows[0])] * short), len(rows)


def moments_of(
  encode: Callable[[np.ndarray], jax.Array],
  images: Iterable[np.ndarray],
  shape: tuple[int, ...],
  batch_size: int,
  progress: Callable[[int], Any],
) -> tuple[Moments, int]:
  """(moments, number of images) of the latents of `images`.

  Args:
    encode: uint8 [b h w 3] -> f[b gh gw d].
    images: uint8 [h w 3] each.
    shape: (d,) for moments over tokens, (gh, gw, d) over images.
    batch_size: b.
    progress: is told how many images more were summed.
  """
  total, count = Moments.none(shape), 0

  def add(pending):
    nonlocal total, count
    latents, n = pending
    rows = np.asarray(latents, np.float32)[:n].reshape(-1, *shape)
    total, count = total.merge(Moments.of(rows)), count + n
    progress(n)

  pending = None
  for batch, n in batches(images, batch_size):
    now = encode(batch), n  # dispatched, and not waited for
    if pending is not None:
      add(pending)
    pending = now
  if pending is not None:
    add(pending)
  return total, count


def over_hosts(mine: Measured) -> Measured:
  """All hosts' together, the same on each of them; all must call."""
  if jax.process_count() == 1:
    return mine
  from jax.experimental import multihost_utils

  shape = mine.moments.mean.shape
  row = np.concatenate([[mine.images, mine.skipped], mine.moments.packed()])
  # As halves of f64s: JAX would make f32 of them.
  halves = multihost_utils.process_allgather(row.view(np.uint32))
  total = Measured(Moments.none(shape), 0, 0)
  for row in np.ascontiguousarray(halves).view(np.float64):
    total = Measured(
      total.moments.merge(Moments.unpacked(row[2:], shape)),
      total.images + int(row[0]),
      total.skipped + int(row[1]),
    )
  return total
