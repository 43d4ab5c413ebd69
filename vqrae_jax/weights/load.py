"""A weight file as a model's leaves, and a model's leaves as a weight file.

`Pretrained` matches the keys and shapes of a file with a table and a model,
both ways, before any leaf is read; it then reads leaves one at a time. `export`
applies the same table in reverse. Values are unchanged except for the cast to
the model's dtype; a NaN or an infinity is an error.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.weights.files import LazyArray, WeightFile, printable
from vqrae_jax.weights.rules import (
  Computed,
  Ignore,
  Rule,
  Shape,
  Table,
  Transform,
)

_LISTED = 4  # names of each kind that an error lists
TOLERANCE = 1e-5  # absolute, of arrays that are computed here

# ----------------------------------------------------------------------------
# What a table expects of a file, for one model.


@dataclasses.dataclass(frozen=True)
class Piece:
  """A leaf, or one layer of a stacked leaf, and its part of a source array.

  Attributes:
    leaf: the leaf's name.
    index: the layer's number; () for an unstacked leaf.
    shape: of the leaf or the layer.
    transform: from the part of the source array.
    key: the source array's.
    offset: where the part begins along `transform.axis`.
  """

  leaf: str
  index: int | tuple[()]
  shape: Shape
  transform: Transform
  key: str
  offset: int


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a table expects of a file, for one model."""

  shapes: dict[str, Shape]  # source key: shape
  pieces: dict[str, list[Piece]]  # leaf: pieces in order of layers
  computed: dict[str, Computed]
  unfilled: list[str]  # leaves that no row fills


def _pieces(
  rule: Rule, key: str, index: int | tuple[()], target: Mapping[str, Any]
) -> tuple[list[Piece], Shape]:
  """The pieces that one source array becomes, and its shape."""
  pieces, shape, offset = [], [], 0
  for leaf, transform in zip(rule.leaves, rule.transforms, strict=True):
    ours = tuple(target[leaf].shape)[0 if index == () else 1 :]
    pieces.append(Piece(leaf, index, ours, transform, key, offset))
    shape = list(transform.shape(ours))
    if len(rule.leaves) > 1:
      offset += shape[transform.axis]
      shape[transform.axis] = offset
  return pieces, tuple(shape)


def expand(table: Table, target: Mapping[str, Any]) -> Expected:
  """What `table` expects of a file for `target`, {leaf name: has .shape}.

  A rule with a leaf that the model lacks is skipped; if the file has its keys,
  they are unknown to the model.

  Raises:
    ValueError: a fault of the table: two rows have one key or fill one leaf.
  """
  computed = {r.source: r for r in table.rows if isinstance(r, Computed)}
  shapes = {key: row.value().shape for key, row in computed.items()}
  pieces: dict[str, list[Piece]] = {leaf: [] for leaf in target}
  for rule in table.rows:
    if not isinstance(rule, Rule) or not pieces.keys() >= {*rule.leaves}:
      continue
    layers: Sequence[int | tuple[()]] = [()]
    if '{i}' in rule.source:
      layers = range(target[rule.leaves[0]].shape[0])
    for index in layers:
      key = rule.source.replace('{i}', str(index))
      if key in shapes:
        raise ValueError(f'two rows of the table want {key}')
      made, shapes[key] = _pieces(rule, key, index, target)
      for piece in made:
        if any(p.index == index for p in pieces[piece.leaf]):
          raise ValueError(f'two rows of the table fill {piece.leaf}')
        pieces[piece.leaf].append(piece)
  unfilled = [leaf for leaf, found in pieces.items() if not found]
  return Expected(shapes, pieces, computed, unfilled)


def _claim(
  key: str, wanted: Container[str], table: Table
) -> tuple[str, str | None, str]:
  """(stripped prefix, expected key or None, reason to ignore it or '')."""
  rules = [r for r in table.rows if isinstance(r, Ignore)]
  prefix, rest = '', key
  while True:
    reasons = [r.why for r in rules if re.fullmatch(r.pattern, rest)]
    if len(reasons) + (rest in wanted) > 1:
      raise ValueError(f'two rows of the table match {rest}')
    if reasons or rest in wanted:
      return prefix, rest, ''.join(reasons)
    strip = next((p for p in table.prefixes if rest.startswith(p)), None)
    if strip is None:
      return '', None, ''
    prefix, rest = prefix + strip, rest[len(strip) :]


def _match(
  source: WeightFile, table: Table, target: Mapping[str, Any], hint: str
) -> tuple[Expected, dict[str, str], dict[str, str]]:
  """(what is expected, {key: the file's key}, {the file's key: why ignored}).

  Raises:
    UserError: lists what is missing, unknown or of another shape.
  """
  expected = expand(table, target)
  keys: dict[str, str] = {}
  ignored: dict[str, str] = {}
  prefixes: dict[str, str] = {}
  unknown = []
  for key in source:
    prefix, name, why = _claim(key, expected.shapes, table)
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
  absent = expected.shapes.keys() - keys.keys() - expected.computed.keys()
  missing = [''.join(prefixes) + k for k in expected.shapes if k in absent]
  types = {p.key: target[p.leaf].dtype for p in _flat(expected)}
  other = []
  for name, key in keys.items():
    have, want = source[key], expected.shapes[name]
    dtype = types.get(name, have.dtype)
    if have.shape != want:
      other.append(f'{printable(key)} is {have.shape}, the model wants {want}')
    elif _is_integer(have.dtype) and not _is_integer(dtype):
      other.append(f'{printable(key)} is {have.dtype}, the model wants {dtype}')
  faults = [
    what + _names(names, width)
    for what, names, width in (
      ('missing in it: ', missing, 90),
      ("nothing in it fills the model's ", expected.unfilled, 90),
      ('unknown to the model: ', unknown, 90),
      ('', other, 250),
    )
    if names
  ]
  if faults:
    faults += [hint] if hint else []
    raise UserError(f'{source.name} does not fit: {"; ".join(faults)}')
  return expected, keys, ignored


def _flat(expected: Expected) -> list[Piece]:
  return [p for pieces in expected.pieces.values() for p in pieces]


def deviation(found: np.ndarray, want: np.ndarray, dtype: Any) -> float:
  """The largest distance of a file's values from those computed here, 0 if all
  are within `TOLERANCE` before they were rounded to the file's dtype."""
  if _is_integer(dtype):
    dtype = np.float32
  with np.errstate(over='ignore'):
    low, high = (
      (want + off).astype(dtype).astype(np.float32)
      for off in (-TOLERANCE, TOLERANCE)
    )
  off = np.where((low <= found) & (found <= high), 0, np.abs(found - want))
  return float(np.max(off, initial=0))


def _is_integer(dtype: Any) -> bool:
  return np.dtype(dtype).kind in 'biu'


def _names(names: Sequence[str], width: int = 90) -> str:
  more = len(names) - _LISTED
  tail = f' and {more} more' if more > 0 else ''
  return ', '.join(printable(n, width) for n in names[:_LISTED]) + tail


# ----------------------------------------------------------------------------
# A file's values.


class Pretrained:
  """A source that fits a model; `read` returns any leaf.

  Attributes:
    target: {leaf name: ShapeDtypeStruct}.
    ignored: {the file's key: why it is not used}.
  """

  def __init__(
    self, source: WeightFile, table: Table, target: Any, hint: str = ''
  ):
    """Matches keys and shapes; reads only arrays that are also computed here.

    Args:
      source: an opened file (`open_weights`).
      table: the rows for its kind.
      target: a tree of ShapeDtypeStructs (or arrays): all leaves to fill.
      hint: what to do about a file that does not fit, for the error.

    Raises:
      UserError: the file does not fit the model, with both sides of each
        difference, or an array differs from the computed one by over 1e-5.
    """
    self.source = source
    self.target = trees.flatten(target)
    self._expected, self._keys, self.ignored = _match(
      source, table, self.target, hint
    )
    for name, row in self._expected.computed.items():
      if key := self._keys.get(name):
        have = self._read(key, np.dtype('float32'))
        off = deviation(have, row.value(), source[key].dtype)
        if off:
          raise UserError(
            f'{source.name}: {printable(key)} differs by up to {off:.3g} from '
            f'what the model computes ({row.why})'
            f'{f"; {row.hint}" if row.hint else ""}'
          )
        self.ignored[key] = row.why

  def _read(self, key: str, dtype: Any) -> np.ndarray:
    """An array of the file, cast to `dtype`, in which it must be finite."""
    with np.errstate(over='ignore', invalid='ignore'):
      values = self.source[key].read().astype(dtype)
    if not _is_integer(dtype) and not np.isfinite(values).all():
      count = int(values.size - np.isfinite(values).sum())
      raise UserError(
        f'{self.source.name}: {printable(key)} holds {count} values that are '
        f'NaN, infinite or too large for {values.dtype}; take an earlier '
        'checkpoint'
      )
    return values

  def _part(self, piece: Piece) -> np.ndarray:
    key, axis = self._keys[piece.key], piece.transform.axis
    values = self._read(key, self.target[piece.leaf].dtype)
    part = piece.transform.shape(piece.shape)
    if values.shape != part:
      stop = piece.offset + part[axis]
      values = values[(slice(None),) * axis + (slice(piece.offset, stop),)]
    return piece.transform.forward(values, piece.shape)

  def read(self, leaf: str) -> np.ndarray:
    """A leaf in the model's dtype, read layer by layer.

    Raises:
      UserError: the file is damaged, or a value is NaN or infinite.
    """
    out = np.empty(self.target[leaf].shape, self.target[leaf].dtype)
    for piece in self._expected.pieces[leaf]:
      out[piece.index] = self._part(piece)
    return out

  def load(self) -> dict[str, Any]:
    """{leaf name: array}: all leaves, or none if the file is damaged.

    A leaf whose target has a sharding becomes a `jax.Array` with it, any other
    a NumPy array. Of the sharded ones only one at a time is on the host.

    Raises:
      UserError: as `read`.
    """
    found = {}
    for name, leaf in self.target.items():
      found[name] = values = self.read(name)
      if (sharding := getattr(leaf, 'sharding', None)) is not None:
        found[name] = jax.block_until_ready(
          jax.make_array_from_callback(
            values.shape, sharding, values.__getitem__
          )
        )
    return found

  def lazy(self) -> dict[str, LazyArray]:
    """{leaf name: lazy array}, which reads the file at every access."""
    return {
      name: LazyArray(
        tuple(leaf.shape),
        np.dtype(leaf.dtype),
        functools.partial(self.read, name),
      )
      for name, leaf in self.target.items()
    }

  def backwards(self) -> Iterator[tuple[LazyArray, np.ndarray]]:
    """For each key (the file's array, the same array rebuilt from leaves)."""
    for key, array in _gather(self._expected, self._part):
      yield self.source[self._keys[key]], array


# ----------------------------------------------------------------------------
# From leaves to a file.


def export(table: Table, leaves: Any) -> dict[str, np.ndarray]:
  """{source key: array}: a table in reverse, bitwise.

  Args:
    table: the rows of the kind of file to write.
    leaves: all leaves of the model, as a tree or {leaf name: array}.

  Returns:
    All arrays of the file, `computed` ones included. They are views of `leaves`
    where the layout allows it: copy before changing them.

  Raises:
    UserError: the table has no key for a leaf.
    ValueError: a fault of the table, as in `expand`.
  """
  flat = {n: np.asarray(v) for n, v in trees.flatten(leaves).items()}
  expected = expand(table, flat)
  if expected.unfilled:
    raise UserError(
      f'this format of weights has no place for {_names(expected.unfilled)}; '
      'save the model as a tokenizer directory instead'
    )
  out = dict(_gather(expected, lambda p: np.asarray(flat[p.leaf][p.index])))
  return out | {key: row.value() for key, row in expected.computed.items()}


def _gather(
  expected: Expected, read: Callable[[Piece], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
  """(source key, its array, joined from its pieces) of each key."""
  by_key: dict[str, list[Piece]] = {}
  for piece in _flat(expected):
    by_key.setdefault(piece.key, []).append(piece)
  for key, pieces in by_key.items():
    pieces = sorted(pieces, key=lambda p: p.offset)
    parts = [p.transform.backward(read(p)) for p in pieces]
    axis = pieces[0].transform.axis
    array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
    yield key, np.ascontiguousarray(array).reshape(array.shape)
