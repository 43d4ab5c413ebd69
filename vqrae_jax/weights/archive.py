"""Zip files that hold weights, read with suspicion: `.npz` and PyTorch's.

Every member's name, size and place are checked when the archive is opened,
before a byte of it is read; its CRC is checked over the whole member before
the first byte is handed out. What it does not do: know what a member means.
"""

import pathlib
import re
import struct
import zipfile
import zlib

from vqrae_jax.errors import UserError
from vqrae_jax.weights.handles import shown

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
        f'{self.path} holds "{shown(name)}", a path out of the archive; it is '
        f'no {self.what}'
      )
    if not re.fullmatch(allowed, name):
      raise UserError(
        f'{self.path} holds "{shown(name)}", which no {self.what} has; save '
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
