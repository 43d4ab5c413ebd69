"""PyTorch checkpoints (`.pt`, `.pth`, `.bin`) without PyTorch.

Since PyTorch 1.6 a checkpoint is a zip of one pickle and one member of raw
bytes per storage; earlier ones are five pickles (a magic number, the version,
the machine, the value, the keys of its storages) and then, for each key, an i64
count and the elements. The unpickler knows inert constructors only: a name that
`torch.save` does not write for weights is an error, so no code of a file runs.
Tensors become lazy arrays over the bytes.

Of a training file's sections "ema" is preferred, else "model", else
"state_dict", else the file itself. PyTorch's first format, a tar archive, is
not read.
"""

import dataclasses
import io
import math
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.weights.files import (
  LazyArray,
  WeightFile,
  as_user_error,
  printable,
)

SECTIONS = ('ema', 'model', 'state_dict')
# Names and shapes take some hundred bytes a tensor. An unpickled byte may take
# sixty of memory, which this bounds.
MAX_PICKLE = 1 << 25
# A tensor may be expanded beyond its storage; this many elements are plausible.
MAX_EXPANDED = 1 << 24
_MAX_STORAGE = 1 << 38  # bytes
# Weights hardly compress: a member that expands by a larger ratio is a zip
# bomb. A megabyte of zeros is a plausible bias.
_MAX_RATIO, _RATIO_FREE = 100, 1 << 20

_DTYPES = {
  'Float': 'f4', 'Double': 'f8', 'Half': 'f2', 'BFloat16': ml_dtypes.bfloat16,
  'Long': 'i8', 'Int': 'i4', 'Short': 'i2', 'Char': 'i1', 'Byte': 'u1',
  'Bool': '?',
}  # fmt: skip

# ----------------------------------------------------------------------------
# The pickle: plain values, and records of tensors.


class _Refused(Exception):
  """The pickle has what no weight file needs; the message names it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
  """Elements [first, stop) of the `count` that the file stores under `key`."""

  dtype: np.dtype
  key: str
  count: int
  first: int
  stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A strided array over a storage; strides and offset are in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Dict(dict):
  def __setitem__(self, key: Any, value: Any) -> None:
    # Keys of other types could be nested so deep that hashing them overflows.
    if type(key) not in (str, int):
      raise _Refused(f'has a key of type {type(key).__name__}')
    super().__setitem__(key, value)


class _OrderedDict(_Dict):
  """The only value that BUILD may change: a state dict has attributes."""


def _are_sizes(*values: Any) -> bool:
  return all(type(v) is int and v >= 0 for v in values)


def _tensor(
  storage: Any, offset: Any, shape: Any, strides: Any, *others: Any
) -> Tensor:
  if others[2:] not in ((), ({},), (None,)):
    raise _Refused('has a tensor to be negated or conjugated on reading')
  if (
    type(storage) is not Storage
    or not type(shape) is type(strides) is tuple
    or not len(shape) == len(strides) <= 32
    or not _are_sizes(offset, *shape, *strides)
  ):
    raise _Refused('has a tensor whose parts are not a storage and numbers')
  return Tensor(storage, storage.first + offset, shape, strides)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
  if type(data) is not Tensor:
    raise _Refused('has a parameter that is not a tensor')
  return data


def _ordered_dict(*args: Any) -> _OrderedDict:
  """Empty, or of the pairs that Python 2 pickled: one list of lists."""
  pairs = args[0] if args else []
  if len(args) > 1 or type(pairs) is not list:
    raise _Refused('has an OrderedDict of something other than pairs')
  made = _OrderedDict()
  for key, value in pairs:
    made[key] = value
  pairs.clear()  # else a short pickle could copy one list without end
  return made


def _size(shape: Any) -> tuple:
  if type(shape) is not tuple or len(shape) > 32 or not _are_sizes(*shape):
    raise _Refused('has a torch.Size that is not of numbers')
  return shape


_NAMES: dict[str, Any] = {
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': _parameter,
  'collections.OrderedDict': _ordered_dict,
  'torch.Size': _size,
  **{f'torch.{k}Storage': np.dtype(v) for k, v in _DTYPES.items()},
}


_OPCODES = """
  PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
  BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
  BINSTRING SHORT_BINSTRING EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
  SETITEM SETITEMS APPEND APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
  GLOBAL STACK_GLOBAL BINPERSID
"""


# Python's unpickler in Python. The one in C allocates as many memo slots as a
# few bytes of the file ask for, and hashes keys nested so deep that the stack
# overflows. Only opcodes that `torch.save` writes are allowed.
class _Unpickler(pickle._Unpickler):
  def __init__(self, file: io.BytesIO, legacy: bool):
    super().__init__(file, encoding='utf-8')  # of the strings of Python 2
    self.legacy = legacy
    self.storages: list[Storage] = []

  def find_class(self, module: str, name: str) -> Any:
    path = f'{module}.{name}'
    if path not in _NAMES:
      raise _Refused(f'names {printable(path)}, and so could run code')
    return _NAMES[path]

  def persistent_load(self, pid: Any) -> Storage:
    """`pid` is ('storage', type, key, device, count) and, in the format before
    1.6, None or a view of the storage: (own key, first element, elements)."""
    if type(pid) is not tuple or len(pid) != 5 + self.legacy:
      raise _Refused('refers to something that is not a storage')
    kind, dtype, key, _, count, *views = pid
    view = views[0] if views and views[0] is not None else ('', 0, count)
    if (
      kind != 'storage'
      or not isinstance(dtype, np.dtype)
      or type(key) is not str
      or type(view) is not tuple
      or len(view) != 3
      or not _are_sizes(count, *view[1:])
      or view[1] + view[2] > count
    ):
      raise _Refused('refers to something that is not a storage of numbers')
    stop = view[1] + view[2]
    self.storages.append(Storage(dtype, key, count, view[1], stop))
    return self.storages[-1]

  def _empty_dict(self) -> None:
    self.append(_Dict())

  def _reduce(self) -> None:
    args, call = self.stack.pop(), self.stack[-1]
    # The functions above are the only ones that `find_class` gives.
    if type(call) is not types.FunctionType or type(args) is not tuple:
      raise _Refused('calls something that is not part of a tensor')
    self.stack[-1] = call(*args)

  def _build(self) -> None:
    self.stack.pop()  # `_metadata`: versions of modules
    if type(self.stack[-1]) is not _OrderedDict:
      raise _Refused('sets the state of an object')

  dispatch = {
    code: pickle._Unpickler.dispatch[code]
    for name in _OPCODES.split()
    for code in getattr(pickle, name)
  } | {
    pickle.EMPTY_DICT[0]: _empty_dict,
    pickle.REDUCE[0]: _reduce,
    pickle.BUILD[0]: _build,
  }


def unpickle(
  file: io.BytesIO, path: pathlib.Path, legacy: bool = False
) -> tuple[Any, list[Storage]]:
  """The next value of `file`, tensors as `Tensor`, and its storages.

  Raises:
    UserError: a damaged pickle, or one that holds more than weights.
  """
  unpickler = _Unpickler(file, legacy)
  try:
    return unpickler.load(), unpickler.storages
  except _Refused as e:
    reason = str(e)
  # Bytes that are not a pickle raise a dozen kinds of errors.
  except Exception as e:
    reason = f'is damaged ({type(e).__name__})'
  raise UserError(
    f'{path} is not read: its pickle {reason}; save the weights alone, with '
    'torch.save(model.state_dict(), …) or as .safetensors'
  )


# ----------------------------------------------------------------------------
# The two formats: functions that read or map a storage's elements.

_Read = Callable[[Storage], np.ndarray]
_MEMBERS = (
  r'(data\.pkl|data/\d+|version|byteorder|\.format_version'
  r'|\.storage_alignment|\.data/serialization_id)'
)


def _open_zip(path: pathlib.Path) -> tuple[Any, _Read]:
  """A zip's unpickled value, and a function that reads a storage.

  Sizes are checked before a member is read; its CRC as it is read.
  """
  with as_user_error(path, 'PyTorch checkpoint'):
    archive = zipfile.ZipFile(path)
  members = {info.filename: info for info in archive.infolist()}
  top = next(iter(members), '').split('/')[0]
  for name in members:
    if not re.fullmatch(f'{re.escape(top)}/{_MEMBERS}', name):
      raise UserError(
        f'{path} holds "{printable(name)}", which no PyTorch checkpoint has; '
        'save the weights alone, best as .safetensors'
      )
  if f'{top}/data.pkl' not in members:
    raise UserError(f'{path} is not a PyTorch checkpoint: it has no data.pkl')
  twice = len(archive.infolist()) > len(members)
  held = sum(info.compress_size for info in members.values())
  if twice or held > path.stat().st_size:
    raise UserError(f'{path} is damaged: its members overlap; save it again')

  def read(name: str, most: int) -> bytes:
    info = members[name]
    size, kind = info.file_size, info.compress_type
    if size > min(most, _RATIO_FREE + _MAX_RATIO * info.compress_size):
      raise UserError(
        f'{path}: "{name}" would grow to {size} bytes, more than weights need; '
        'save the weights alone, uncompressed'
      )
    # Others cannot be decompressed with a bound on memory.
    if kind not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UserError(f'{path}: "{name}" is compressed; save it uncompressed')
    with as_user_error(path, 'PyTorch checkpoint'):
      with archive.open(info) as member:
        found = member.read(size)
      if len(found) != size:
        raise EOFError(f'"{name}" ends early')
    return found

  order = b'little'  # always, and not written, before PyTorch 2.1
  if f'{top}/byteorder' in members:
    order = read(f'{top}/byteorder', 16).strip()
  if order not in (b'little', b'big'):
    raise UserError(f'{path} is damaged: byteorder is not little or big')
  pickled = io.BytesIO(read(f'{top}/data.pkl', MAX_PICKLE))
  value, storages = unpickle(pickled, path)
  for storage in storages:
    name = f'{top}/data/{storage.key}'
    have = members[name].file_size if name in members else 'no'
    if have != storage.count * storage.dtype.itemsize:
      raise UserError(
        f'{path} is damaged: {printable(name)} has {have} bytes, and its '
        f'tensors want {storage.count} elements of {storage.dtype}'
      )

  def values(storage: Storage) -> np.ndarray:
    data = read(f'{top}/data/{storage.key}', _MAX_STORAGE)
    raw = np.frombuffer(data, f'u{storage.dtype.itemsize}')
    return (raw.byteswap() if order == b'big' else raw).view(storage.dtype)

  return value, values


_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def _open_legacy(path: pathlib.Path) -> tuple[Any, _Read]:
  """The same for the format before 1.6, which has no checksums.

  Counts and elements are little-endian whatever machine wrote them.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    front = io.BytesIO(file.read(min(size, MAX_PICKLE)))
    magic, version, machine = (unpickle(front, path)[0] for _ in range(3))
    if magic != _MAGIC or version != _VERSION or not isinstance(machine, dict):
      raise UserError(
        f'{path} is a pickle but not a PyTorch checkpoint of version '
        f'{_VERSION}; save the weights with torch.save or as .safetensors'
      )
    value, storages = unpickle(front, path, legacy=True)
    keys, _ = unpickle(front, path)
    used = {s.key: (s.dtype, s.count) for s in storages}
    damage = f'{path} is truncated or damaged'
    for s in storages:
      if used[s.key] != (s.dtype, s.count):
        raise UserError(f'{damage}: storage {printable(s.key)} has two types')
    good = isinstance(keys, list) and all(isinstance(k, str) for k in keys)
    if not good or sorted(keys) != sorted(used):
      raise UserError(f'{damage}: it lists storages other than those in use')
    at, starts = front.tell(), {}
    for key in keys:
      dtype, count = used[key]
      file.seek(at)
      starts[key] = at + 8
      at = starts[key] + count * dtype.itemsize
      if at > size or int.from_bytes(file.read(8), 'little') != count:
        raise UserError(
          f'{damage}: storage {printable(key)} does not have {count} elements'
        )
  if at != size:
    raise UserError(f'{damage}: {size - at} bytes follow its last storage')

  def values(storage: Storage) -> np.ndarray:
    with as_user_error(path, 'PyTorch checkpoint'):
      return np.memmap(
        path, storage.dtype, 'r', starts[storage.key], (storage.count,)
      )

  return value, values


# ----------------------------------------------------------------------------
# Tensors by name.


def open_torch(path: pathlib.Path) -> WeightFile:
  """The tensors of one checkpoint, by name; its first byte says the format.

  Raises:
    UserError: a file that is damaged or holds more than weights.
  """
  with path.open('rb') as file:
    legacy = file.read(1) == b'\x80'
  value, read = (_open_legacy if legacy else _open_zip)(path)
  tensors, note = _choose(value, path)
  found = {key: _lazy(path, key, t, read) for key, t in tensors.items()}
  return WeightFile(str(path), found, note)


def _choose(value: Any, path: pathlib.Path) -> tuple[dict[str, Tensor], str]:
  """(the tensors of the section that holds weights, what was used and left)."""
  if not isinstance(value, dict):
    raise UserError(
      f'{path} holds a {type(value).__name__}; save a dict of named tensors'
    )
  for name in (*SECTIONS, ''):
    section = value.get(name) if name else value
    items = section.items() if isinstance(section, dict) else ()
    found = {
      k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)
    }
    if found:
      _check_flat(section, f'{path} ["{name}"]' if name else str(path))
      left = [k for k in value if k not in ((name,) if name else found)]
      notes = [f'took "{name}"'] if name else []
      notes += [f'left {printable(", ".join(map(str, left)))}'] if left else []
      return found, ', '.join(notes)
  keys = ', '.join(map(printable, list(value)[:6])) or 'nothing'
  raise UserError(
    f'{path} holds no named tensors (it has {keys}); they are looked for in '
    f'{", ".join(SECTIONS)} and at the top'
  )


def _check_flat(section: dict, where: str) -> None:
  """Raises a UserError for deeper tensors, which would silently be left out."""
  for key, value in section.items():
    if not isinstance(value, dict | list | tuple):
      continue
    deeper = value.values() if isinstance(value, dict) else value
    if any(isinstance(v, Tensor | dict) for v in deeper):
      raise UserError(
        f'{where} holds tensors and, under "{printable(key)}", further '
        'ones; save the weights alone, as one dict of named tensors'
      )


def _lazy(path: pathlib.Path, key: str, t: Tensor, read: _Read) -> LazyArray:
  last = sum((n - 1) * step for n, step in zip(t.shape, t.strides, strict=True))
  elements = math.prod(max(n, 1) for n in t.shape)
  reaches = 0 not in t.shape and t.offset + last >= t.storage.stop
  if reaches or elements > max(t.storage.count, MAX_EXPANDED):
    raise UserError(
      f'{path}: "{printable(key)}" of shape {t.shape} does not fit its storage '
      f'of {t.storage.stop - t.storage.first} elements; the file is damaged'
    )
  dtype = t.storage.dtype
  strides = [step * dtype.itemsize for step in t.strides]

  def values() -> np.ndarray:
    if 0 in t.shape:
      return np.zeros(t.shape, dtype)
    flat = read(t.storage)[t.offset :]
    return np.array(np.lib.stride_tricks.as_strided(flat, t.shape, strides))

  return LazyArray(t.shape, dtype, values)
