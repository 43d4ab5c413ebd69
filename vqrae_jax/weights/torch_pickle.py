"""The pickle inside a PyTorch checkpoint, read as data.

A pickle is a program for a small stack machine, and Python's own machine
calls whatever the program names. This one has no such instruction: it knows
the few opcodes and the six names that `torch.save` writes for weights, builds
plain values and tensor records out of them, and stops at anything else. No
class of Python's `pickle` runs, and nothing is imported by name.

What it does not do: read tensors' values (`torch_files.py` does).
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from vqrae_jax.errors import UserError
from vqrae_jax.weights.handles import shown

# Storage classes: the name of the elements' type.
STORAGES = {
  'FloatStorage': 'float32',
  'DoubleStorage': 'float64',
  'HalfStorage': 'float16',
  'BFloat16Storage': 'bfloat16',
  'LongStorage': 'int64',
  'IntStorage': 'int32',
  'ShortStorage': 'int16',
  'CharStorage': 'int8',
  'ByteStorage': 'uint8',
  'BoolStorage': 'bool',
}


@dataclasses.dataclass(frozen=True)
class Storage:
  """A run of elements in the archive's member data/`key`."""

  dtype: str
  key: str
  count: int


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


def _parameter(*args: Any) -> Tensor:
  if len(args) != 3 or not isinstance(args[0], Tensor):
    raise _Refused('a parameter that is no tensor')
  return args[0]


def _ordered(*args: Any) -> _Ordered:
  if args:
    raise _Refused('an OrderedDict with arguments')
  return _Ordered()


def _size(*args: Any) -> tuple:
  if len(args) != 1 or not isinstance(args[0], tuple) or not _whole(*args[0]):
    raise _Refused('a torch.Size that is no tuple of numbers')
  return args[0]


_CALLS: dict[str, Callable[..., Any]] = {
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


def _storage(pid: Any) -> Storage:
  good = (
    isinstance(pid, tuple)
    and len(pid) == 5
    and pid[0] == 'storage'
    and isinstance(pid[1], _Name)
    and pid[1].path in _TYPES
    and type(pid[2]) is str
    and _whole(pid[4])
  )
  if not good:
    raise _Refused('refers to something that is no storage of numbers')
  return Storage(_TYPES[pid[1].path], pid[2], pid[4])


_MARK = object()
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = {
  'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
  'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES',
}  # fmt: skip
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_PUTS = {'BINPUT', 'LONG_BINPUT'}
_GETS = {'BINGET', 'LONG_BINGET'}


class _Machine:
  """A stack, a memo, and a method for each opcode that is not a literal."""

  def __init__(self):
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}

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
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Other keys could be nested without end, and hashing them would be too.
      if type(key) not in (str, int):
        raise _Refused(f'has a key of type {type(key).__name__}')
      target[key] = value

  def _append(self, items: list[Any]) -> None:
    if type(self.stack[-1]) is not list:
      raise _Refused('appends to something that is no list')
    self.stack[-1].extend(items)

  def step(self, name: str, arg: Any) -> None:
    stack = self.stack
    if name in _LITERALS:
      stack.append(arg)
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
      stack.append(_storage(stack.pop()))
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


def parse(data: bytes, where: str) -> Any:
  """The value a checkpoint's pickle describes, tensors as `Tensor`.

  Args:
    data: the whole of data.pkl.
    where: the file, for the errors.

  Raises:
    UserError: a damaged pickle, or one that holds more than weights.
  """
  machine = _Machine()
  try:
    for opcode, arg, _ in pickletools.genops(data):
      if opcode.name in ('PROTO', 'FRAME'):
        continue
      if opcode.name == 'STOP':
        break
      machine.step(opcode.name, arg)
    (value,) = machine.stack
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
  return value
