r"""The rows of a weight table: what each published key becomes.

  Rule('layers.{i}.fc1.weight', 'blocks/mlp/fc1/kernel', 'linear')
  Rule('layers.{i}.qkv.weight', ('…/query/kernel', '…/key/kernel', …), 'linear')
  Rule('cls_token', 'embed/prefix', 'batched')
  ignore(r'head\..*', 'the pooling head: latents are taken before it')
  computed('pos_embed', positions, 'fixed sin-cos, computed here')

A table is total: every source key is matched by one row, and every layer of
every destination leaf is filled by one (`load.py` enforces this). Rows are
data; they read nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from vqrae_jax.errors import choose

# ----------------------------------------------------------------------------
# Transforms: how a published array is laid out beside ours. Values pass both
# ways bitwise, "zeros" aside.

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """One layout of the source: ours as `cube(its shape)`, axes then permuted.

  With `zeros` its values are not taken, but zeros. Several destinations of one
  source lie beside each other along `axis` of it.
  """

  cube: Callable[[Shape], Shape] = lambda ours: ours
  axes: tuple[int, ...] | None = None
  axis: int = 0
  zeros: bool = False

  def shape(self, ours: Shape) -> Shape:
    """The source part's shape."""
    cube = self.cube(ours)
    return tuple(cube[i] for i in self.axes) if self.axes else cube

  def forward(self, part: np.ndarray, ours: Shape) -> np.ndarray:
    """The source part as our array, of shape `ours`."""
    if self.zeros:
      return np.zeros(ours, part.dtype)
    if self.axes:
      part = part.transpose(np.argsort(self.axes))
    return part.reshape(ours)

  def backward(self, ours: np.ndarray) -> np.ndarray:
    """The inverse of `forward`."""
    part = ours.reshape(self.cube(ours.shape))
    return part.transpose(self.axes) if self.axes else part


def by_heads(heads: int, axis: int) -> Transform:
  """flax's attention: our axis `axis` (from the end) as [heads, width/heads].

  It holds for stacked leaves too, whose layers stand in front.
  """

  def split(ours: Shape) -> Shape:
    at = len(ours) + axis
    return (*ours[:at], heads, ours[at] // heads, *ours[at + 1 :])

  return Transform(split)


def _patches(ours: Shape) -> Shape:
  """[p*p*3 d] as [p p 3 d]: each patch (row, column, channel), as
  ops.images.patchify lays it."""
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
  # One that cuts patches: [d 3 p p] to [p*p*3 d]; and as flax lays it.
  'conv_patch': Transform(_patches, axes=(3, 2, 0, 1)),
  'flax patch': Transform(_patches),
  # One token alone: [d] to [1 d].
  'token': Transform(lambda ours: ours[1:]),
  # A batch axis of one in front.
  'batched': Transform(lambda ours: (1, *ours), axis=1),
  # A value a channel, over images [c h w] and batches of them: [c 1 1] and
  # [1 c 1 1] to [c].
  'channels': Transform(lambda ours: (*ours, 1, 1)),
  'batched channels': Transform(lambda ours: (1, *ours, 1, 1), axis=1),
  # Positions: [gh*gw d] to [gh gw d], and the same behind a batch axis.
  'grid': Transform(_rows),
  'batched grid': Transform(lambda ours: (1, *_rows(ours)), axis=1),
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


@dataclasses.dataclass(frozen=True)
class Rule:
  """One source array to one leaf, or cut into several.

  `{i}` in `source` is the number of a layer, and then each destination is
  row i of a stacked leaf. `transform` is a key of `TRANSFORMS` (or one that
  `by_heads` made), or as many as there are destinations.
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
  """Source keys, matched in full by the regex, that are not used, and why."""

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


ignore, computed = Ignore, Computed  # as tables write them


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows of one kind of file, and the prefixes its keys may bear."""

  rows: tuple[Rule | Ignore | Computed, ...]
  prefixes: tuple[str, ...] = PREFIXES
