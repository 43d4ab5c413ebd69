"""The pickle inside a PyTorch checkpoint, read as data.

A pickle is a program for a small stack machine, and Python's own machine
calls whatever the program names. This one has no such instruction: it knows
the few opcodes and names that `torch.save` writes for weights, today and in
the format before 1.6, from Python 2 too; builds plain values and tensor records
out of them, and stops at anything else. No class of Python's `pickle` runs,
and nothing is imported by name.

What it does not do: read tensors' values (`torch_files.py`, `torch_legacy.py`).
"""

import dataclasses
import pickletools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.weights.handles import shown

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
    raise _Refused(f'names {shown(path)}, and so could run code')
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
