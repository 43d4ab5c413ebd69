"""A table against a model and a file: the plan, whole or not at all.

`expand` writes out what the table expects for the model's leaves: every key,
its shape, and the blocks it becomes. `match` compares that with the keys a
file has, and raises one line that shows both sides. Neither reads a value.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vqrae_jax.errors import UserError
from vqrae_jax.weights.handles import Source, shown
from vqrae_jax.weights.rules import Fill, Known, Place, Rule, Skip, Table
from vqrae_jax.weights.transforms import Shape, Transform

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Piece:
  """Rows [start, stop) of a leaf (all: axis 0 whole) and their part of a key.

  `single` is a row of a stacked leaf, whose own shape lacks axis 0. The part
  is [offset, offset + its size) along the transform's axis of the key's
  array. A piece without a key is a constant.
  """

  leaf: str
  start: int
  stop: int
  single: bool
  shape: Shape
  transform: Transform
  key: str = ''
  offset: int = 0
  cut: bool = False
  value: float = 0.0


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a table wants of a file, for one model."""

  shapes: dict[str, Shape]  # source key: shape
  pieces: dict[str, tuple[Piece, ...]]  # leaf: pieces in order of rows
  known: dict[str, Known]
  unfilled: tuple[str, ...]  # leaves, or rows of them, that no row fills


def _block(at: Place, layer: int, shape: Shape) -> tuple[int, int, Shape]:
  """(first row, last row + 1, shape) of a place in a leaf of `shape`."""
  if at.stacked:
    return layer, layer + 1, shape[1:]
  if at.rows is None:
    return 0, shape[0] if shape else 1, shape
  start, stop = at.rows
  return start, stop, (stop - start, *shape[1:])


def _rule_pieces(
  rule: Rule, layer: int, target: Mapping[str, Any]
) -> tuple[list[Piece], Shape]:
  """The pieces that one source array becomes, and its shape."""
  parts = []
  for at, transform in zip(rule.places, rule.transforms, strict=True):
    start, stop, shape = _block(at, layer, tuple(target[at.leaf].shape))
    parts.append((at, start, stop, shape, transform))
  axis = parts[0][-1].axis
  sizes = [transform.shape(shape) for *_, shape, transform in parts]
  whole, offset, pieces = list(sizes[0]), 0, []
  for (at, start, stop, shape, transform), size in zip(
    parts, sizes, strict=True
  ):
    pieces.append(
      Piece(
        at.leaf,
        start,
        stop,
        at.stacked,
        shape,
        transform,
        rule.key(layer),
        offset,
        len(parts) > 1,
      )
    )
    if len(parts) > 1:
      offset += size[axis]
  if len(parts) > 1:
    whole[axis] = offset
  return pieces, tuple(whole)


def _layers(rule: Rule, target: Mapping[str, Any]) -> range:
  if '{i}' not in rule.source:
    return range(1)
  depths = {target[at.leaf].shape[0] for at in rule.places}
  if len(depths) > 1:
    raise ValueError(f'{rule} fills leaves of {depths} layers')
  return range(depths.pop())


def expand(table: Table, target: Mapping[str, Any]) -> Expected:
  """All that `table` wants for the leaves {name: has .shape}.

  A rule for a leaf that the model lacks wants nothing; its keys, if the file
  has them, are unknown to the model.

  Raises:
    ValueError: the table is at fault: two rows want one key or fill one row.
  """
  shapes: dict[str, Shape] = {}
  pieces: dict[str, list[Piece]] = {leaf: [] for leaf in target}
  known = {row.source: row for row in table.rows if isinstance(row, Known)}
  for row in table.rows:
    if isinstance(row, Fill):
      at = row.place
      if at.leaf in target:
        start, stop, shape = _block(at, 0, tuple(target[at.leaf].shape))
        same = Rule('', at.leaf).transforms[0]
        pieces[at.leaf].append(
          Piece(at.leaf, start, stop, False, shape, same, value=row.value)
        )
    if not isinstance(row, Rule):
      continue
    if any(at.leaf not in target for at in row.places):
      continue
    for layer in _layers(row, target):
      key = row.key(layer)
      if key in shapes or key in known:
        raise ValueError(f'two rows of the table want {key}')
      made, shapes[key] = _rule_pieces(row, layer, target)
      for piece in made:
        pieces[piece.leaf].append(piece)
  ordered = {
    leaf: tuple(sorted(found, key=lambda p: p.start))
    for leaf, found in pieces.items()
  }
  unfilled = []
  for leaf, found in ordered.items():
    shape = target[leaf].shape
    unfilled += _gaps(leaf, found, shape[0] if shape else 1)
  return Expected(shapes, ordered, known, tuple(unfilled))


def _gaps(leaf: str, pieces: Sequence[Piece], rows: int) -> list[str]:
  """Rows that no piece fills, as words; a row filled twice is a fault."""
  at, gaps = 0, []
  for piece in pieces:
    if piece.start < at or piece.stop > rows:
      raise ValueError(
        f'the table fills {leaf}[{piece.start}:{piece.stop}] twice, or past '
        f'its {rows} rows'
      )
    if piece.start > at:
      gaps.append(f'{leaf}[{at}:{piece.start}]')
    at = piece.stop
  if at < rows:
    gaps.append(f'{leaf}[{at}:{rows}]' if at else leaf)
  return gaps


@dataclasses.dataclass(frozen=True)
class Match:
  """A file that fits: the file's own key for each expected one."""

  expected: Expected
  keys: dict[str, str]
  skipped: dict[str, str]  # the file's key: why


def _names(words: Sequence[str]) -> str:
  words = [shown(w) for w in words]
  more = len(words) - _SHOWN
  tail = f' and {more} more' if more > 0 else ''
  return ', '.join(words[:_SHOWN]) + tail


def _claim(
  key: str, expected: Expected, table: Table
) -> tuple[str, str | None, str]:
  """(prefix stripped, expected key or None, reason to skip or '')."""
  skips = [r for r in table.rows if isinstance(r, Skip)]
  prefix, rest = '', key
  while True:
    reasons = [s.why for s in skips if re.fullmatch(s.pattern, rest)]
    wanted = rest in expected.shapes or rest in expected.known
    if len(reasons) + wanted > 1:
      raise ValueError(f'two rows of the table match {rest}')
    if wanted:
      return prefix, rest, ''
    if reasons:
      return prefix, None, reasons[0]
    strip = next((p for p in table.prefixes if rest.startswith(p)), None)
    if strip is None:
      return '', None, ''
    prefix, rest = prefix + strip, rest[len(strip) :]


def match(
  source: Source, table: Table, target: Mapping[str, Any], way_out: str = ''
) -> Match:
  """Holds a file to a table and a model; reads no value.

  Args:
    source: the file.
    table: its rows.
    target: {leaf name: has .shape and .dtype}.
    way_out: what to do about a file that does not fit, for the error.

  Raises:
    UserError: one line with what is missing, unknown or of another shape.
  """
  expected = expand(table, target)
  keys: dict[str, str] = {}
  skipped: dict[str, str] = {}
  prefixes: dict[str, str] = {}
  unknown = []
  for key in source:
    prefix, name, why = _claim(key, expected, table)
    if why:
      skipped[key] = why
    elif name is None:
      unknown.append(key)
    elif name in keys:
      raise UserError(
        f'{source.name} holds both {shown(keys[name])} and {shown(key)}, '
        'which are one leaf; save one of them'
      )
    else:
      keys[name] = key
      prefixes.setdefault(prefix, key)
  if len(prefixes) > 1:
    one, other = list(prefixes.values())[:2]
    raise UserError(
      f'{source.name} mixes prefixes: {shown(one)} beside {shown(other)}; '
      'save the weights of one model'
    )
  (prefix,) = prefixes or ('',)
  missing = [prefix + k for k in expected.shapes if k not in keys]
  _report(source, expected, keys, target, missing, unknown, way_out)
  return Match(expected, keys, skipped)


def _report(
  source: Source,
  expected: Expected,
  keys: Mapping[str, str],
  target: Mapping[str, Any],
  missing: list[str],
  unknown: list[str],
  way_out: str,
) -> None:
  leaves = {
    p.key: target[p.leaf] for ps in expected.pieces.values() for p in ps
  }
  shapes = []
  for name, want in expected.shapes.items():
    if name not in keys:
      continue
    have = source[keys[name]]
    if have.shape != want:
      shapes.append(
        f'{shown(keys[name])} is {have.shape}, the model wants {want}'
      )
    elif have.dtype.kind in 'biu' and leaves[name].dtype.kind not in 'biu':
      shapes.append(
        f'{shown(keys[name])} is {have.dtype}, the model wants '
        f'{leaves[name].dtype}'
      )
  parts = []
  if missing:
    parts.append(f'missing in it: {_names(missing)}')
  if expected.unfilled:
    parts.append(f"no row fills the model's {_names(expected.unfilled)}")
  if unknown:
    parts.append(f'unknown to the model: {_names(unknown)}')
  if shapes:
    more = len(shapes) - _SHOWN
    shapes = shapes[:_SHOWN] + ([f'and {more} more'] if more > 0 else [])
    parts.append('; '.join(shapes))
  if parts:
    parts += [way_out] if way_out else []
    raise UserError(f'{source.name} does not fit: {"; ".join(parts)}')
