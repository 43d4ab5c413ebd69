"""A weight file as a model's leaves, and a model's leaves as a weight file.

`Pretrained` first holds the whole file to the whole model, then reads: a
leaf, or a block of one, piece by piece, so that a stacked leaf of a large
encoder is never on the host twice. `export` runs the same table backwards.
Values pass unchanged but for the cast to the model's type; a NaN or an
infinity is an error.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.weights import files
from vqrae_jax.weights.files import WeightFile, printable
from vqrae_jax.weights.rules import (
  Computed,
  Constant,
  Destination,
  Ignore,
  Rule,
  Shape,
  Table,
  Transform,
)

# ----------------------------------------------------------------------------
# A table against a model and a file: the plan, whole or not at all.
#
# `expand` writes out what the table expects for the model's leaves: every key,
# its shape, and the blocks it becomes. `match` compares that with the keys a
# file has, and raises one line that shows both sides. Neither reads a value.

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
  computed: dict[str, Computed]
  unfilled: tuple[str, ...]  # leaves, or rows of them, that no row fills


def _block(at: Destination, layer: int, shape: Shape) -> tuple[int, int, Shape]:
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
  for at, transform in zip(rule.destinations, rule.transforms, strict=True):
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
  pieces: dict[str, list[Piece]] = {leaf: [] for leaf in target}
  computed = {
    row.source: row for row in table.rows if isinstance(row, Computed)
  }
  for row in table.rows:
    if isinstance(row, Constant):
      at = row.parsed
      if at.leaf in target:
        start, stop, shape = _block(at, 0, tuple(target[at.leaf].shape))
        same = Rule('', at.leaf).transforms[0]
        pieces[at.leaf].append(
          Piece(at.leaf, start, stop, False, shape, same, value=row.value)
        )
    if not isinstance(row, Rule):
      continue
    if any(at.leaf not in target for at in row.destinations):
      continue
    for layer in _layers(row, target):
      key = row.key(layer)
      if key in shapes or key in computed:
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
  return Expected(shapes, ordered, computed, tuple(unfilled))


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
  ignored: dict[str, str]  # the file's key: why


def _names(words: Sequence[str]) -> str:
  words = [printable(w) for w in words]
  more = len(words) - _SHOWN
  tail = f' and {more} more' if more > 0 else ''
  return ', '.join(words[:_SHOWN]) + tail


def _claim(
  key: str, expected: Expected, table: Table
) -> tuple[str, str | None, str]:
  """(prefix stripped, expected key or None, reason to skip or '')."""
  skips = [r for r in table.rows if isinstance(r, Ignore)]
  prefix, rest = '', key
  while True:
    reasons = [s.why for s in skips if re.fullmatch(s.pattern, rest)]
    wanted = rest in expected.shapes or rest in expected.computed
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
        f'{source.name} holds both {printable(keys[name])} and {printable(key)}, '
        'which are one leaf; save one of them'
      )
    else:
      keys[name] = key
      prefixes.setdefault(prefix, key)
  if len(prefixes) > 1:
    one, other = list(prefixes.values())[:2]
    raise UserError(
      f'{source.name} mixes prefixes: {printable(one)} beside {printable(other)}; '
      'save the weights of one model'
    )
  (prefix,) = prefixes or ('',)
  missing = [prefix + k for k in expected.shapes if k not in keys]
  _report(source, expected, keys, target, missing, unknown, hint)
  return Match(expected, keys, ignored)


def _report(
  source: WeightFile,
  expected: Expected,
  keys: Mapping[str, str],
  target: Mapping[str, Any],
  missing: list[str],
  unknown: list[str],
  hint: str,
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
        f'{printable(keys[name])} is {have.shape}, the model wants {want}'
      )
    elif have.dtype.kind in 'biu' and leaves[name].dtype.kind not in 'biu':
      shapes.append(
        f'{printable(keys[name])} is {have.dtype}, the model wants '
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
    parts += [hint] if hint else []
    raise UserError(f'{source.name} does not fit: {"; ".join(parts)}')


# A block of more than 4 chunks goes to its device a chunk of rows (or one row)
# after another: reading and copying hold about three times what is on the way.
CHUNK = 1 << 25


@dataclasses.dataclass(frozen=True, eq=False)
class LazyLeaf:
  """A leaf that reads its file when it is sliced, or made an array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Sequence[slice] | None], np.ndarray]

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    return self.read(index)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    del copy  # it is always fresh
    return self.read(None).astype(dtype or self.dtype, copy=False)


class Pretrained:
  """A source that fits a model; `read` gives any block of any leaf.

  Attributes:
    target: {leaf name: ShapeDtypeStruct}.
    ignored: {the file's key: why it is not used}.
  """

  def __init__(
    self,
    source: files.WeightFile,
    table: Table,
    target: Any,
    hint: str = '',
  ):
    """Matches; reads the few arrays that must equal computed ones.

    Args:
      source: an opened file (`readers.open_weights`).
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
    self._hint = f'; {hint}' if hint else ''
    self._pieces, self._keys = found.expected.pieces, found.keys
    for name, row in found.expected.computed.items():
      if name in found.keys:
        self._compare(found.keys[name], row)
        self.ignored[found.keys[name]] = row.why

  def _compare(self, key: str, row: Computed) -> None:
    want = row.value()
    handle = self.source[key]
    where = f'{self.source.name}: {files.printable(key)}'
    if handle.shape != want.shape:
      raise UserError(
        f'{where} is {handle.shape}, the model computes {want.shape} '
        f'({row.why}){self._hint}'
      )
    have = _finite(handle.read().astype(np.float32), where)
    off = float(np.max(np.abs(have - want), initial=0))
    if off > row.tolerance:
      hint = f'; {row.hint}' if row.hint else ''
      raise UserError(
        f'{where} differs by up to {off:.3g} from what the model computes '
        f'({row.why}){hint}'
      )

  def read(self, leaf: str, index: Sequence[slice] | None = None) -> np.ndarray:
    """The block `index` of a leaf (all of it: None), in the model's type.

    Only the layers that the block touches are read, one after another.

    Raises:
      UserError: the file is damaged, or a value is NaN or infinite.
    """
    target = self.target[leaf]
    block = files.bounds(index, target.shape)
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
      if piece.single:
        out[low - first] = part
      else:
        out[low - first : high - first] = part
    return out

  def _part(
    self, piece: Piece, block: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    """A block of a piece, in the piece's own coordinates."""
    if not piece.key:
      shape = [b.stop - b.start for b in block]
      return np.full(shape, piece.value, dtype)
    key = self._keys[piece.key]
    transform = piece.transform
    size = transform.shape(piece.shape)
    if transform.index is None:
      inner = tuple(slice(0, n) for n in size)
    else:
      inner = transform.index(block)
    if piece.cut:
      axis, shift = transform.axis, piece.offset
      moved = slice(inner[axis].start + shift, inner[axis].stop + shift)
      inner = (*inner[:axis], moved, *inner[axis + 1 :])
    values = self.source[key].read(inner)
    where = f'{self.source.name}: {files.printable(key)}'
    with np.errstate(over='ignore', invalid='ignore'):
      values = _finite(np.asarray(values.astype(dtype)), where)
    ours = piece.shape
    if transform.index is not None:
      ours = tuple(b.stop - b.start for b in block)
    values = transform.forward(values, ours)
    return values if transform.index is not None else values[block]

  def load(self) -> dict[str, Any]:
    """{leaf name: array}: all leaves, or none if the file is damaged.

    A leaf whose target has a sharding becomes a `jax.Array` laid out so, each
    device's block read by itself; any other is a NumPy array.
    """
    return {
      name: self.read(name)
      if getattr(leaf, 'sharding', None) is None
      else self._place(name)
      for name, leaf in self.target.items()
    }

  def load_on_device(self) -> dict[str, jax.Array]:
    """{leaf name: array} on the default device, uncommitted.

    A chunk of one leaf at a time is on the host.
    """
    found = {}
    for name, leaf in self.target.items():
      whole = [slice(0, n) for n in leaf.shape]
      (found[name],) = self._copies(name, whole, (None,))
    return found

  def lazy(self) -> dict[str, LazyLeaf]:
    """{leaf name: what reads it}: a block at a time, nothing kept."""
    return {
      name: LazyLeaf(
        tuple(leaf.shape),
        np.dtype(leaf.dtype),
        functools.partial(self.read, name),
      )
      for name, leaf in self.target.items()
    }

  def backwards(self) -> Iterator[tuple[files.LazyArray, np.ndarray]]:
    """(an array of the file, the same made out of our leaves), of each key.

    Leaves are read once, and no more of them at a time than share a key.
    """
    for names in self._groups():
      theirs = export(self._table, {n: self.read(n) for n in names})
      keys = [p.key for n in names for p in self._pieces[n] if p.key]
      for key in dict.fromkeys(keys):
        yield self.source[self._keys[key]], theirs[key]

  def _groups(self) -> list[list[str]]:
    """The leaves, those that are cut from one array together."""
    groups: list[tuple[set[str], list[str]]] = []
    for leaf, pieces in self._pieces.items():
      keys, names = {p.key for p in pieces if p.key}, [leaf]
      apart = []
      for group in groups:
        if keys & group[0]:
          keys, names = keys | group[0], group[1] + names
        else:
          apart.append(group)
      groups = [*apart, (keys, names)]
    return [names for _, names in groups]

  def _place(self, leaf: str) -> jax.Array:
    target = self.target[leaf]
    sharding = target.sharding
    kind = sharding.memory_kind
    where: dict[files.Bounds, list[Any]] = {}
    indices = sharding.addressable_devices_indices_map(tuple(target.shape))
    for device, index in indices.items():  # replicas share one read
      where.setdefault(files.bounds(index, target.shape), []).append(
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
      )
    # Block by block: `jax.make_array_from_callback` would hold the whole leaf
    # here beside its copy there.
    placed = []
    for block, devices in where.items():
      placed += self._copies(leaf, [slice(*pair) for pair in block], devices)
    return jax.make_array_from_single_device_arrays(
      tuple(target.shape), sharding, placed
    )

  def _copies(
    self, leaf: str, block: Sequence[slice], devices: Sequence[Any]
  ) -> list[jax.Array]:
    """One block on each of `devices`, a chunk of its rows after another."""
    dtype = self.target[leaf].dtype
    shape = [b.stop - b.start for b in block]
    row = np.dtype(dtype).itemsize * math.prod(shape[1:])
    if not shape or shape[0] * row <= 4 * CHUNK:
      values = self.read(leaf, block)
      return jax.block_until_ready([_onto(values, d) for d in devices])
    step = max(1, CHUNK // row)
    found = [jnp.zeros(shape, dtype, device=d) for d in devices]
    first, *rest = block
    for at in range(first.start, first.stop, step):
      rows = slice(at, min(at + step, first.stop))
      part = self.read(leaf, [rows, *rest])
      found = [
        _write(whole, _onto(part, d), at - first.start)
        for whole, d in zip(found, devices, strict=True)
      ]
      jax.block_until_ready(found)
    return found


def _onto(values: np.ndarray, device: Any) -> jax.Array:
  return (
    jnp.asarray(values) if device is None else jax.device_put(values, device)
  )


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, at: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)


def _finite(values: np.ndarray, where: str) -> np.ndarray:
  if values.dtype.kind in 'biu' or np.isfinite(values).all():
    return values
  count = int(values.size - np.isfinite(values).sum())
  raise UserError(
    f'{where} holds {count} values that are NaN, infinite or too large for '
    f'{values.dtype}; the file is no good model, take an earlier one'
  )


def _gather(
  pieces: Iterable[Piece], leaves: Mapping[str, np.ndarray]
) -> np.ndarray:
  """One source array out of the pieces that a key becomes."""
  parts, axis = [], 0
  for piece in pieces:
    leaf = leaves[piece.leaf]
    if leaf.ndim:
      leaf = leaf[piece.start if piece.single else _rows(piece)]
    parts.append(piece.transform.backward(leaf))
    axis = piece.transform.axis
  whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
  return np.ascontiguousarray(whole).reshape(whole.shape)


def _rows(piece: Piece) -> slice:
  return slice(piece.start, piece.stop)


def export(table: Table, leaves: Any) -> dict[str, np.ndarray]:
  """{source key: array}: a table backwards, bitwise.

  Args:
    table: the rules of the kind of file to write.
    leaves: a tree, or {leaf name: array}, of all that the model has.

  Returns:
    What the file would hold, computed arrays (`computed`) included. Views of
    `leaves` where the layout allows: copy before changing them.

  Raises:
    UserError: the table has no place for a leaf, or a constant of the table
      (`constant`) has been trained away.
  """
  flat = {n: np.asarray(v) for n, v in trees.flatten(leaves).items()}
  expected = expand(table, flat)
  if expected.unfilled:
    names = ', '.join(expected.unfilled[:4])
    raise UserError(
      f'this format of weights has no place for {names}; save the model as '
      'a tokenizer directory instead'
    )
  _check_fills(table, expected, flat)
  by_key: dict[str, list[Piece]] = {key: [] for key in expected.shapes}
  for pieces in expected.pieces.values():
    for piece in pieces:
      if piece.key:
        by_key[piece.key].append(piece)
  out = {
    key: _gather(sorted(pieces, key=lambda p: p.offset), flat)
    for key, pieces in by_key.items()
  }
  return out | {key: row.value() for key, row in expected.computed.items()}


def _check_fills(
  table: Table, expected: Expected, leaves: Mapping[str, np.ndarray]
) -> None:
  whys = {r.destination: r.why for r in table.rows if isinstance(r, Constant)}
  for pieces in expected.pieces.values():
    for piece in pieces:
      if piece.key:
        continue
      if (leaves[piece.leaf][_rows(piece)] != piece.value).any():
        raise UserError(
          f'this format of weights keeps {piece.leaf}[{piece.start}:'
          f'{piece.stop}] at {piece.value} ({"; ".join(whys.values())}), and '
          'training has moved it; freeze it to write this format'
        )
