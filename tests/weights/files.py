"""Weight files for tests, whole and broken: pickles and zips by hand."""

import collections
import io
import pathlib
import pickle
import struct
import zipfile

import pytest

from vqrae_jax.errors import UserError
from vqrae_jax.weights.files import open_weights


def error_of(fn, *args, **options) -> str:
  """The one line of the `UserError` that a call must end with."""
  with pytest.raises(UserError) as caught:
    fn(*args, **options)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 700
  return message


def refused(path, *words: str):
  """Opening and reading all of `path` is an error with its name and `words`."""
  message = error_of(read_all, path)
  for word in (pathlib.Path(path).name, *words):
    assert word in message, message


def read_all(path) -> dict:
  return {key: handle.read() for key, handle in open_weights(path).items()}


def equal(have: dict, want: dict):
  """Arrays of the same names, types and shapes, bit for bit."""
  assert have.keys() == want.keys()
  for key, array in want.items():
    assert (have[key].dtype, have[key].shape) == (array.dtype, array.shape), key
    assert have[key].tobytes() == array.tobytes(), key


def same(path, want: dict):
  """A file's arrays are `want`, and so are its types and shapes unread."""
  equal(read_all(path), want)
  for key, handle in open_weights(path).items():
    assert (handle.dtype, handle.shape) == (want[key].dtype, want[key].shape)


class Calls:
  """Pickles as a call of `function(*args)`: what a malicious file does."""

  def __init__(self, function, *args):
    self.parts = function, args

  def __reduce__(self):
    return self.parts


# Pickles as a persistent id, as torch's storages do.
Reference = collections.namedtuple('Reference', ['pid'])


class _Pickler(pickle.Pickler):
  def persistent_id(self, obj):
    return obj.pid if type(obj) is Reference else None


def program(value, protocol: int = 2) -> bytes:
  """The pickle of a value; bytes are one already."""
  if isinstance(value, bytes):
    return value
  out = io.BytesIO()
  _Pickler(out, protocol).dump(value)
  return out.getvalue()


def checkpoint(path, value, members, compression=zipfile.ZIP_STORED):
  """A PyTorch zip whose data.pkl is the program of `value`."""
  with zipfile.ZipFile(path, 'w', compression) as file:
    file.writestr('archive/data.pkl', program(value))
    file.writestr('archive/version', '3\n')
    for name, data in members.items():
      file.writestr(name, data)
  return path


# The five pickles of the format before 1.6: magic, version, machine, value,
# keys.
HEAD = 0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True)


def legacy(path, value, storages, head=HEAD, keys=None, tail=b''):
  """A checkpoint of the format before 1.6; `storages` are (count, bytes)."""
  keys = list(storages) if keys is None else keys
  runs = [struct.pack('<q', n) + data for n, data in storages.values()]
  pickles = map(program, (*head, value, keys))
  path.write_bytes(b''.join((*pickles, *runs, tail)))
  return path
