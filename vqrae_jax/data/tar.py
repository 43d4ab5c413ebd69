"""ImageSource in tar shards, read at random by an index of offsets.

A shard's headers are read once (`tar_index.py`) and kept between runs; then a
photograph is one `pread` of its own bytes. No shard is ever read whole, and
members that are no images (.json, .cls, .pkl) are never read at all.
"""

import concurrent.futures
import dataclasses
import io
import os
import pathlib
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from absl import logging

from vqrae_jax.data import tree
from vqrae_jax.data.decode import EXTENSIONS, EncodedImages, ImageDecodeError
from vqrae_jax.data.tree import Listing, Names, stamp
from vqrae_jax.errors import UserError

# ----------------------------------------------------------------------------
# The images in a tar: their names, offsets and sizes, by headers alone.
#
# Reads the formats that tar programs write (POSIX ustar and pax, GNU, old V7;
# POSIX.1-2017, pax utility) at 5 us a member, where the standard library's
# `tarfile` takes 16 (one core, 2026-11). Only headers are read: a member's data
# are never opened here, whatever it is.
#
# A sample is a run of members of one key, the name up to the first dot of its
# last part (the webdataset layout); its image is the member whose extension is
# one of images.

_BLOCK = 512
_REGULAR = (b'0', b'\0', b'7')
# Links, devices, folders and pipes have no data, whatever size they state.
_BARE = (b'1', b'2', b'3', b'4', b'5', b'6')
# GNU's long name and long link, pax for one member and for all.
_ABOUT_NEXT = (b'L', b'K', b'x', b'g')
# A header that describes the next is text of a few lines.
_MAX_TEXT = 1 << 20
# Fewer than in a folder: each header may be a round trip across a network.
_MIN_KEPT = 100
_IMAGES = tuple(os.fsencode(e) for e in EXTENSIONS)


class Damaged(Exception):
  """The tar cannot be read on from here."""


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """The images of one tar.

  Attributes:
    names: of the members.
    offsets, sizes: int64 [n], of their data.
    stamp: of the file when it was read (`cache.stamp`).
    damage: why reading ended early, or ''.
    others: extensions that the other members have.
  """

  names: Names
  offsets: np.ndarray
  sizes: np.ndarray
  stamp: tuple[int, int, int]
  damage: str = ''
  others: tuple[str, ...] = ()


def index_tar(path: str) -> TarIndex:
  """The index of a tar, from the cache where the tar has not changed.

  Raises:
    OSError: the file cannot be read.
  """
  key = os.path.abspath(path)
  status = os.stat(key)
  stamp = tree.stamp(status)
  entry = tree.load('tar', key)
  if entry is not None and tuple(entry['stamp']) == stamp:
    names = Names(entry['names'], entry['name_ends'])
    return TarIndex(names, entry['offsets'], entry['sizes'], stamp)
  with open(key, 'rb') as file:
    index = _read(file, stamp)
  # A damaged tar is read, and warned of, at every start.
  if not index.damage and len(index.names) >= _MIN_KEPT:
    arrays = {
      'names': index.names.blob,
      'name_ends': index.names.ends,
      'offsets': index.offsets,
      'sizes': index.sizes,
      'stamp': np.array(stamp, np.int64),
    }
    tree.save('tar', key, arrays, changed=status.st_mtime_ns)
  return index


def _read(file: io.IOBase, stamp) -> TarIndex:
  kept: list[tuple[bytes, int, int]] = []
  others: set[str] = set()
  damage = ''
  key, exact, loose = None, [], []
  members = walk(file, stamp[0])
  while True:
    try:
      member = next(members, None)
    except Damaged as e:
      damage, member = str(e), None
    name = member[0] if member else b''
    folder, _, base = name.rpartition(b'/')
    stem, dot, rest = base.partition(b'.')
    if member is None or (folder, stem) != key:
      # A sample's own image, not 1.mask.png beside 1.jpg; where all have two
      # dots (a folder of photo.1.jpg, photo.2.jpg), each is an image.
      kept += exact[:1] or loose
      key, exact, loose = (folder, stem), [], []
    if member is None:
      break
    extension = (dot + rest).lower()
    if stem and extension in _IMAGES:
      exact.append(member)
    elif stem and extension.endswith(_IMAGES):
      loose.append(member)
    else:
      others.add(os.fsdecode(extension) or 'no extension')
  return TarIndex(
    Names.of(name for name, _, _ in kept),
    np.fromiter((offset for _, offset, _ in kept), np.int64, len(kept)),
    np.fromiter((size for _, _, size in kept), np.int64, len(kept)),
    stamp,
    damage,
    tuple(sorted(others)),
  )


def walk(file: io.IOBase, end: int) -> Iterator[tuple[bytes, int, int]]:
  """(name, offset, size) of the regular members of a tar of `end` bytes.

  Raises:
    Damaged: after the members before the damage.
  """
  at, told = 0, {}
  while True:
    file.seek(at)
    header = file.read(_BLOCK)
    if not header.strip(b'\0'):
      return  # The end mark, or no more bytes.
    if len(header) < _BLOCK:
      raise Damaged(f'it ends inside a header at byte {at:,}')
    _check(header, at)
    kind, data = header[156:157], at + _BLOCK
    size = _number(header[124:136], at)
    if kind not in _ABOUT_NEXT:
      size = told.pop(b'size', size)
    if kind == b'S' and header[482]:
      data = _after_sparse_map(file, data)
    at = data if kind in _BARE else data + -(-size // _BLOCK) * _BLOCK
    if kind in _ABOUT_NEXT:
      if size > _MAX_TEXT:
        raise Damaged(f'a header of {size:,} bytes at byte {data:,}')
      text = file.read(size)
      if len(text) < size:
        raise Damaged(f'it ends inside a header at byte {data:,}')
      if kind == b'L':
        told[b'path'] = text.rstrip(b'\0')
      elif kind == b'x':
        told |= _pax(text, data)
      continue
    if data + size > end and kind not in _BARE:
      raise Damaged(f'it ends inside a member at byte {end:,}')
    sparse = any(k.startswith(b'GNU.sparse') for k in told)
    name = told.get(b'path') or _name(header)
    told = {}
    # Before POSIX a folder was a file whose name ends in a slash.
    if kind in _REGULAR and not sparse and not name.endswith(b'/'):
      yield name, data, size


def _check(header: bytes, at: int) -> None:
  """The header's own checksum, its eight bytes counted as blanks."""
  # Adler-32's low half is 1 + the sum of the bytes, modulo 65521; summing 512
  # bytes in Python is half of the time of a walk.
  total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 0x20
  if (total - _number(header[148:156], at)) % 65521:
    raise Damaged(f'no header of a tar at byte {at:,}')


def _number(field: bytes, at: int) -> int:
  """Octal, or GNU's base 256 for what octal cannot hold."""
  if field[0] == 0x80:
    return int.from_bytes(field[1:], 'big')
  text = field.split(b'\0')[0].strip()
  if text and not text.isdigit():
    raise Damaged(f'no header of a tar at byte {at:,}')
  try:
    return int(text or b'0', 8)
  except ValueError:
    raise Damaged(f'no header of a tar at byte {at:,}') from None


def _name(header: bytes) -> bytes:
  name = header[:100].split(b'\0')[0]
  # GNU keeps times where POSIX keeps the folder.
  prefix = header[345:500].split(b'\0')[0]
  posix = header[257:263] == b'ustar\0'
  return prefix + b'/' + name if posix and prefix else name


def _after_sparse_map(file: io.IOBase, data: int) -> int:
  file.seek(data)
  while True:
    block, data = file.read(_BLOCK), data + _BLOCK
    if len(block) < _BLOCK:
      raise Damaged(f'it ends inside a header at byte {data:,}')
    if not block[504]:
      return data


def _pax(text: bytes, at: int) -> dict:
  """The records "LENGTH KEY=VALUE\\n" of a pax header; size as an int."""
  told = {}
  while text.strip(b'\0'):
    try:
      length = int(text[: text.index(b' ')])
      key, value = text[text.index(b' ') + 1 : length - 1].split(b'=', 1)
      if key == b'size':
        value = abs(int(value))
    except ValueError:
      raise Damaged(f'no header of a tar at byte {at:,}') from None
    told[key], text = value, text[max(length, 1) :]
  return told


# Shards held open, well below the usual limit of 1024 files; those beyond
# are opened for each read.
_MAX_OPEN = 256
# What the most pixels that are decoded could take, uncompressed.
_MAX_BYTES = 1 << 30


class TarShards(EncodedImages):
  """The images of many tars, shard after shard.

  `name(i)` is "shard.tar:member"; `names` are the samples' keys.
  """

  def __init__(self, listing: Listing):
    """Indexes every shard.

    Raises:
      UserError: no image in any, or a shard that cannot be opened.
    """
    self.paths = listing.paths
    self._shards = listing.names
    # Threads help where shards lie across a network.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      indices = list(pool.map(_index, self.paths))
    if not any(len(index.names) for index in indices):
      raise UserError(_no_images(self.paths, indices))
    self._stamps = [index.stamp for index in indices]
    self._starts = np.cumsum([0, *(len(index.names) for index in indices)])
    self._members = Names.joined(index.names for index in indices)
    self._offsets = np.concatenate([index.offsets for index in indices])
    self._sizes = np.concatenate([index.sizes for index in indices])
    super().__init__(len(self._members))
    self._opened: dict[int, io.FileIO] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    """Without open files: a process opens its own."""
    return self.__dict__ | {'_opened': {}, '_lock': None}

  def __setstate__(self, state):
    self.__dict__ |= state | {'_lock': threading.Lock()}

  def _shard(self, row: int) -> int:
    return int(np.searchsorted(self._starts, row, side='right')) - 1

  def _name(self, row: int) -> str:
    return f'{self._shards[self._shard(row)]}:{self._members[row]}'

  def _title(self, row: int) -> str:
    return pathlib.PurePath(self._members[row]).name.split('.')[0]

  def _where(self, row: int) -> str:
    return f'{self.paths[self._shard(row)]}:{self._members[row]}'

  def _open(self, row: int) -> io.BytesIO:
    offset, size = int(self._offsets[row]), int(self._sizes[row])
    if size > _MAX_BYTES:
      raise ImageDecodeError(self._where(row), f'{size:,} bytes are too many')
    file, kept = self._file(self._shard(row))
    parts = []
    try:
      # Some file systems give less than asked.
      while size:
        # At an offset of the read's own: threads and forks share the file.
        part = os.pread(file.fileno(), size, offset)
        if not part:
          raise ImageDecodeError(
            self._where(row), f'{size:,} bytes are missing'
          )
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    finally:
      if not kept:
        file.close()
    return io.BytesIO(b''.join(parts))

  def _file(self, shard: int) -> tuple[io.FileIO, bool]:
    """(the open shard, whether it stays open)."""
    file = self._opened.get(shard)
    if file is not None:
      return file, True
    path = self.paths[shard]
    try:
      file = io.FileIO(path)
    except FileNotFoundError:
      raise UserError(
        f'the shard {path} is gone since it was indexed'
      ) from None
    if stamp(os.fstat(file.fileno())) != self._stamps[shard]:
      file.close()
      raise UserError(
        f'the shard {path} has changed since it was indexed; start again'
      )
    with self._lock:
      if shard not in self._opened and len(self._opened) < _MAX_OPEN:
        self._opened[shard] = file
        return file, True
    return file, False


def _index(path: pathlib.Path) -> TarIndex:
  try:
    index = index_tar(str(path))
  except OSError as e:
    raise UserError(f'cannot read the tar {path}: {e.strerror}') from None
  if index.damage:
    logging.warning(
      'the tar %s is damaged: %s; its %d images before that are used',
      path,
      index.damage,
      len(index.names),
    )
  return index


def _no_images(paths, indices) -> str:
  if len(paths) == 1 and indices[0].damage:
    return f'the tar {paths[0]} holds no image: {indices[0].damage}'
  others = sorted({end for index in indices for end in index.others})
  held = ', '.join(others[:8]) or 'nothing'
  what = f'the tar {paths[0]}'
  if len(paths) > 1:
    what += f' and {len(paths) - 1:,} others'
  return (
    f'{what}: no image inside; wanted are members such as KEY.jpg or KEY.png, '
    f'and it holds {held}'
  )
