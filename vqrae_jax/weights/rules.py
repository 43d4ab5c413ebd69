r"""The rows of a weight table: what each key of a published file becomes.

  Rule('layers.{i}.fc1.weight', 'blocks/mlp/fc1/kernel', 'linear')
  Rule('layers.{i}.qkv.weight', ('…/query/kernel', '…/key/kernel', …), 'linear')
  Rule('cls_token', 'embed/prefix', 'batched')
  Ignore(r'head\..*', 'the pooling head: latents are taken before it')
  Computed('pos_embed', positions, 'fixed sin-cos, computed here')

A table is total: every source key is matched by one row, and every layer of
every destination leaf is filled by one (`load.py` enforces this). Rows are
data; they read no file.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from vqrae_jax.errors import choose

# ----------------------------------------------------------------------------
# Transforms between the layout of a published array and ours. Both directions
# keep values bit for bit, except "zeros".

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """A layout of the source: our array reshaped to `cube(its shape)`, then
  transposed by `axes`.

  With `zeros` our array is zeros, whatever the source's values. Several
  destinations of one source are concatenated along its axis `axis`.
  """

  cube: Callable[[Shape], Shape] = lambda ours: ours
  axes: tuple[int, ...] | None = None
  axis: int = 0
  zeros: bool = False

  def shape(self, ours: Shape) -> Shape:
    """The shape of the source, or of its part for this destination."""
    cube = self.cube(ours)
    return tuple(cube[i] for i in self.axes) if self.axes else cube

  def forward(self, part: np.ndarray, ours: Shape) -> np.ndarray:
    """The source, or its part, as our array of shape `ours`."""
    if self.zeros:
      return np.zeros(ours, part.dtype)
    if self.axes:
      part = part.transpose(np.argsort(self.axes))
    return part.reshape(ours)

  def backward(self, ours: np.ndarray) -> np.ndarray:
    """The inverse of `forward`; with `zeros` of its layout only."""
    part = ours.reshape(self.cube(ours.shape))
    return part.transpose(self.axes) if self.axes else part


def by_heads(heads: int, axis: int) -> Transform:
  """Our axis `axis`, negative, as [heads, width/heads], as in flax's attention.

  It also holds for stacked leaves, whose first axis is the layers.
  """

  def split(ours: Shape) -> Shape:
    at = len(ours) + axis
    return (*ours[:at], heads, ours[at] // heads, *ours[at + 1 :])

  return Transform(split)


def _patches(ours: Shape) -> Shape:
  """[p*p*3 d] as [p p 3 d]: each patch is (row, column, channel), as in
  `ops.images.patchify`."""
  side = math.isqrt(ours[0] // 3)
  return (side, side, 3, ours[1])


def _rows(ours: Shape) -> Shape:
  return (math.prod(ours[:-1]), ours[-1])


TRANSFORMS = {
  'same': Transform(),
  'zeros': Transform(zeros=True),
  # A dense kernel: [out in] to [in out].
  'linear': Transform(axes=(1, 0)),
  # A convolution's kernel: [out in h w] to [h w in out].
  'conv': Transform(axes=(3, 2, 0, 1)),
  # A patch embedding's: [d 3 p p] to [p*p*3 d]; in flax [p p 3 d].
  'conv_patch': Transform(_patches, axes=(3, 2, 0, 1)),
  'flax patch': Transform(_patches),
  # One token: [d] to [1 d].
  'token': Transform(lambda ours: ours[1:]),
  # A leading batch axis of size one, which is dropped.
  'batched': Transform(lambda ours: (1, *ours), axis=1),
  # One value per channel of images or of batches: [c 1 1] and [1 c 1 1] to
  # [c].
  'channels': Transform(lambda ours: (*ours, 1, 1)),
  'batched channels': Transform(lambda ours: (1, *ours, 1, 1), axis=1),
  # Positions: [gh*gw d] to [gh gw d], without and with a leading batch axis.
  'grid': Transform(_rows),
  'batched grid': Transform(lambda ours: (1, *_rows(ours)), axis=1),
}


# Prefixes that wrappers give to all keys of a file; they are stripped.
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


@dataclasses.dataclass(frozen=True)
class Rule:
  """One source array to one leaf, or split into several.

  `{i}` in `source` is the number of a layer; each destination is then row i of
  a stacked leaf. `transform` is a key of `TRANSFORMS` or a `Transform`, for
  every destination, or a tuple with one key for each.
  """

  source: str
  destination: str | tuple[str, ...]
  transform: str | Transform | tuple[str, ...] = 'same'

  @property
  def leaves(self) -> tuple[str, ...]:
    names = self.destination
    return (names,) if isinstance(names, str) else names

  @property
  def transforms(self) -> tuple[Transform, ...]:
    names = self.transform
    if isinstance(names, Transform):
      return (names,) * len(self.leaves)
    if isinstance(names, str):
      names = (names,) * len(self.leaves)
    return tuple(choose(TRANSFORMS, n, 'transform of weights') for n in names)


@dataclasses.dataclass(frozen=True)
class Ignore:
  """Source keys that are not used, and why; the regex matches the full key."""

  pattern: str
  why: str


@dataclasses.dataclass(frozen=True)
class Computed:
  """A source array that is computed here: if the file has it, it must equal
  `value()` to 1e-5."""

  source: str
  value: Callable[[], np.ndarray]
  why: str
  hint: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows of one kind of file, and the prefixes that its keys may have."""

  rows: tuple[Rule | Ignore | Computed, ...]
  prefixes: tuple[str, ...] = PREFIXES
