"""From photographs to batches, the same whatever the number of hosts.

Global sample i of a run is a pure function of the seed and i: which
photograph (a new permutation each epoch), which crop, whether flipped. Step s
reads samples [s B, (s+1) B), and host p of P takes rows [p B/P, (p+1) B/P) of
them. So the position is the step, and nothing else needs saving.

Images stay uint8 here; the device scales them to [0, 1].
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from PIL import Image

from vqrae_jax.data.sources import ImageFiles
from vqrae_jax.errors import UserError

CROPS = ('random', 'center')


@dataclasses.dataclass(frozen=True)
class Augment:
  """How a photograph becomes a training image.

  Attributes:
    size: (h, w) of the image, in pixels.
    resize: the shorter side before cropping, in pixels; a pair draws it log-
      uniformly between the two; None keeps the photograph's own size (a
      photograph smaller than `size` is always brought up to it).
    crop: "random" or "center".
    flip: mirror half of the images left to right.
  """

  size: tuple[int, int]
  resize: int | tuple[int, int] | None = None
  crop: str = 'random'
  flip: bool = True


def _target_side(image: np.ndarray, augment: Augment, rng) -> int:
  h, w = image.shape[:2]
  side = augment.resize or min(h, w)
  if isinstance(side, tuple):
    low, high = side
    side = round(low * (high / low) ** rng.random())
  # Never smaller than the crop, on either side.
  fit = max(augment.size[0] * min(h, w) / h, augment.size[1] * min(h, w) / w)
  return max(side, int(np.ceil(fit)))


def resize_shorter(image: np.ndarray, side: int) -> np.ndarray:
  """uint8 [h w 3] with its shorter side at `side` pixels, bicubic (PIL)."""
  h, w = image.shape[:2]
  if min(h, w) == side:
    return image
  size = [max(side, round(n * side / min(h, w))) for n in (w, h)]
  return np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))


def augment_image(
  image: np.ndarray, augment: Augment, rng: np.random.Generator
) -> np.ndarray:
  """uint8 [h w 3] -> uint8 [*augment.size 3], by the draws of `rng`."""
  image = resize_shorter(image, _target_side(image, augment, rng))
  (h, w), (ch, cw) = image.shape[:2], augment.size
  if augment.crop == 'random':
    top, left = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
  else:
    top, left = (h - ch) // 2, (w - cw) // 2
  image = image[top : top + ch, left : left + cw]
  if augment.flip and rng.random() < 0.5:
    image = image[:, ::-1]
  return np.ascontiguousarray(image)


class TrainBatches:
  """Endless global order over a source; iterate one host's share of it."""

  def __init__(
    self,
    source: ImageFiles,
    augment: Augment,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Args:
    source: the photographs.
    augment: how each becomes an image.
    batch_size: B, over all hosts.
    seed: of the order and of the crops.
    process_index, process_count: p and P.
    """
    if batch_size % process_count:
      raise UserError(
        f'batch_size={batch_size} must be a multiple of the {process_count} '
        'hosts'
      )
    local = batch_size // process_count

    def make(index_image, rng):
      index, photo = index_image
      return {
        'images': augment_image(source[int(photo)], augment, rng),
        'index': np.int64(index),
      }

    # Endless in practice; grain's own endless length overflows when batched.
    epochs = 2**48 // len(source)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    order = order.repeat(epochs)
    order = order.map_with_index(lambda index, photo: (index, photo))
    self._batches = order.random_map(make).batch(local)
    self._first, self._stride = process_index, process_count

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This host's rows of step's batch: images uint8 [b h w 3], index [b]."""
    return self._batches[step * self._stride + self._first]

  def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches from `start_step` on, read ahead by threads."""
    mine = self._batches[self._first :: self._stride]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(mine.to_iter_dataset(options))
    state = iterator.get_state()
    state['next_index'] = start_step
    iterator.set_state(state)
    return iterator


def tiles(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """uint8 [n *size 3]: a photograph cut into a grid from its top left.

  What is left over at the right and the bottom is dropped.
  """
  h, w = (n // s for n, s in zip(image.shape[:2], size, strict=True))
  image = image[: h * size[0], : w * size[1]]
  image = image.reshape(h, size[0], w, size[1], 3).transpose(0, 2, 1, 3, 4)
  return image.reshape(h * w, *size, 3)
