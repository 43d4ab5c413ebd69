"""PyTorch checkpoints (`.pt`, `.pth`, `.bin`) without PyTorch, and without
running their pickles.

Since PyTorch 1.6 a checkpoint is a zip of one pickle and one member of raw
bytes a storage; before, pickles and raw bytes one behind the other
(`torch_legacy.py`). Tensors become lazy handles over the bytes, so views and
shared storages are read as saved. Of a training file's sections the average
is preferred: "ema", else "model", else "state_dict", else the file itself.
"""

import dataclasses
import math
import pathlib
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.weights import files
from vqrae_jax.weights.files import Archive, printable

# ----------------------------------------------------------------------------
# The pickle inside a PyTorch checkpoint, read as data.
#
# A pickle is a program for a small stack machine, and Python's own machine
# calls whatever the program names. This one has no such instruction: it knows
# the few opcodes and names that `torch.save` writes for weights, today and in
# the format before 1.6, from Python 2 too; builds plain values and tensor records
# out of them, and stops at anything else. No class of Python's `pickle` runs,
# and nothing is imported by name.
#
# What it does not do: read tensors' values (`torch_files.py`, `torch_legacy.py`).

# Of all pickles of a file: names and shapes, some hundred bytes a tensor.
MAX_PICKLE = 1 << 27
_MAX_LINE = 1 << 12  # no name of a class is as long

# Storage classes: the type of the elements.
STORAGES = {
  'FloatStorage': np.dtype('float32'),
  'DoubleStorage': np.dtype('float64'),
  'HalfStorage': np.dtype('float16'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('int64'),
  'IntStorage': np.dtype('int32'),
  'ShortStorage': np.dtype('int16'),
  'CharStorage': np.dtype('int8'),
  'ByteStorage': np.dtype('uint8'),
  'BoolStorage': np.dtype('bool'),
}


@dataclasses.dataclass(frozen=True)
class Storage:
  """Elements [first, stop) of the `count` that the file keeps as `key`."""

  dtype: np.dtype
  key: str
  count: int
  first: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A strided array over a storage; strides and offset are in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
  """A global that the pickle names: inert, and one of the known."""

  path: str


class _Ordered(dict):
  """What OrderedDict() makes: the one value that BUILD may be applied to."""


class _Refused(Exception):
  """The pickle holds what no weight file needs; the words say what."""


def _whole(*values: Any) -> bool:
  return all(type(v) is int and v >= 0 for v in values)


def _tensor(*args: Any) -> Tensor:
  if len(args) not in (6, 7):
    raise _Refused(f'a tensor of {len(args)} parts')
  storage, offset, shape, strides = args[:4]
  if len(args) == 7 and args[6]:
    raise _Refused('a tensor to be negated or conjugated on reading')
  good = (
    isinstance(storage, Storage)
    and isinstance(shape, tuple)
    and isinstance(strides, tuple)
    and len(shape) == len(strides) <= 32
    and _whole(offset, *shape, *strides)
  )
  if not good:
    raise _Refused('a tensor whose parts are no storage and numbers')
  return Tensor(storage, offset, shape, strides)


def _old_tensor(*args: Any) -> Tensor:
  """As PyTorch before 0.4 wrote it: without gradient and hooks."""
  if len(args) != 4:
    raise _Refused(f'a tensor of {len(args)} parts')
  return _tensor(*args, False, None)


def _parameter(*args: Any) -> Tensor:
  if len(args) != 3 or not isinstance(args[0], Tensor):
    raise _Refused('a parameter that is no tensor')
  return args[0]


def _set_items(target: dict, items: Sequence[Any]) -> None:
  for key, value in zip(items[::2], items[1::2], strict=True):
    # Other keys could be nested without end, and hashing them would be too.
    if type(key) not in (str, int):
      raise _Refused(f'has a key of type {type(key).__name__}')
    target[key] = value


def _ordered(*args: Any) -> _Ordered:
  """Empty, or of the pairs that Python 2 gave it: one list of lists."""
  pairs = args[0] if args else []
  good = len(args) < 2 and type(pairs) is list
  if not good or any(type(p) is not list or len(p) != 2 for p in pairs):
    raise _Refused('an OrderedDict of something that is no list of pairs')
  made = _Ordered()
  _set_items(made, [part for pair in pairs for part in pair])
  pairs.clear()  # or a short pickle could ask for copies without end
  return made


def _size(*args: Any) -> tuple:
  good = len(args) == 1 and isinstance(args[0], tuple) and len(args[0]) <= 32
  if not good or not _whole(*args[0]):
    raise _Refused('a torch.Size that is no tuple of numbers')
  return args[0]


_CALLS: dict[str, Callable[..., Any]] = {
  'torch._utils._rebuild_tensor': _old_tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_parameter': _parameter,
  'collections.OrderedDict': _ordered,
  'torch.Size': _size,
}
_TYPES = {f'torch.{name}': dtype for name, dtype in STORAGES.items()}


def _named(module: Any, name: Any) -> _Name:
  path = f'{module}.{name}'
  if path not in _CALLS and path not in _TYPES:
    raise _Refused(f'names {printable(path)}, and so could run code')
  return _Name(path)


def _storage(pid: Any, legacy: bool) -> Storage:
  """What a persistent id refers to.

  It is ('storage', class, key, device, count) and, in the format before 1.6,
  None or the part that is meant: (its own key, first element, elements).
  """
  parts = list(pid) if type(pid) is tuple else []
  view = parts.pop() if legacy and len(parts) == 6 else None
  good = (
    len(parts) == 5
    and (not legacy or len(pid) == 6)
    and parts[0] == 'storage'
    and isinstance(parts[1], _Name)
    and parts[1].path in _TYPES
    and type(parts[2]) is str
    and _whole(parts[4])
  )
  if not good:
    raise _Refused('refers to something that is no storage of numbers')
  _, kind, key, _, count = parts
  first, size = 0, count
  if view is not None:
    if type(view) is not tuple or len(view) != 3 or not _whole(*view[1:]):
      raise _Refused('refers to a part of a storage that is no pair of numbers')
    first, size = view[1:]
  if first + size > count:
    raise _Refused('refers to a part of a storage that reaches past it')
  return Storage(_TYPES[kind.path], key, count, first, first + size)


_MARK = object()
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = {
  'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
  'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES',
}  # fmt: skip
# The text of Python 2: bytes, which `pickletools` shows as Latin-1.
_OLD_TEXTS = {'SHORT_BINSTRING', 'BINSTRING'}
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_PUTS = {'BINPUT', 'LONG_BINPUT'}
_GETS = {'BINGET', 'LONG_BINGET'}


class _Machine:
  """A stack, a memo, and a method for each opcode that is not a literal."""

  def __init__(self, legacy: bool):
    self.legacy = legacy
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.storages: list[Storage] = []

  def _items(self) -> list[Any]:
    """Everything above the last mark, which goes too."""
    at = max(i for i, v in enumerate(self.stack) if v is _MARK)
    items = self.stack[at + 1 :]
    del self.stack[at:]
    return items

  def _set(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
      raise _Refused('sets items of something that is no dict')
    _set_items(target, items)

  def _append(self, items: list[Any]) -> None:
    if type(self.stack[-1]) is not list:
      raise _Refused('appends to something that is no list')
    self.stack[-1].extend(items)

  def step(self, name: str, arg: Any) -> None:
    stack = self.stack
    if name in _LITERALS:
      stack.append(arg)
    elif name in _OLD_TEXTS:
      stack.append(arg.encode('latin-1').decode())
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name == 'MARK':
      stack.append(_MARK)
    elif name in _PUTS:
      self.memo[arg] = stack[-1]
    elif name == 'MEMOIZE':
      self.memo[len(self.memo)] = stack[-1]
    elif name in _GETS:
      stack.append(self.memo[arg])
    elif name == 'TUPLE':
      stack.append(tuple(self._items()))
    elif name in _TUPLES:
      items = stack[-_TUPLES[name] :]
      del stack[-_TUPLES[name] :]
      stack.append(tuple(items))
    elif name == 'SETITEM':
      value, key = stack.pop(), stack.pop()
      self._set([key, value])
    elif name == 'SETITEMS':
      self._set(self._items())
    elif name == 'APPEND':
      self._append([stack.pop()])
    elif name == 'APPENDS':
      self._append(self._items())
    elif name == 'GLOBAL':
      stack.append(_named(*arg.split(' ', 1)))
    elif name == 'STACK_GLOBAL':
      word, module = stack.pop(), stack.pop()
      stack.append(_named(module, word))
    elif name == 'BINPERSID':
      self.storages.append(_storage(stack.pop(), self.legacy))
      stack.append(self.storages[-1])
    elif name == 'REDUCE':
      args, called = stack.pop(), stack.pop()
      known = isinstance(called, _Name) and called.path in _CALLS
      if not known or not isinstance(args, tuple):
        raise _Refused('calls something that is no part of a tensor')
      stack.append(_CALLS[called.path](*args))
    elif name == 'BUILD':
      # A state dict's own attributes (`_metadata`): versions of modules.
      stack.pop()
      if type(stack[-1]) is not _Ordered:
        raise _Refused('sets the state of an object')
    else:
      raise _Refused(f'has the opcode {name}')


class Front:
  """The pickles at the front of a file, read no further than they may go."""

  def __init__(self, file: BinaryIO, where: str, size: int):
    self._file, self._where, self._size = file, where, size
    self.at = 0

  def tell(self) -> int:
    return self.at

  def read(self, count: int) -> bytes:
    """Fewer bytes only where the file ends; none are asked for beyond it."""
    last = min(self.at + count, self._size)
    if last > MAX_PICKLE:
      raise UserError(
        f'{self._where}: its pickles have more than {MAX_PICKLE} bytes, more '
        'than names of weights need; save the weights alone, best as '
        '.safetensors'
      )
    found = self._file.read(last - self.at)
    self.at += len(found)
    return found

  def readline(self) -> bytes:
    found = self._file.readline(_MAX_LINE)
    self.at += len(found)
    return found


def parse(
  data: bytes | Front, where: str, legacy: bool = False
) -> tuple[Any, list[Storage]]:
  """The value a pickle describes, tensors as `Tensor`, and its storages.

  Args:
    data: the pickle, or the front of a file, which is left behind it.
    where: the file, for the errors.
    legacy: whether it refers to storages as the format before 1.6 does.

  Raises:
    UserError: a damaged pickle, or one that holds more than weights.
  """
  machine = _Machine(legacy)
  try:
    for opcode, arg, _ in pickletools.genops(data):
      if opcode.name in ('PROTO', 'FRAME'):
        continue
      if opcode.name == 'STOP':
        break
      machine.step(opcode.name, arg)
    (value,) = machine.stack
  except UserError:
    raise
  except _Refused as e:
    raise UserError(
      f'{where} is not read: its pickle {e}; save the weights alone, with '
      'torch.save(model.state_dict(), …) or as .safetensors'
    ) from None
  except (ValueError, KeyError, IndexError, UnicodeError, TypeError) as e:
    words = ' '.join(str(e).split())[:100]
    raise UserError(
      f'{where} is damaged: its pickle cannot be read ({words}); fetch or '
      'save it again'
    ) from None
  return value, machine.storages


# ----------------------------------------------------------------------------
# PyTorch checkpoints of the format before 1.6: pickles, then raw bytes.
#
# A file is five pickles, one behind the other (a magic number, the format's
# version, a word on the machine, the value itself, the keys of its storages),
# and for each key, in that order, an i64 count of elements and the elements.
# Counts and elements are little-endian whatever machine wrote them, as
# `torch.save` has it. torchvision's older files, LPIPS's heads and DINO's are in
# this format.
#
# Opening reads the pickles and the counts, and holds all sizes to the file's.
# There is no checksum in it: damage inside a value is not seen here. What it
# does not do: choose tensors (`torch_files.py`), or read the tar archives that
# came before it.

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = 8  # bytes

# Reads bytes [first, last) of a storage.
Run = Callable[[int, int], bytes]


def open_legacy(
  path: pathlib.Path,
) -> tuple[Any, Callable[[Storage, str], Run]]:
  """The value of a file, and what gives each storage's bytes.

  Raises:
    UserError: no whole checkpoint, or one that holds more than weights.
  """
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      front = Front(file, str(path), size)
      _check_head(front, path)
      value, storages = parse(front, str(path), legacy=True)
      keys, _ = parse(front, str(path), legacy=True)
      places = _places(file, front.at, size, _listed(keys, storages))
  except OSError as e:
    raise UserError(f'{path} cannot be read: {e.strerror}') from None
  except _Damaged as e:
    raise UserError(
      f'{path} is truncated or damaged: {e}; fetch or save it again'
    ) from None

  def run(storage: Storage, where: str) -> Run:
    start = places[storage.key]
    return lambda first, last: _read(path, start + first, last - first, where)

  return value, run


class _Damaged(Exception):
  """Sizes that disagree; the words say which."""


def _check_head(front: Front, path: pathlib.Path) -> None:
  magic, _ = parse(front, str(path), legacy=True)
  if type(magic) is not int or magic != _MAGIC:
    raise UserError(
      f"{path} is a Python pickle and no PyTorch checkpoint (PyTorch's magic "
      'number is not its first value); save the weights as .safetensors or '
      'with torch.save'
    )
  version, _ = parse(front, str(path), legacy=True)
  if type(version) is not int or version != _VERSION:
    raise UserError(
      f'{path} is of an unknown version of the PyTorch format before 1.6, not '
      f'{_VERSION}; load it in PyTorch and save it again'
    )
  machine, _ = parse(front, str(path), legacy=True)
  if not isinstance(machine, dict):
    raise _Damaged('no word on the machine that wrote it')


def _listed(keys: Any, storages: list[Storage]) -> dict[str, Storage]:
  """The storages in the file's order; each is used, and alike everywhere."""
  used: dict[str, Storage] = {}
  for storage in storages:
    first = used.setdefault(storage.key, storage)
    if (first.dtype, first.count) != (storage.dtype, storage.count):
      raise _Damaged(
        f'storage {printable(storage.key)} is of two types or sizes'
      )
  if type(keys) is not list or not all(type(k) is str for k in keys):
    raise _Damaged('no list of storages follows its value')
  if len(set(keys)) != len(keys):
    raise _Damaged('it lists a storage twice')
  for key in set(keys) ^ set(used):
    raise _Damaged(
      f'its value and its list disagree on storage {printable(key)}'
    )
  return {key: used[key] for key in keys}


def _places(
  file: BinaryIO, at: int, size: int, storages: Mapping[str, Storage]
) -> dict[str, int]:
  """{key: where its elements begin}; they fill the file to its last byte."""
  places = {}
  for key, storage in storages.items():
    file.seek(at)
    head = file.read(_COUNT)
    if len(head) < _COUNT:
      raise _Damaged(f'it ends before storage {printable(key)}')
    count = int.from_bytes(head, 'little', signed=True)
    if count != storage.count:
      raise _Damaged(
        f'storage {printable(key)} has {count} elements, and its tensors want '
        f'{storage.count}'
      )
    places[key] = at + _COUNT
    at = places[key] + count * storage.dtype.itemsize
    if at > size:
      raise _Damaged(f'it ends inside storage {printable(key)}')
  if at < size:
    raise _Damaged(f'{size - at} bytes follow its last storage')
  return places


def _read(path: pathlib.Path, at: int, count: int, where: str) -> bytes:
  try:
    with path.open('rb') as file:
      file.seek(at)
      found = file.read(count)
  except OSError as e:
    raise UserError(f'{path} cannot be read: {e.strerror}') from None
  if len(found) != count:
    raise UserError(f'{where} ends early: the file has changed; fetch it again')
  return found


SECTIONS = ('ema', 'model', 'state_dict')

_MEMBERS = (
  r'[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version'
  r'|\.storage_alignment|\.data/serialization_id)'
)
# (storage, where) -> reads bytes [first, last) of it.
_Runs = Callable[[Storage, str], Run]


def open_torch(path: pathlib.Path) -> files.WeightFile:
  """The tensors of one checkpoint, by name; its first byte says the format.

  Raises:
    UserError: no whole checkpoint, or one that holds more than weights.
  """
  with path.open('rb') as file:
    pickled = file.read(1) == b'\x80'
  if pickled:
    value, runs = open_legacy(path)
    swap = False
  else:
    value, runs, swap = _open_zip(path)
  tensors, note = _choose(value, path)
  found = {
    key: _handle(f'{path}: "{files.printable(key)}"', tensor, runs, swap)
    for key, tensor in tensors.items()
  }
  return files.WeightFile(str(path), found, note)


def _open_zip(path: pathlib.Path) -> tuple[Any, _Runs, bool]:
  """A zip's value, its storages, and whether their bytes are big-endian."""
  archive = Archive(path, _MEMBERS, 'PyTorch checkpoint')
  tops = {name.split('/')[0] for name in archive.names}
  if len(tops) > 1:
    raise UserError(
      f'{path} holds {len(tops)} top folders, which no PyTorch checkpoint '
      'has; save the weights again'
    )
  (top,) = tops
  pickle = f'{top}/data.pkl'
  if pickle not in archive.names:
    raise UserError(f'{path} is no PyTorch checkpoint: it has no data.pkl')
  if archive.size(pickle) > MAX_PICKLE:
    raise UserError(
      f'{path}: data.pkl has {archive.size(pickle)} bytes, more than names of '
      'weights need; save the weights alone, best as .safetensors'
    )
  swap = _is_big_endian(archive, top)
  value, _ = parse(archive.read(pickle), str(path))

  def run(storage: Storage, where: str) -> Run:
    member = f'{top}/data/{storage.key[:20]}'
    if member not in archive.names:
      raise UserError(
        f'{where} lies in {member}, which is missing; the file is damaged'
      )
    if archive.size(member) != storage.count * storage.dtype.itemsize:
      raise UserError(
        f'{where} wants {storage.count} elements of {storage.dtype}, {member} '
        f'has {archive.size(member)} bytes; the file is damaged'
      )
    return lambda first, last: archive.read(member, first, last)

  return value, run, swap


def _is_big_endian(archive: Archive, top: str) -> bool:
  name = f'{top}/byteorder'
  if name not in archive.names:
    return False  # older than PyTorch 2.1, which always wrote little
  if archive.size(name) > 16:
    order = b'?'
  else:
    order = archive.read(name).strip()
  if order not in (b'little', b'big'):
    raise UserError(
      f'{archive.path} is damaged: its byte order is neither little nor big'
    )
  return order == b'big'


def _tensors(value: Any) -> dict[str, Tensor]:
  if not isinstance(value, dict):
    return {}
  return {
    k: v
    for k, v in value.items()
    if isinstance(k, str) and isinstance(v, Tensor)
  }


def _choose(value: Any, path: pathlib.Path) -> tuple[dict[str, Tensor], str]:
  """The section that holds the weights, and a line on what was taken."""
  if isinstance(value, Tensor):
    raise UserError(f'{path} holds one tensor without a name; save a dict')
  if not isinstance(value, dict):
    raise UserError(
      f'{path} holds a {type(value).__name__}; save a dict of named tensors'
    )
  for name in SECTIONS:
    section = value.get(name)
    found = _tensors(section)
    if found:
      _no_more(section, f'{path} ["{name}"]')
      left = ', '.join(files.printable(k) for k in value if k != name)
      return found, f'took "{name}"' + (f', left {left[:120]}' if left else '')
  found = _tensors(value)
  if not found:
    keys = ', '.join(map(files.printable, list(value)[:6])) or 'nothing'
    raise UserError(
      f'{path} holds no named tensors (it has {keys}); they are looked for in '
      f'"ema", "model", "state_dict" and at the top'
    )
  _no_more(value, str(path))
  left = ', '.join(files.printable(k) for k in value if k not in found)
  return found, f'left {left[:120]}' if left else ''


def _no_more(section: dict, where: str) -> None:
  """No tensors deeper down, which would be left out unseen."""
  for key, value in section.items():
    deeper = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple) and any(
      isinstance(v, Tensor | dict) for v in deeper
    ):
      raise UserError(
        f'{where} holds tensors and, under "{files.printable(key)}", further '
        'ones; save the weights alone, as one dict of named tensors'
      )


def _handle(
  where: str, tensor: Tensor, runs: _Runs, swap: bool
) -> files.LazyArray:
  storage = tensor.storage
  read = runs(storage, where)
  offset = storage.first + tensor.offset
  needed = files.extent(tensor.shape, tensor.strides, offset)
  if needed > storage.stop or math.prod(tensor.shape) >= 1 << 48:
    raise UserError(
      f'{where} of shape {tensor.shape} reaches past its storage of '
      f'{storage.stop - storage.first} elements; the file is damaged'
    )
  return files.strided(
    read, tensor.shape, storage.dtype, tensor.strides, offset, swap
  )
