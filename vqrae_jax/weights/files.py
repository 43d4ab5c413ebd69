"""Lazy arrays by key: what every reader of weight files returns.

Opening a file reads names, shapes and types; `LazyArray.read` reads values, and
only those of the slice asked for. What it does not do: know a file format
(the readers beside it do) or a model (`rules.py`).
"""

import dataclasses
import io
import json
import math
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vqrae_jax.errors import UserError

# One (start, stop) per axis, with 0 <= start <= stop <= size.
Bounds = tuple[tuple[int, int], ...]


def printable(key: object) -> str:
  """A name out of a file, fit to stand in a line of an error."""
  line = ''.join(c if c.isprintable() else '?' for c in str(key)[:90])
  return line if len(line) < 90 else line + '…'


def bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> Bounds:
  """Slices of step one, as `jax.make_array_from_callback` gives them, as
  numbers; axes beyond the last slice are whole."""
  index = tuple(index or ())
  if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
    raise ValueError(f'{index} is no block of an array of shape {shape}')
  index += (slice(None),) * (len(shape) - len(index))
  pairs = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  return tuple((start, max(start, stop)) for start, stop in pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """An array in a file: its shape, its type, and how to read a block of it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Bounds], np.ndarray]

  def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
    """The block `index` (all of it: None), in the file's own type.

    Raises:
      UserError: the file is damaged there.
    """
    block = bounds(index, self.shape)
    shape = tuple(stop - start for start, stop in block)
    if 0 in shape:
      return np.zeros(shape, self.dtype)
    return self.fetch(block)


class WeightFile(Mapping):
  """{key: LazyArray} of one file or one set of shards.

  `name` is the file's, for errors; `note` says what was chosen in it and what
  was left out, for logs.
  """

  def __init__(
    self, name: str, handles: Mapping[str, LazyArray], note: str = ''
  ):
    self.name = name
    self.note = note
    self._handles = dict(handles)

  def __getitem__(self, key: str) -> LazyArray:
    return self._handles[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)

  def __repr__(self) -> str:
    return f'WeightFile({self.name!r}, {len(self)} arrays)'


def arrays(name: str, values: Mapping[str, np.ndarray]) -> WeightFile:
  """A source over arrays in memory, so that they pass the same checks."""

  def handle(value: np.ndarray) -> LazyArray:
    def fetch(block: Bounds) -> np.ndarray:
      return np.asarray(value[tuple(slice(*pair) for pair in block)])

    return LazyArray(tuple(value.shape), value.dtype, fetch)

  return WeightFile(name, {k: handle(np.asarray(v)) for k, v in values.items()})


def strided(
  read: Callable[[int, int], bytes],
  shape: Sequence[int],
  dtype: np.dtype,
  strides: Sequence[int],
  offset: int = 0,
  swap: bool = False,
) -> LazyArray:
  """An array of any strides inside a run of bytes.

  A block is read as the one range of bytes that spans it, so rows of a
  contiguous array cost what they weigh.

  Args:
    read: (first byte, last byte + 1) -> bytes.
    shape: the array's.
    dtype: native type of an element.
    strides: elements, not bytes, from one index to the next, not negative.
    offset: elements before the first.
    swap: whether the bytes of each element are in the other order.
  """
  size = dtype.itemsize
  word = np.dtype(f'<u{size}')

  def fetch(block: Bounds) -> np.ndarray:
    first = offset + sum(
      start * step for (start, _), step in zip(block, strides, strict=True)
    )
    counts = tuple(stop - start for start, stop in block)
    span = 1 + sum(
      (n - 1) * step for n, step in zip(counts, strides, strict=True)
    )
    flat = np.frombuffer(read(first * size, (first + span) * size), word)
    if swap:
      flat = flat.byteswap()
    view = np.lib.stride_tricks.as_strided(
      flat.view(dtype), counts, [s * size for s in strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(counts)

  return LazyArray(tuple(shape), dtype, fetch)


def extent(shape: Sequence[int], strides: Sequence[int], offset: int) -> int:
  """Elements from a storage's start to the end of a strided array in it."""
  if 0 in shape:
    return offset
  return (
    offset
    + 1
    + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
  )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
  """Strides, in elements, of a C-ordered array."""
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# ----------------------------------------------------------------------------
# Zip files that hold weights, read with suspicion: `.npz` and PyTorch's.
#
# Every member's name, size and place are checked when the archive is opened,
# before a byte of it is read; its CRC is checked over the whole member before
# the first byte is handed out. What it does not do: know what a member means.

# No published weight file comes near; a larger number is damage or malice.
MAX_MEMBER = 1 << 38
# Weights hardly compress; a member that grows more than this is a bomb. Small
# ones may: a megabyte of zeros is a plausible bias.
MAX_RATIO, RATIO_FREE = 100, 1 << 20
_CHUNK = 1 << 22

_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  OSError,
  EOFError,
  ValueError,
  IndexError,
  OverflowError,
  RuntimeError,  # a password is asked for
  NotImplementedError,  # an unknown compression
)


class Archive:
  """A zip file whose members all match one pattern of names."""

  def __init__(self, path: pathlib.Path, allowed: str, what: str):
    """Opens and checks.

    Args:
      path: the file.
      allowed: a regex that the whole of every member's name matches.
      what: the kind of file it should be, for the errors.
    """
    self.path, self.what = path, what
    self._sound: set[str] = set()
    try:
      self._zip = zipfile.ZipFile(path)
      infos = self._zip.infolist()
      held = path.stat().st_size
    except _DAMAGE as e:
      raise self._damaged(e) from None
    if not infos:
      raise UserError(f'{path} is an empty archive, no {what}')
    self._infos: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
      self._check(info, allowed)
      if info.filename in self._infos:
        raise UserError(f'{path} holds "{info.filename}" twice; no {what} does')
      self._infos[info.filename] = info
    if sum(i.compress_size for i in infos) > held:
      raise UserError(
        f'{path} is damaged: its members overlap; fetch or save it again'
      )

  def _check(self, info: zipfile.ZipInfo, allowed: str) -> None:
    name = info.filename
    parts = name.split('/')
    if name.startswith(('/', '\\')) or '..' in parts or '\\' in name:
      raise UserError(
        f'{self.path} holds "{printable(name)}", a path out of the archive; it is '
        f'no {self.what}'
      )
    if not re.fullmatch(allowed, name):
      raise UserError(
        f'{self.path} holds "{printable(name)}", which no {self.what} has; save '
        'the weights alone, best as .safetensors'
      )
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
      raise UserError(
        f'{self.path}: "{name}" is compressed in an unknown way; save it again'
      )
    if info.flag_bits & 1:
      raise UserError(f'{self.path} is encrypted; save it without a password')
    if info.file_size > MAX_MEMBER:
      raise UserError(
        f'{self.path}: "{name}" claims {info.file_size} bytes, more than any '
        'weight; the file is damaged or not to be trusted'
      )
    if stored and info.file_size != info.compress_size:
      raise UserError(
        f'{self.path} is damaged: "{name}" has two sizes; fetch it again'
      )
    if info.file_size > RATIO_FREE + MAX_RATIO * info.compress_size:
      raise UserError(
        f'{self.path}: "{name}" would grow from {info.compress_size} to '
        f'{info.file_size} bytes, as no weight does; save it uncompressed'
      )

  def _damaged(self, reason: BaseException) -> UserError:
    words = ' '.join(str(reason).split())[:120] or type(reason).__name__
    return UserError(
      f'{self.path} is truncated or damaged, no whole {self.what} ({words}); '
      'fetch or save it again'
    )

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self._infos)

  def size(self, name: str) -> int:
    return self._infos[name].file_size

  def head(self, name: str, count: int) -> bytes:
    """The first `count` bytes, whose CRC is not checked yet."""
    try:
      with self._zip.open(self._infos[name]) as member:
        return member.read(count)
    except _DAMAGE as e:
      raise self._damaged(e) from None

  def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a member whose CRC is right.

    Raises:
      UserError: the member is damaged.
    """
    info = self._infos[name]
    stop = info.file_size if stop is None else stop
    try:
      if name in self._sound and info.compress_type == zipfile.ZIP_STORED:
        found = self._seek(info, start, stop)
      else:
        found = self._stream(info, start, stop)
    except _DAMAGE as e:
      raise self._damaged(e) from None
    if len(found) != stop - start:
      raise self._damaged(EOFError(f'"{name}" ends early'))
    self._sound.add(name)
    return found

  def _stream(self, info: zipfile.ZipInfo, start: int, stop: int) -> bytes:
    """Reads the whole member, for its CRC, and keeps the part."""
    kept, at = [], 0
    with self._zip.open(info) as member:
      while chunk := member.read(_CHUNK):
        low, high = max(start - at, 0), min(stop - at, len(chunk))
        if low < high:
          kept.append(chunk[low:high])
        at += len(chunk)
    return b''.join(kept)

  def _seek(self, info: zipfile.ZipInfo, start: int, stop: int) -> bytes:
    """Reads a part of a stored member straight from the file."""
    with self.path.open('rb') as file:
      # The local header: 30 bytes, then a name and an extra field of lengths
      # that its last four bytes give.
      file.seek(info.header_offset + 26)
      name, extra = struct.unpack('<HH', file.read(4))
      file.seek(info.header_offset + 30 + name + extra + start)
      return file.read(stop - start)


# ----------------------------------------------------------------------------
# `.npz` weights, as big_vision publishes them: keys with "/", no pickle.
#
# A member's header gives its shape and type; values are read when asked for.
# bfloat16, which NumPy stores as two nameless bytes, is recognised.

_NAMES = r'[^\0]+\.npy'
_HEADER = 1 << 14


def open_npz(path: pathlib.Path) -> WeightFile:
  """The arrays of one `.npz`, by name.

  Raises:
    UserError: no whole `.npz`, or one that holds Python objects.
  """
  archive = Archive(path, _NAMES, '.npz file of arrays')
  found = {
    name.removesuffix('.npy'): _handle(archive, name) for name in archive.names
  }
  return WeightFile(str(path), found)


def _handle(archive: Archive, name: str) -> LazyArray:
  head = io.BytesIO(archive.head(name, _HEADER))
  where = f'{archive.path}: "{name.removesuffix(".npy")}"'
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  try:
    read = readers[np.lib.format.read_magic(head)]
    shape, fortran, dtype = read(head)
  except (ValueError, KeyError, EOFError, SyntaxError) as e:
    words = ' '.join(str(e).split())[:100]
    raise UserError(f'{where} is no array ({words}); save it again') from None
  if dtype.hasobject:
    raise UserError(
      f'{where} holds Python objects, which could run code; save arrays of '
      'numbers, each under its own name'
    )
  swap = dtype.byteorder == '>'
  if dtype == np.dtype('V2'):
    dtype = np.dtype(ml_dtypes.bfloat16)
  elif dtype.kind not in 'biuf' or dtype.itemsize > 8:
    raise UserError(f'{where} is of type {dtype}; weights are plain numbers')
  else:
    dtype = dtype.newbyteorder('=')
  start = head.tell()
  if archive.size(name) != start + math.prod(shape) * dtype.itemsize:
    raise UserError(
      f'{where} has a header for shape {shape} and another number of bytes; '
      'the file is damaged, fetch it again'
    )
  strides = row_major(shape)
  if fortran:
    strides = row_major(shape[::-1])[::-1]
  return strided(
    lambda first, last: archive.read(name, start + first, start + last),
    shape,
    dtype,
    strides,
    swap=swap,
  )


# ----------------------------------------------------------------------------
# `.safetensors` weights: one file, or shards under an index.
#
# The library reads the header at opening and maps the rest; a block is sliced
# out of the map. Shards are whole only together: the index names every key's
# file, and both are compared before a value is read. Writing goes array by
# array too: the library would want all of them at once.

# The format's names of types that weights have.
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
    UserError: no whole file of this format.
  """
  try:
    file = safe_open(str(path), framework='numpy')
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError, ValueError) as e:
    words = ' '.join(str(e).split())[:120]
    raise UserError(
      f'{path} is truncated or damaged, no whole .safetensors file ({words}); '
      'fetch or save it again'
    ) from None
  found = {
    k: _safetensors_handle(path, file, k, part) for k, part in slices.items()
  }
  return WeightFile(str(path), found)


def _safetensors_handle(path: pathlib.Path, file, key: str, part) -> LazyArray:
  dtype = _DTYPES.get(part.get_dtype())
  if dtype is None:
    raise UserError(
      f'{path}: "{key}" is of type {part.get_dtype()}, which is not read; '
      f'there are: {", ".join(_DTYPES)}'
    )

  def fetch(block: Bounds) -> np.ndarray:
    try:
      if not block:
        return np.asarray(file.get_tensor(key))
      return np.asarray(part[tuple(slice(*pair) for pair in block)])
    except (SafetensorError, OSError, ValueError) as e:
      words = ' '.join(str(e).split())[:120]
      raise UserError(f'{path}: "{key}" cannot be read ({words})') from None

  return LazyArray(tuple(part.get_shape()), np.dtype(dtype), fetch)


def write_safetensors(
  path: pathlib.Path,
  shapes: Mapping[str, Any],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes one `.safetensors` file; no two of its arrays are held at once.

  Args:
    path: the file, replaced if it is there.
    shapes: {name: has .shape and .dtype}.
    read: name -> its array, of that shape and type; called in order of names.
  """
  words = {np.dtype(dtype): word for word, dtype in _DTYPES.items()}
  header, at = {}, 0
  for name in sorted(shapes):
    dtype = np.dtype(shapes[name].dtype)
    shape = [int(n) for n in shapes[name].shape]
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = dict(dtype=words[dtype], shape=shape, data_offsets=[at, end])
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # values begin at a multiple of 8
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, told in header.items():
      array = read(name)
      same = list(array.shape) == told['shape']
      if not same or array.dtype != np.dtype(shapes[name].dtype):
        raise ValueError(f'{name} is {array.dtype}{array.shape}, not {told}')
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
