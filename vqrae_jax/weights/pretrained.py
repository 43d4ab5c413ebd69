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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.weights import handles
from vqrae_jax.weights.match import Expected, Piece, expand, match
from vqrae_jax.weights.rules import Fill, Known, Table

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
    skipped: {the file's key: why it is not used}.
  """

  def __init__(
    self,
    source: handles.Source,
    table: Table,
    target: Any,
    way_out: str = '',
  ):
    """Matches; reads the few arrays that must equal computed ones.

    Args:
      source: an opened file (`readers.open_weights`).
      table: the rules for its kind.
      target: a tree of ShapeDtypeStructs (or arrays): all leaves to fill.
      way_out: what to do about a file that does not fit, for the error.

    Raises:
      UserError: the file does not fit the model; one line shows both sides.
    """
    self.source = source
    self.target = trees.flatten(target)
    found = match(source, table, self.target, way_out)
    self.skipped = dict(found.skipped)
    self._table = table
    self._way_out = f'; {way_out}' if way_out else ''
    self._pieces, self._keys = found.expected.pieces, found.keys
    for name, row in found.expected.known.items():
      if name in found.keys:
        self._compare(found.keys[name], row)
        self.skipped[found.keys[name]] = row.why

  def _compare(self, key: str, row: Known) -> None:
    want = row.value()
    handle = self.source[key]
    where = f'{self.source.name}: {handles.shown(key)}'
    if handle.shape != want.shape:
      raise UserError(
        f'{where} is {handle.shape}, the model computes {want.shape} '
        f'({row.why}){self._way_out}'
      )
    have = _finite(handle.read().astype(np.float32), where)
    off = float(np.max(np.abs(have - want), initial=0))
    if off > row.tolerance:
      way_out = f'; {row.way_out}' if row.way_out else ''
      raise UserError(
        f'{where} differs by up to {off:.3g} from what the model computes '
        f'({row.why}){way_out}'
      )

  def read(self, leaf: str, index: Sequence[slice] | None = None) -> np.ndarray:
    """The block `index` of a leaf (all of it: None), in the model's type.

    Only the layers that the block touches are read, one after another.

    Raises:
      UserError: the file is damaged, or a value is NaN or infinite.
    """
    target = self.target[leaf]
    block = handles.bounds(index, target.shape)
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
    where = f'{self.source.name}: {handles.shown(key)}'
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

  def backwards(self) -> Iterator[tuple[handles.Handle, np.ndarray]]:
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
    where: dict[handles.Bounds, list[Any]] = {}
    indices = sharding.addressable_devices_indices_map(tuple(target.shape))
    for device, index in indices.items():  # replicas share one read
      where.setdefault(handles.bounds(index, target.shape), []).append(
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
    What the file would hold, computed arrays (`known`) included. Views of
    `leaves` where the layout allows: copy before changing them.

  Raises:
    UserError: the table has no place for a leaf, or a constant of the table
      (`fill`) has been trained away.
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
  return out | {key: row.value() for key, row in expected.known.items()}


def _check_fills(
  table: Table, expected: Expected, leaves: Mapping[str, np.ndarray]
) -> None:
  whys = {r.destination: r.why for r in table.rows if isinstance(r, Fill)}
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
