"""A weight file as a model's leaves, and a model's leaves as a weight file.

`match` holds the keys of a file to a table and a model, both ways, before a
value is read; `Pretrained` then reads leaves or blocks of them, with one leaf
at a time on the host. `export` runs the same table backwards. Values pass
unchanged but for the cast to the model's type; a NaN or an infinity is an
error.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.weights.files import (
  Bounds,
  LazyArray,
  WeightFile,
  bounds,
  printable,
)
from vqrae_jax.weights.rules import (
  TRANSFORMS,
  Computed,
  Constant,
  Destination,
  Ignore,
  Rule,
  Shape,
  Table,
  Transform,
)

_LISTED = 4  # names of a kind in an error

# ----------------------------------------------------------------------------
# What a table wants of a file, for one model.


@dataclasses.dataclass(frozen=True)
class Piece:
  """Rows [start, stop) of a leaf (all: axis 0 complete) and their part of a
  key.

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

  @classmethod
  def of(
    cls,
    at: Destination,
    layer: int,
    target: Mapping[str, Any],
    transform: Transform,
    **fields: Any,
  ) -> 'Piece':
    shape = tuple(target[at.leaf].shape)
    if at.stacked:
      rows, shape = (layer, layer + 1), shape[1:]
    elif at.rows is None:
      rows = (0, shape[0] if shape else 1)
    else:
      rows, shape = at.rows, (at.rows[1] - at.rows[0], *shape[1:])
    return cls(at.leaf, *rows, at.stacked, shape, transform, **fields)

  @property
  def index(self) -> int | slice | tuple[()]:
    """Where it lies in its leaf."""
    if self.single:
      return self.start
    return slice(self.start, self.stop) if self.shape else ()


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a table wants of a file, for one model."""

  shapes: dict[str, Shape]  # source key: shape
  pieces: dict[str, tuple[Piece, ...]]  # leaf: pieces in order of rows
  computed: dict[str, Computed]
  unfilled: tuple[str, ...]  # leaves, or rows of them, that no row fills


def _rule_pieces(
  rule: Rule, layer: int, target: Mapping[str, Any]
) -> tuple[list[Piece], Shape]:
  """The pieces that one source array becomes, and its shape."""
  pieces, shape, offset = [], [], 0
  cut = len(rule.destinations) > 1
  for at, transform in zip(rule.destinations, rule.transforms, strict=True):
    piece = Piece.of(
      at, layer, target, transform, key=rule.key(layer), offset=offset, cut=cut
    )
    pieces.append(piece)
    size = list(transform.shape(piece.shape))
    if cut:
      offset += size[transform.axis]
      size[transform.axis] = offset
    shape = size if not shape or cut else shape
  return pieces, tuple(shape)


def _layers(rule: Rule, target: Mapping[str, Any]) -> range:
  if '{i}' not in rule.source:
    return range(1)
  depths = {target[at.leaf].shape[0] for at in rule.destinations}
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
  pieces: list[Piece] = []
  computed = {
    row.source: row for row in table.rows if isinstance(row, Computed)
  }
  for row in table.rows:
    if isinstance(row, Constant) and row.parsed.leaf in target:
      same = TRANSFORMS['same']
      pieces.append(Piece.of(row.parsed, 0, target, same, value=row.value))
    if not isinstance(row, Rule) or any(
      at.leaf not in target for at in row.destinations
    ):
      continue
    for layer in _layers(row, target):
      key = row.key(layer)
      if key in shapes or key in computed:
        raise ValueError(f'two rows of the table want {key}')
      made, shapes[key] = _rule_pieces(row, layer, target)
      pieces += made
  by_leaf: dict[str, list[Piece]] = {leaf: [] for leaf in target}
  for piece in sorted(pieces, key=lambda p: p.start):
    by_leaf[piece.leaf].append(piece)
  unfilled = []
  for leaf, found in by_leaf.items():
    unfilled += _gaps(leaf, found, (*target[leaf].shape, 1)[0])
  ordered = {leaf: tuple(found) for leaf, found in by_leaf.items()}
  return Expected(shapes, ordered, computed, tuple(unfilled))


def _gaps(leaf: str, pieces: Sequence[Piece], rows: int) -> list[str]:
  """Rows that no piece fills, as names; a row filled twice is a fault."""
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


# ----------------------------------------------------------------------------
# A file held to it.


@dataclasses.dataclass(frozen=True)
class Match:
  """A file that fits: the file's own key for each expected one."""

  expected: Expected
  keys: dict[str, str]
  ignored: dict[str, str]  # the file's key: why


def _claim(
  key: str, expected: Expected, table: Table
) -> tuple[str, str | None, str]:
  """(prefix stripped, expected key or None, reason to ignore or '')."""
  rules = [r for r in table.rows if isinstance(r, Ignore)]
  prefix, rest = '', key
  while True:
    reasons = [r.why for r in rules if re.fullmatch(r.pattern, rest)]
    wanted = rest in expected.shapes or rest in expected.computed
    if len(reasons) + wanted > 1:
      raise ValueError(f'two rows of the table match {rest}')
    if wanted or reasons:
      return prefix, rest if wanted else None, ''.join(reasons)
    strip = next((p for p in table.prefixes if rest.startswith(p)), None)
    if strip is None:
      return '', None, ''
    prefix, rest = prefix + strip, rest[len(strip) :]


def match(
  source: WeightFile, table: Table, target: Mapping[str, Any], hint: str = ''
) -> Match:
  """Holds a file to a table and a model; reads no value.

  Args:
    source: the file.
    table: its rows.
    target: {leaf name: has .shape and .dtype}.
    hint: what to do about a file that does not fit, for the error.

  Raises:
    UserError: one line with what is missing, unknown or of another shape.
  """
  expected = expand(table, target)
  keys: dict[str, str] = {}
  ignored: dict[str, str] = {}
  prefixes: dict[str, str] = {}
  unknown = []
  for key in source:
    prefix, name, why = _claim(key, expected, table)
    if why:
      ignored[key] = why
    elif name is None:
      unknown.append(key)
    elif name in keys:
      raise UserError(
        f'{source.name} holds both {printable(keys[name])} and '
        f'{printable(key)}, which are one leaf; save one of them'
      )
    else:
      keys[name] = key
      prefixes.setdefault(prefix, key)
  if len(prefixes) > 1:
    mixed = ' beside '.join(map(printable, list(prefixes.values())[:2]))
    raise UserError(
      f'{source.name} mixes prefixes: {mixed}; save the weights of one model'
    )
  missing = [''.join(prefixes) + k for k in expected.shapes if k not in keys]
  kinds = {p.key: target[p.leaf] for ps in expected.pieces.values() for p in ps}
  other = []
  for name, key in keys.items():
    have, want = source[key], expected.shapes.get(name, source[key].shape)
    if have.shape != want:
      other.append(f'{printable(key)} is {have.shape}, the model wants {want}')
    elif name in kinds and _is_integer(have) and not _is_integer(kinds[name]):
      other.append(
        f'{printable(key)} is {have.dtype}, the model wants {kinds[name].dtype}'
      )
  parts = [
    what + _names(names)
    for what, names in (
      ('missing in it: ', missing),
      ("no row fills the model's ", expected.unfilled),
      ('unknown to the model: ', unknown),
    )
    if names
  ]
  parts += other[:_LISTED]
  parts += [f'and {len(other) - _LISTED} more'] if len(other) > _LISTED else []
  if parts:
    parts += [hint] if hint else []
    raise UserError(f'{source.name} does not fit: {"; ".join(parts)}')
  return Match(expected, keys, ignored)


def _is_integer(leaf: Any) -> bool:
  return np.dtype(leaf.dtype).kind in 'biu'


def _names(names: Sequence[str]) -> str:
  more = len(names) - _LISTED
  tail = f' and {more} more' if more > 0 else ''
  return ', '.join(map(printable, names[:_LISTED])) + tail


# ----------------------------------------------------------------------------
# Its values.


class Pretrained:
  """A source that fits a model; `read` gives any block of any leaf.

  Attributes:
    target: {leaf name: ShapeDtypeStruct}.
    ignored: {the file's key: why it is not used}.
  """

  def __init__(
    self, source: WeightFile, table: Table, target: Any, hint: str = ''
  ):
    """Matches; reads the few arrays that must equal computed ones.

    Args:
      source: an opened file (`open_weights`).
      table: the rules for its kind.
      target: a tree of ShapeDtypeStructs (or arrays): all leaves to fill.
      hint: what to do about a file that does not fit, for the error.

    Raises:
      UserError: the file does not fit the model; one line shows both sides.
    """
    self.source = source
    self.target = trees.flatten(target)
    found = match(source, table, self.target, hint)
    self.ignored = dict(found.ignored)
    self._table = table
    self._pieces, self._keys = found.expected.pieces, found.keys
    for name, row in found.expected.computed.items():
      if name in found.keys:
        self._compare(found.keys[name], row, f'; {hint}' if hint else '')
        self.ignored[found.keys[name]] = row.why

  def _compare(self, key: str, row: Computed, hint: str) -> None:
    want, handle = row.value(), self.source[key]
    where = f'{self.source.name}: {printable(key)}'
    if handle.shape != want.shape:
      raise UserError(
        f'{where} is {handle.shape}, the model computes {want.shape} '
        f'({row.why}){hint}'
      )
    have = _finite(handle.read().astype(np.float32), where)
    off = float(np.max(np.abs(have - want), initial=0))
    if off > row.tolerance:
      raise UserError(
        f'{where} differs by up to {off:.3g} from what the model computes '
        f'({row.why}){f"; {row.hint}" if row.hint else ""}'
      )

  def read(self, leaf: str, index: Sequence[slice] | None = None) -> np.ndarray:
    """The block `index` of a leaf (all of it: None), in the model's type.

    Only the layers that the block touches are read, one after another.

    Raises:
      UserError: the file is damaged, or a value is NaN or infinite.
    """
    target = self.target[leaf]
    block = bounds(index, target.shape)
    dtype = np.dtype(target.dtype)
    pieces = self._pieces[leaf]
    if not block:
      return self._part(pieces[0], (), dtype)
    out = np.empty([stop - start for start, stop in block], dtype)
    (first, last), *rest = block
    others = tuple(slice(*pair) for pair in rest)
    for piece in pieces:
      low, high = max(first, piece.start), min(last, piece.stop)
      if low >= high:
        continue
      rows = (slice(low - piece.start, high - piece.start),)
      part = self._part(piece, others if piece.single else rows + others, dtype)
      out[low - first : high - first] = part
    return out

  def _part(
    self, piece: Piece, block: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    """A block of a piece, in the piece's own coordinates."""
    if not piece.key:
      return np.full([b.stop - b.start for b in block], piece.value, dtype)
    transform, ours = piece.transform, piece.shape
    inner = tuple(slice(0, n) for n in transform.shape(ours))
    if transform.index is not None:
      inner = transform.index(block)
      ours = tuple(b.stop - b.start for b in block)
    if piece.cut:
      axis, shift = transform.axis, piece.offset
      moved = slice(inner[axis].start + shift, inner[axis].stop + shift)
      inner = (*inner[:axis], moved, *inner[axis + 1 :])
    key = self._keys[piece.key]
    values = self.source[key].read(inner)
    with np.errstate(over='ignore', invalid='ignore'):
      values = np.asarray(values.astype(dtype))
    _finite(values, f'{self.source.name}: {printable(key)}')
    values = transform.forward(values, ours)
    return values if transform.index is not None else values[block]

  def load(self) -> dict[str, Any]:
    """{leaf name: array}: all leaves, or none if the file is damaged.

    A leaf whose target has a sharding becomes a `jax.Array` laid out so, any
    other a NumPy array. One leaf at a time is on the host, or its blocks for
    this process's devices.
    """
    found = {}
    for name, leaf in self.target.items():
      sharding = getattr(leaf, 'sharding', None)
      if sharding is None:
        found[name] = self.read(name)
        continue
      # A compressed or checksummed member is read for each of its blocks: all
      # at once where all are wanted.
      if sharding.is_fully_addressable:
        read = self.read(name).__getitem__
      else:
        read = _once_each(self.lazy()[name])
      found[name] = jax.block_until_ready(
        jax.make_array_from_callback(tuple(leaf.shape), sharding, read)
      )
    return found

  def load_on_device(self) -> dict[str, jax.Array]:
    """{leaf name: array} on the default device, uncommitted.

    One leaf at a time is on the host.
    """
    return {
      name: jax.block_until_ready(jnp.asarray(self.read(name)))
      for name in self.target
    }

  def lazy(self) -> dict[str, LazyArray]:
    """{leaf name: what reads it}: a block at a time, nothing kept."""

    def fetch(name: str, block: Bounds) -> np.ndarray:
      return self.read(name, [slice(*pair) for pair in block])

    return {
      name: LazyArray(
        tuple(leaf.shape),
        np.dtype(leaf.dtype),
        functools.partial(fetch, name),
      )
      for name, leaf in self.target.items()
    }

  def backwards(self) -> Iterator[tuple[LazyArray, np.ndarray]]:
    """(an array of the file, the same made out of our leaves), of each key."""

    def read(piece: Piece) -> np.ndarray:
      rows = [slice(piece.start, piece.stop)] if piece.index != () else None
      block = self.read(piece.leaf, rows)
      return np.asarray(block[0]) if piece.single else block

    for key, pieces in _by_key(self._pieces).items():
      yield self.source[self._keys[key]], _gather(pieces, read)


def _once_each(handle: LazyArray) -> Any:
  """Reads a block once for all devices that hold a replica of it."""
  blocks: dict[Bounds, np.ndarray] = {}

  def read(index: tuple[slice, ...]) -> np.ndarray:
    block = bounds(index, handle.shape)
    if block not in blocks:
      blocks[block] = handle.read(index)
    return blocks[block]

  return read


def _finite(values: np.ndarray, where: str) -> np.ndarray:
  if values.dtype.kind in 'biu' or np.isfinite(values).all():
    return values
  count = int(values.size - np.isfinite(values).sum())
  raise UserError(
    f'{where} holds {count} values that are NaN, infinite or too large for '
    f'{values.dtype}; take an earlier checkpoint'
  )


# ----------------------------------------------------------------------------
# The way back.


def export(table: Table, leaves: Any) -> dict[str, np.ndarray]:
  """{source key: array}: a table backwards, bitwise.

  Args:
    table: the rules of the kind of file to write.
    leaves: a tree, or {leaf name: array}, of all that the model has.

  Returns:
    What the file would hold, `computed` arrays included. Views of `leaves`
    where the layout allows: copy before changing them.

  Raises:
    UserError: the table has no key for a leaf, or a `constant` of the table
      has been trained away.
  """
  flat = {n: np.asarray(v) for n, v in trees.flatten(leaves).items()}
  expected = expand(table, flat)
  if expected.unfilled:
    raise UserError(
      f'this format of weights has no place for {_names(expected.unfilled)}; '
      'save the model as a tokenizer directory instead'
    )
  for piece in (p for pieces in expected.pieces.values() for p in pieces):
    if not piece.key and (flat[piece.leaf][piece.index] != piece.value).any():
      whys = {r.why for r in table.rows if isinstance(r, Constant)}
      raise UserError(
        f'this format of weights keeps {piece.leaf}[{piece.start}:{piece.stop}]'
        f' at {piece.value} ({"; ".join(whys)}), and training has moved it; '
        'freeze it to write this format'
      )
  out = {
    key: _gather(pieces, lambda p: np.asarray(flat[p.leaf][p.index]))
    for key, pieces in _by_key(expected.pieces).items()
  }
  return out | {key: row.value() for key, row in expected.computed.items()}


def _by_key(pieces: Mapping[str, Sequence[Piece]]) -> dict[str, list[Piece]]:
  found: dict[str, list[Piece]] = {}
  for piece in (p for of_leaf in pieces.values() for p in of_leaf):
    if piece.key:
      found.setdefault(piece.key, []).append(piece)
  return found


def _gather(
  pieces: Sequence[Piece], read: Callable[[Piece], np.ndarray]
) -> np.ndarray:
  """One source array out of the pieces that it becomes."""
  pieces = sorted(pieces, key=lambda p: p.offset)
  parts = [p.transform.backward(read(p)) for p in pieces]
  axis = pieces[0].transform.axis
  array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
  return np.ascontiguousarray(array).reshape(array.shape)
