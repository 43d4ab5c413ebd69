"""The images in a tar: their names, offsets and sizes, by headers alone.

Reads the formats that tar programs write (POSIX ustar and pax, GNU, old V7;
POSIX.1-2017, pax utility) at 5 us a member, where the standard library's
`tarfile` takes 16 (one core, 2026-11). Only headers are read: a member's data
are never opened here, whatever it is.

A sample is a run of members of one key, the name up to the first dot of its
last part (the webdataset layout); its image is the member whose extension is
one of images.
"""

import dataclasses
import io
import os
import zlib
from collections.abc import Iterator

import numpy as np

from vqrae_jax.data import cache
from vqrae_jax.data.decode import EXTENSIONS
from vqrae_jax.data.names import Names

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
  stamp = cache.stamp(status)
  entry = cache.load('tar', key)
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
    cache.save('tar', key, arrays, changed=status.st_mtime_ns)
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
