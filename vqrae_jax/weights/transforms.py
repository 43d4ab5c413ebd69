"""How a published array lies beside ours: the words that rules use.

A transform says, for one destination block, the shape of its part of the
source array, and carries values both ways, bitwise ("zeros" aside). What it
does not do: choose keys (`rules.py`) or read files.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Transform:
  """One layout of the source and ours.

  `shape` gives the source part's shape from ours; `forward` turns the part
  into our array (its second argument is our shape), `backward` is its
  inverse. `index` maps a block of ours to the block of the part that holds
  it, None where a block is cut only after `forward`. Several destinations of
  one source lie beside each other along `axis` of it.
  """

  shape: Callable[[Shape], Shape]
  forward: Callable[[np.ndarray, Shape], np.ndarray]
  backward: Callable[[np.ndarray], np.ndarray]
  index: Callable[[tuple[slice, ...]], tuple[slice, ...]] | None = None
  axis: int = 0


def _patch_side(ours: Shape) -> int:
  side = math.isqrt(ours[0] // _CHANNELS)
  if side * side * _CHANNELS != ours[0]:
    raise ValueError(f'{ours} is no embedding of square patches')
  return side


def _conv_shape(ours: Shape) -> Shape:
  side = _patch_side(ours)
  return (ours[1], _CHANNELS, side, side)


def _conv_forward(part: np.ndarray, ours: Shape) -> np.ndarray:
  return part.transpose(2, 3, 1, 0).reshape(ours)


def _conv_backward(ours: np.ndarray) -> np.ndarray:
  side = _patch_side(ours.shape)
  cube = ours.reshape(side, side, _CHANNELS, ours.shape[1])
  return cube.transpose(3, 2, 0, 1)


def _flax_backward(ours: np.ndarray) -> np.ndarray:
  side = _patch_side(ours.shape)
  return ours.reshape(side, side, _CHANNELS, ours.shape[1])


def by_heads(heads: int, axis: int) -> Transform:
  """flax's attention: our axis `axis` (from the end) as [heads, width/heads].

  It holds for stacked leaves too, whose layers stand in front.
  """

  def split(ours: Shape) -> Shape:
    at = len(ours) + axis
    return (*ours[:at], heads, ours[at] // heads, *ours[at + 1 :])

  return Transform(
    shape=split,
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours.reshape(split(ours.shape)),
  )


def _rows(ours: Shape) -> Shape:
  return (math.prod(ours[:-1]), ours[-1])


TRANSFORMS = {
  # As it is.
  'same': Transform(
    shape=lambda ours: ours,
    forward=lambda part, ours: part,
    backward=lambda ours: ours,
    index=lambda block: block,
  ),
  # Its values are not taken: zeros here, and zeros on the way back.
  'zeros': Transform(
    shape=lambda ours: ours,
    forward=lambda part, ours: np.zeros(ours, part.dtype),
    backward=np.zeros_like,
    index=lambda block: block,
  ),
  # A dense kernel: [out in] to [in out].
  'linear': Transform(
    shape=lambda ours: ours[::-1],
    forward=lambda part, ours: part.T,
    backward=lambda ours: ours.T,
    index=lambda block: block[::-1],
  ),
  # A convolution that cuts patches: [d 3 p p] to [p*p*3 d], each patch laid
  # (row, column, channel) as ops.images.patchify lays it.
  'conv_patch': Transform(
    shape=_conv_shape, forward=_conv_forward, backward=_conv_backward
  ),
  # The same as flax lays it: [p p 3 d], patches already (row, column,
  # channel).
  'flax patch': Transform(
    shape=lambda ours: (_patch_side(ours),) * 2 + (_CHANNELS, ours[1]),
    forward=lambda part, ours: part.reshape(ours),
    backward=_flax_backward,
  ),
  # A convolution's kernel: [out in h w] to [h w in out].
  'conv': Transform(
    shape=lambda ours: (ours[3], ours[2], ours[0], ours[1]),
    forward=lambda part, ours: part.transpose(2, 3, 1, 0),
    backward=lambda ours: ours.transpose(3, 2, 0, 1),
  ),
  # A batch axis of one in front.
  'batched': Transform(
    shape=lambda ours: (1, *ours),
    forward=lambda part, ours: part[0],
    backward=lambda ours: ours[None],
    index=lambda block: (slice(0, 1), *block),
    axis=1,
  ),
  # A value a channel, over images [c h w] and batches of them: [c 1 1] and
  # [1 c 1 1] to [c].
  'channels': Transform(
    shape=lambda ours: (*ours, 1, 1),
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours[..., None, None],
  ),
  'batched channels': Transform(
    shape=lambda ours: (1, *ours, 1, 1),
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours[None, ..., None, None],
    axis=1,
  ),
  # Positions: [gh*gw d] to [gh gw d], and the same behind a batch axis.
  'grid': Transform(
    shape=_rows,
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours.reshape(_rows(ours.shape)),
  ),
  'batched grid': Transform(
    shape=lambda ours: (1, *_rows(ours)),
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours.reshape(1, *_rows(ours.shape)),
    axis=1,
  ),
}
