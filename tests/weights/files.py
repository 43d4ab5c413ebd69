"""Weight files for tests, whole and broken: pickles and zips by hand."""

import pathlib
import pickle
import struct
import zipfile

import pytest

from vqrae_jax import weights
from vqrae_jax.errors import UserError


def refused(path, *words: str) -> str:
  """Opening and reading all of `path` is one `UserError` line with `words`."""
  with pytest.raises(UserError) as caught:
    read_all(path)
  message = str(caught.value)
  assert '\n' not in message
  assert len(message) < 600
  for word in (pathlib.Path(path).name, *words):
    assert word in message, message
  return message


def read_all(path) -> dict:
  source = weights.open_weights(path)
  return {key: handle.read() for key, handle in source.items()}


def checkpoint(
  path: pathlib.Path,
  program: bytes,
  members: dict[str, bytes] | None = None,
  compression: int = zipfile.ZIP_STORED,
) -> pathlib.Path:
  """A PyTorch zip whose data.pkl is `program`."""
  with zipfile.ZipFile(path, 'w', compression) as file:
    file.writestr('archive/data.pkl', program)
    file.writestr('archive/version', '3\n')
    for name, data in (members or {}).items():
      file.writestr(name, data)
  return path


class Calls:
  """Pickles as a call of `function(*args)`: what a malicious file does."""

  def __init__(self, function, *args, state=None):
    self.parts = (function, args) + (() if state is None else (state,))

  def __reduce__(self):
    return self.parts


def program(value, protocol: int = 2) -> bytes:
  return pickle.dumps(value, protocol)


# Opcodes, for programs that no pickler writes.
MARK, STOP, REDUCE, BUILD, PERSID = b'(', b'.', b'R', b'b', b'Q'
TUPLE, EMPTY_TUPLE, EMPTY_DICT = b't', b')', b'}'
SETITEM, NEWOBJ, NONE = b's', b'\x81', b'N'


def old_text(word: str) -> bytes:
  """Text as Python 2 pickled it."""
  return b'U' + struct.pack('<B', len(word)) + word.encode()


def name(module: str, word: str) -> bytes:
  return f'c{module}\n{word}\n'.encode()


def text(word: str) -> bytes:
  return b'X' + struct.pack('<I', len(word)) + word.encode()


def number(n: int) -> bytes:
  return b'J' + struct.pack('<i', n)


def numbers(*values: int) -> bytes:
  return MARK + b''.join(map(number, values)) + TUPLE


def storage(kind=None, key='0', count=4, more=b'') -> bytes:
  """`more` is the sixth part, which the format before 1.6 has."""
  kind = name('torch', 'FloatStorage') if kind is None else kind
  parts = text('storage') + kind + text(key) + text('cpu') + number(count)
  return MARK + parts + more + TUPLE + PERSID


def tensor(
  store=None, offset=0, size=(4,), stride=(1,), key='w', tail=b'\x89N'
) -> bytes:
  """A whole program: {key: tensor}."""
  call = name('torch._utils', '_rebuild_tensor_v2')
  parts = storage() if store is None else store
  parts += number(offset) + numbers(*size) + numbers(*stride) + tail
  value = call + MARK + parts + TUPLE + REDUCE
  return b'\x80\x02' + EMPTY_DICT + text(key) + value + SETITEM + STOP


# The five pickles of the format before 1.6: magic, version, machine, value,
# keys.
HEAD = (
  program(0x1950A86A20F9469CFC6C),
  program(1001),
  program(dict(protocol_version=1001, little_endian=True, type_sizes={})),
)


def legacy(
  path: pathlib.Path,
  value: bytes,
  storages: dict[str, tuple[int, bytes]] | None = None,
  head=HEAD,
  keys: bytes | None = None,
  tail: bytes = b'',
) -> pathlib.Path:
  """A checkpoint of the format before 1.6 whose value is the program `value`.

  `storages` are (count, bytes) by key.
  """
  storages = storages or {}
  keys = program(list(storages)) if keys is None else keys
  runs = (struct.pack('<q', n) + data for n, data in storages.values())
  path.write_bytes(b''.join((*head, value, keys, *runs, tail)))
  return path
