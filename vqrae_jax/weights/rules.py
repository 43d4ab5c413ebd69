"""The rows of a weight table: what each published key becomes.

  Rule('layers.{i}.fc1.weight', 'blocks/mlp/fc1/kernel[{i}]', 'linear')
  Rule('layers.{i}.qkv.weight', ('…/query/kernel[{i}]', '…/key/…', …), 'linear')
  Rule('cls_token', 'embed/prefix[0:1]', 'batched')
  skip(r'head\\..*', 'the pooling head: latents are taken before it')
  known('pos_embed', positions, 'fixed sin-cos, computed here')
  fill('embed/prefix_positions[1:5]', 0.0, 'registers have no positions')

A table is total: every source key is matched by one row, every destination
leaf, every row of it, is filled by one (`match.py` holds it to that). Rows
are data; they read nothing.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from vqrae_jax.errors import choose
from vqrae_jax.weights.transforms import TRANSFORMS, Transform

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
class Place:
  """A destination: a leaf, or one row of it a layer, or a range of rows."""

  leaf: str
  stacked: bool = False
  rows: tuple[int, int] | None = None


def place(word: str) -> Place:
  """'leaf', 'leaf[{i}]' or 'leaf[a:b]'."""
  match = _DESTINATION.fullmatch(word)
  if match is None:
    raise ValueError(f'"{word}" is no leaf, leaf[{{i}}] or leaf[a:b]')
  leaf, layer, start, stop = match.groups()
  rows = None if start is None else (int(start), int(stop))
  return Place(leaf, layer is not None, rows)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One source array to one destination, or cut into several.

  `{i}` in `source` is the number of a layer, and then each destination is
  row i of a stacked leaf. `transform` is a word of `transforms.py` (or one
  that a function there made), or as many as there are destinations.
  """

  source: str
  destination: str | tuple[str, ...]
  transform: str | Transform | tuple[str, ...] = 'same'

  def __post_init__(self):
    layered = '{i}' in self.source
    if any(p.stacked != layered for p in self.places):
      raise ValueError(f'{self}: {{i}} stands on one side only')
    if len(self.transforms) != len(self.places):
      raise ValueError(f'{self}: a transform for each destination, or one')

  @property
  def places(self) -> tuple[Place, ...]:
    words = self.destination
    return tuple(map(place, (words,) if isinstance(words, str) else words))

  @property
  def transforms(self) -> tuple[Transform, ...]:
    words = self.transform
    if isinstance(words, Transform):
      return (words,) * len(self.places)
    if isinstance(words, str):
      words = (words,) * len(self.places)
    return tuple(choose(TRANSFORMS, w, 'transform of weights') for w in words)

  def key(self, layer: int) -> str:
    return self.source.replace('{i}', str(layer))


@dataclasses.dataclass(frozen=True)
class Skip:
  """Source keys that are not ours, and why."""

  pattern: str
  why: str


@dataclasses.dataclass(frozen=True)
class Known:
  """A source array that is computed here, and compared when it is met."""

  source: str
  value: Callable[[], np.ndarray]
  why: str
  tolerance: float = 1e-5
  way_out: str = ''


@dataclasses.dataclass(frozen=True)
class Fill:
  """Rows of a leaf that no file holds: a constant, and why."""

  destination: str
  value: float
  why: str

  def __post_init__(self):
    if self.place.stacked:
      raise ValueError(f'{self}: a constant fills all layers alike')

  @property
  def place(self) -> Place:
    return place(self.destination)


def skip(pattern: str, why: str) -> Skip:
  """Leaves out the keys that the regex matches whole, for a reason."""
  re.compile(pattern)
  return Skip(pattern, why)


def known(
  source: str,
  value: Callable[[], np.ndarray],
  why: str,
  tolerance: float = 1e-5,
  way_out: str = '',
) -> Known:
  """Leaves out a key whose value must equal `value()` to `tolerance`."""
  return Known(source, value, why, tolerance, way_out)


def fill(destination: str, value: float, why: str) -> Fill:
  """Fills a leaf, or rows of it, with a constant."""
  return Fill(destination, value, why)


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows of one kind of file, and the prefixes its keys may bear."""

  rows: tuple[Rule | Skip | Known | Fill, ...]
  prefixes: tuple[str, ...] = PREFIXES
