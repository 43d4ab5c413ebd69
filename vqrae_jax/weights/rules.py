"""The rows of a weight table: what each published key becomes.

  Rule('layers.{i}.fc1.weight', 'blocks/mlp/fc1/kernel[{i}]', 'linear')
  Rule('layers.{i}.qkv.weight', ('…/query/kernel[{i}]', '…/key/…', …), 'linear')
  Rule('cls_token', 'embed/prefix[0:1]', 'batched')
  ignore(r'head\..*', 'the pooling head: latents are taken before it')
  computed('pos_embed', positions, 'fixed sin-cos, computed here')
  constant('embed/prefix_positions[1:5]', 0.0, 'registers have no positions')

A table is total: every source key is matched by one row, every destination
leaf, every row of it, is filled by one (`load.py` holds it to that). Rows are
data; they read nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from vqrae_jax.errors import choose

# ----------------------------------------------------------------------------
# Transforms: how a published array is laid out beside ours. Values pass both
# ways bitwise, "zeros" aside.

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


def _reshaped(shape: Callable[[Shape], Shape], axis: int = 0) -> Transform:
  """The same values in the same order, as `shape` of ours."""
  return Transform(
    shape=shape,
    forward=lambda part, ours: part.reshape(ours),
    backward=lambda ours: ours.reshape(shape(ours.shape)),
    axis=axis,
  )


def by_heads(heads: int, axis: int) -> Transform:
  """flax's attention: our axis `axis` (from the end) as [heads, width/heads].

  It holds for stacked leaves too, whose layers stand in front.
  """

  def split(ours: Shape) -> Shape:
    at = len(ours) + axis
    return (*ours[:at], heads, ours[at] // heads, *ours[at + 1 :])

  return _reshaped(split)


def _cube(ours: Shape) -> Shape:
  """[p*p*3 d] as [p p 3 d]."""
  side = _patch_side(ours)
  return (side, side, _CHANNELS, ours[1])


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
    shape=lambda ours: _cube(ours)[:1:-1] + _cube(ours)[:2],
    forward=lambda part, ours: part.transpose(2, 3, 1, 0).reshape(ours),
    backward=lambda ours: ours.reshape(_cube(ours.shape)).transpose(3, 2, 0, 1),
  ),
  # The same as flax lays it: [p p 3 d], patches already (row, column,
  # channel).
  'flax patch': _reshaped(_cube),
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
  'channels': _reshaped(lambda ours: (*ours, 1, 1)),
  'batched channels': _reshaped(lambda ours: (1, *ours, 1, 1), axis=1),
  # Positions: [gh*gw d] to [gh gw d], and the same behind a batch axis.
  'grid': _reshaped(_rows),
  'batched grid': _reshaped(lambda ours: (1, *_rows(ours)), axis=1),
}


# Wrappers' names in front of all keys, stripped from all alike.
PREFIXES = (
  'module.',
  '_orig_mod.',
  'vision_tower.',
  'vision_model.',
  'vit.',
  'dinov2_with_registers.',
  'dinov2.',
  'internvl_vision.',
  'model.',
)

_DESTINATION = re.compile(r'([^\[\]{}]+)(?:\[(?:(\{i\})|(\d+):(\d+))\])?')


@dataclasses.dataclass(frozen=True)
class Destination:
  """A destination: a leaf, or one row of it a layer, or a range of rows."""

  leaf: str
  stacked: bool = False
  rows: tuple[int, int] | None = None


def parse_destination(text: str) -> Destination:
  """'leaf', 'leaf[{i}]' or 'leaf[a:b]'."""
  match = _DESTINATION.fullmatch(text)
  if match is None:
    raise ValueError(f'"{text}" is no leaf, leaf[{{i}}] or leaf[a:b]')
  leaf, layer, start, stop = match.groups()
  rows = None if start is None else (int(start), int(stop))
  return Destination(leaf, layer is not None, rows)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One source array to one destination, or cut into several.

  `{i}` in `source` is the number of a layer, and then each destination is
  row i of a stacked leaf. `transform` is a key of `TRANSFORMS` (or one that
  `by_heads` made), or as many as there are destinations.
  """

  source: str
  destination: str | tuple[str, ...]
  transform: str | Transform | tuple[str, ...] = 'same'

  def __post_init__(self):
    layered = '{i}' in self.source
    if any(p.stacked != layered for p in self.destinations):
      raise ValueError(
        f'{self}: {{i}} must appear in the source and each destination'
      )
    if len(self.transforms) != len(self.destinations):
      raise ValueError(f'{self}: a transform for each destination, or one')

  @property
  def destinations(self) -> tuple[Destination, ...]:
    names = self.destination
    return tuple(
      map(parse_destination, (names,) if isinstance(names, str) else names)
    )

  @property
  def transforms(self) -> tuple[Transform, ...]:
    names = self.transform
    if isinstance(names, Transform):
      return (names,) * len(self.destinations)
    if isinstance(names, str):
      names = (names,) * len(self.destinations)
    return tuple(choose(TRANSFORMS, n, 'transform of weights') for n in names)

  def key(self, layer: int) -> str:
    return self.source.replace('{i}', str(layer))


@dataclasses.dataclass(frozen=True)
class Ignore:
  """Source keys that the regex matches in full are not ours, and why."""

  pattern: str
  why: str

  def __post_init__(self):
    re.compile(self.pattern)


@dataclasses.dataclass(frozen=True)
class Computed:
  """A source array that is computed here: where it is there it must equal
  `value()` to `tolerance`."""

  source: str
  value: Callable[[], np.ndarray]
  why: str
  tolerance: float = 1e-5
  hint: str = ''


@dataclasses.dataclass(frozen=True)
class Constant:
  """Rows of a leaf that no file holds: a constant, and why."""

  destination: str
  value: float
  why: str

  def __post_init__(self):
    if self.parsed.stacked:
      raise ValueError(f'{self}: a constant fills all layers alike')

  @property
  def parsed(self) -> Destination:
    return parse_destination(self.destination)


ignore, computed, constant = Ignore, Computed, Constant  # as tables write them


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows of one kind of file, and the prefixes its keys may bear."""

  rows: tuple[Rule | Ignore | Computed | Constant, ...]
  prefixes: tuple[str, ...] = PREFIXES
