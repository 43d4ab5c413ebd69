"""Weight files as {key: lazy array}, in any format: `open_weights(path)`.

Opening reads names, shapes and types; `LazyArray.read` reads values. The
file's ending says which format is meant and its first bytes which it is: if
they disagree, the error says what to rename. A directory or an index is read as
the one set of shards that it describes. Nothing here depends on a model
(`rules.py` does). PyTorch's two formats are in `torch.py`.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import struct
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vqrae_jax.errors import BAD_JSON, UserError


def printable(text: object, width: int = 90) -> str:
  """Text from a file or a library, made fit for one line of an error."""
  line = ''.join(c if c.isprintable() else ' ' for c in str(text)[: 9 * width])
  line = textwrap.shorten(line, width, placeholder=' …')
  # The text is one long word.
  return str(text)[:width] + '…' if line == '…' else line


@contextlib.contextmanager
def as_user_error(path: pathlib.Path, what: str) -> Iterator[None]:
  """Turns any error that damage causes in a library into a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f'{path} is truncated or damaged, not a complete {what} '
      f'({printable(str(e) or type(e).__name__)}); download or save it again'
    ) from None


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """An array in a file: its shape, its dtype, and a function that reads it.

  `read()` returns values of that dtype, or raises a `UserError` if the file is
  damaged.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    return self.read().astype(dtype or self.dtype, copy=False)


class WeightFile(dict[str, LazyArray]):
  """{key: LazyArray} of one file or one set of shards.

  `name` is the file's, for errors; `note` says, for logs, which section was
  chosen and what was left out.
  """

  def __init__(
    self, name: str, handles: Mapping[str, LazyArray], note: str = ''
  ):
    super().__init__(handles)
    self.name = name
    self.note = note
    for key, handle in handles.items():
      if math.prod(max(n, 1) for n in handle.shape) >= 1 << 48:
        raise UserError(
          f'{name}: "{printable(key)}" claims the shape {handle.shape}; the '
          'file is damaged'
        )

  def __repr__(self) -> str:
    return f'WeightFile({self.name!r}, {len(self)} arrays)'


def arrays(name: str, values: Mapping[str, np.ndarray]) -> WeightFile:
  """Arrays in memory as a weight file, so that they pass the same checks."""

  handles = {
    key: LazyArray(x.shape, x.dtype, functools.partial(np.asarray, x))
    for key, x in values.items()
  }
  return WeightFile(name, handles)


# ----------------------------------------------------------------------------
# `.npz`, as big_vision publishes weights.

_NPZ = '.npz file of arrays'


def open_npz(path: pathlib.Path) -> WeightFile:
  """The arrays of one `.npz`, by name; no pickle is read.

  Raises:
    UserError: a file that is damaged or holds anything but numbers.
  """
  with as_user_error(path, _NPZ):
    file = np.load(path, allow_pickle=False)
    if not file.files:
      raise UserError(f'{path} is an empty archive, not a {_NPZ}')
    return WeightFile(
      str(path), {key: _npz_handle(path, file, key) for key in file.files}
    )


def _npz_handle(path: pathlib.Path, file: Any, key: str) -> LazyArray:
  where = f'{path}: "{printable(key)}"'
  member = file.zip.NameToInfo.get(f'{key}.npy')
  if member is None:
    raise UserError(f'{where} is not an array, which no {_NPZ} has')
  with file.zip.open(member) as head:
    version = np.lib.format.read_magic(head)
    headers = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = headers[version](head)
    size = member.file_size - head.tell()
  native = dtype.newbyteorder('=')
  # NumPy stores bfloat16 as two nameless bytes.
  if dtype == np.dtype('V2'):
    native = np.dtype(ml_dtypes.bfloat16)
  elif dtype.kind not in 'biuf' or dtype.itemsize > 8:
    raise UserError(f'{where} is of type {dtype}; weights are plain numbers')
  if size != math.prod(shape) * dtype.itemsize:
    raise UserError(
      f'{where} has a header for shape {shape} and another number of bytes; '
      'the file is damaged, download it again'
    )

  def read() -> np.ndarray:
    with as_user_error(path, _NPZ):
      values = file[key]
    return values.view(native) if dtype.kind == 'V' else values.astype(native)

  return LazyArray(shape, native, read)


# ----------------------------------------------------------------------------
# `.safetensors`.

# The format's names of the supported dtypes.
_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def open_safetensors(path: pathlib.Path) -> WeightFile:
  """The arrays of one `.safetensors` file, by name.

  Raises:
    UserError: a damaged file, or a type that weights do not have.
  """
  with as_user_error(path, '.safetensors file'):
    file = safe_open(str(path), framework='numpy')
    return WeightFile(
      str(path),
      {key: _safetensors_handle(path, file, key) for key in file.keys()},  # noqa: SIM118
    )


def _safetensors_handle(path: pathlib.Path, file: Any, key: str) -> LazyArray:
  part = file.get_slice(key)
  dtype = _DTYPES.get(part.get_dtype())
  if dtype is None:
    raise UserError(
      f'{path}: "{key}" has the unsupported type {part.get_dtype()}; '
      f'supported: {", ".join(_DTYPES)}'
    )

  def read() -> np.ndarray:
    with as_user_error(path, '.safetensors file'):
      return file.get_tensor(key)

  return LazyArray(tuple(part.get_shape()), np.dtype(dtype), read)


def write_safetensors(
  file: BinaryIO,
  shapes: Mapping[str, Any],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes a `.safetensors` file with one array in memory at a time.

  The library's writer needs all of them at once: too much for a large encoder.

  Args:
    file: opened for writing.
    shapes: {name: an object with .shape and .dtype}.
    read: name -> its array, of that shape and dtype; called in order of names.
  """
  names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
  header, at = {}, 0
  for name in sorted(shapes):
    dtype, shape = np.dtype(shapes[name].dtype), list(shapes[name].shape)
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = dict(dtype=names[dtype], shape=shape, data_offsets=[at, end])
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # values begin at a multiple of 8
  file.write(struct.pack('<Q', len(text)) + text)
  for name in header:
    array = np.ascontiguousarray(read(name))
    file.write(array.reshape(-1).view(np.uint8).data)


# ----------------------------------------------------------------------------
# A path to its reader.

# {ending: the content it means, as the first words of `_content`}.
_ZIP, _PICKLE, _SAFE = 'a zip archive', 'a pickle', 'safetensors'
_MEANT = {
  '.safetensors': (_SAFE,),
  '.npz': (_ZIP,),
  **dict.fromkeys(('.pt', '.pth', '.bin'), (_ZIP, _PICKLE)),
}
_INDEX = '.index.json'
# In a directory, the first of these that exists is read.
_DIRECTORY = (
  'model.safetensors.index.json',
  'model.safetensors',
  'pytorch_model.bin.index.json',
  'pytorch_model.bin',
  'diffusion_pytorch_model.safetensors.index.json',
  'diffusion_pytorch_model.safetensors',
)
_MAX_INDEX = 1 << 26


def open_weights(path: str | pathlib.Path) -> WeightFile:
  """{key: lazy array} of a file, an index of shards, or a directory.

  Args:
    path: `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin`; an index
      (`….index.json`) beside its shards; or a directory that holds
      `model.safetensors`, `pytorch_model.bin`, diffusers'
      `diffusion_pytorch_model.safetensors`, the index of one of these, or else
      exactly one `.safetensors` file.

  Raises:
    UserError: nothing there, or a file that is damaged or not what its name
      says.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if path.is_dir():
    path = _in_directory(path)
  if not path.is_file():
    raise UserError(f'no weights at {path}: there is no such file')
  if path.name.endswith(_INDEX):
    return _open_shards(path)
  if path.suffix not in _MEANT:
    raise UserError(
      f'{path}: "{path.suffix}" is not the ending of a weight format; there '
      f'are: {", ".join(_MEANT)}, {_INDEX}'
    )
  _check_content(path)
  if path.suffix == '.safetensors':
    return open_safetensors(path)
  if path.suffix == '.npz':
    return open_npz(path)
  from vqrae_jax.weights.torch import open_torch  # builds on this file

  return open_torch(path)


def _in_directory(path: pathlib.Path) -> pathlib.Path:
  for name in _DIRECTORY:
    if (path / name).is_file():
      return path / name
  found = sorted(path.glob('*.safetensors'))
  if not found:
    raise UserError(f'no weights in {path}: it has no {_DIRECTORY[1]}')
  if len(found) > 1:
    raise UserError(
      f'{path} holds {len(found)} .safetensors files and no {_DIRECTORY[0]}; '
      'name one of them'
    )
  return found[0]


def _content(head: bytes) -> str:
  """What a file is by its first bytes; '' if they do not show it."""
  if head.startswith(b'PK'):
    return f'{_ZIP} (.npz or .pt)'
  # A header length of eight bytes, then JSON.
  if head[8:9] == b'{':
    return f'{_SAFE} (.safetensors)'
  if head.startswith(b'\x80'):
    return f'{_PICKLE} (.pt, as PyTorch before 1.6 wrote it)'
  if b'ustar' in head[250:270]:
    return "a tar archive, PyTorch's first format, which only PyTorch reads"
  if head.startswith(b'version https://git-lfs'):
    return 'a Git LFS pointer, not the weights themselves'
  if head.lstrip().lower().startswith((b'<!doctype', b'<html')):
    return 'a web page, not weights'
  return ''


def _check_content(path: pathlib.Path) -> None:
  try:
    with path.open('rb') as file:
      head = file.read(512)
  except OSError as e:
    raise UserError(f'{path} cannot be opened: {e.strerror}') from None
  if not head:
    raise UserError(f'{path} is empty; download or save it again')
  meant, found = _MEANT[path.suffix], _content(head)
  # If the content is unknown, the reader raises the error.
  if found and not found.startswith(meant):
    raise UserError(
      f'{path} is {found}; a {path.suffix} file is {" or ".join(meant)}: '
      'rename it, or download or save it again'
    )


def _open_shards(path: pathlib.Path) -> WeightFile:
  """Each key from the shard that the index names; shards hold no other keys."""
  try:
    if path.stat().st_size > _MAX_INDEX:
      raise ValueError('too long')
    where = json.loads(path.read_bytes())['weight_map']
    names = sorted(set(where.values()))
    if any(pathlib.PurePath(name).name != name for name in names):
      raise ValueError('shards are files beside their index')
    if any(name.endswith(_INDEX) or not name for name in names):
      raise ValueError('an index is not a shard')
  except (OSError, *BAD_JSON) as e:
    raise UserError(
      f'{path} is not an index of shards ({printable(repr(e))}); it needs a '
      '"weight_map" of key to file name'
    ) from None
  shards = {}
  for name in names:
    if not (path.parent / name).is_file():
      raise UserError(
        f'{path} names {len(names)} shards, and {name} is missing; download it '
        f'into {path.parent}'
      )
    shards[name] = open_weights(path.parent / name)
  have = {key: name for name, shard in shards.items() for key in shard}
  wrong = [k for k in {**where, **have} if where.get(k) != have.get(k)]
  held = collections.Counter(key for shard in shards.values() for key in shard)
  wrong += [key for key, count in held.items() if count > 1]
  if wrong:
    raise UserError(
      f'{path} and its shards disagree on which holds "{printable(wrong[0])}"; '
      'download both again'
    )
  return WeightFile(
    str(path), {key: shards[name][key] for key, name in where.items()}
  )
