"""Images in tar shards, read at random by an index of offsets.

A shard's headers are read once and their index is cached between runs; after
that an image is one `pread` of its own bytes. Of other members (.json, .txt,
.pkl) only the digits of a label are read.

A sample is a sequence of members with one key, the name up to the first dot of
its last part (the webdataset layout). Its image is the member whose extension
is that of an image; without one, every member that ends in such an extension is
an image. Its label is the integer in its .cls member, as text.
"""

import concurrent.futures
import gzip
import hashlib
import json
import os
import pathlib
import tarfile
import time
from collections.abc import Iterator

from absl import logging

from vqrae_jax.data.decode import EncodedImages, NoImageError, read_bytes
from vqrae_jax.data.listing import EXTENSIONS, Listing
from vqrae_jax.errors import UserError
from vqrae_jax.files import atomic_write
from vqrae_jax.paths import cache_folder

# A file that changes again within a tick of the file system's clock keeps its
# stamp, so the index of a younger file is not cached. The coarsest clock (FAT)
# ticks every two seconds.
_SETTLED_NS = 2_000_000_000
_DIGITS = 18  # every number of this many fits an int64

Member = tuple[str, int, int]  # name, offset and size of its data
Sample = tuple[str, int, int, int | None]  # its image's member, its label
Stamp = list[int]


class _Damaged(Exception):
  """The tar cannot be read any further."""


def _stamp(status: os.stat_result) -> Stamp:
  """Size and times of a file, which change with it."""
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def walk(path: str) -> Iterator[Member]:
  """The regular members of a tar, except sparse ones, by headers alone.

  Raises:
    _Damaged: after yielding the members before the damage.
    OSError: the file cannot be read.
  """
  end, offset = os.path.getsize(path), 0
  try:
    with tarfile.open(path, 'r:') as file:
      for member in file:
        after = member.offset_data + member.size
        if member.size < 0 or file.offset <= offset:
          raise _Damaged(f'no header of a tar at byte {offset:,}')
        offset = file.offset
        if member.isreg() and after > end:
          raise _Damaged(f'it ends inside a member at byte {end:,}')
        if member.isreg() and not member.issparse():
          yield member.name, member.offset_data, member.size
      # tarfile treats any block that is not a header as the end.
      file.fileobj.seek(file.offset)
      if file.fileobj.read(tarfile.BLOCKSIZE).strip(b'\0'):
        raise _Damaged(f'no header of a tar at byte {file.offset:,}')
  except (OSError, _Damaged):
    raise
  # Damaged headers raise more than tarfile's own errors: sizes beyond any
  # memory, invalid numbers, endless chains of headers.
  except Exception as e:
    raise _Damaged(str(e) or type(e).__name__) from None


def images_in(path: str) -> tuple[list[Sample], str]:
  """(the images, one or more per sample, why reading ended early or '')."""
  images, damage = [], ''
  sample, exact, loose, label = None, [], [], None

  def found():
    # A sample's own image, not 1.mask.png beside 1.jpg; if all have two dots (a
    # folder of photo.1.jpg, photo.2.jpg), each is an image.
    return [(*member, label) for member in exact[:1] or loose]

  with open(path, 'rb', buffering=0) as file:
    try:
      for member in walk(path):
        name, offset, size = member
        folder, _, base = name.rpartition('/')
        stem, dot, rest = base.partition('.')
        if (folder, stem) != sample:
          images += found()
          sample, exact, loose, label = (folder, stem), [], [], None
        extension = (dot + rest).lower()
        if stem and extension in EXTENSIONS:
          exact.append(member)
        elif stem and extension.endswith(EXTENSIONS):
          loose.append(member)
        elif extension == '.cls' and size <= _DIGITS:
          label = _number(os.pread(file.fileno(), size, offset))
    except _Damaged as e:
      damage = str(e)
  return images + found(), damage


def _number(text: bytes) -> int | None:
  try:
    return int(text)
  except ValueError:
    return None


# ----------------------------------------------------------------------------
# Indices are cached as checksummed JSON. An entry that is missing or damaged or
# has another stamp is rebuilt; a folder that cannot be written costs time only.


def _entry(path: str) -> pathlib.Path:
  name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
  # Entries without labels were called tar-….
  return cache_folder() / f'tar2-{name}.json.gz'


def _load(path: str, stamp: Stamp) -> list[Sample] | None:
  try:
    key, saved, rows = json.loads(gzip.decompress(_entry(path).read_bytes()))
    images = [
      (str(name), int(offset), int(size), None if label is None else int(label))
      for name, offset, size, label in rows
    ]
  except Exception:  # Damaged bytes raise anything.
    return None
  return images if [key, saved] == [path, stamp] else None


def _save(path: str, stamp: Stamp, images: list[Sample]) -> None:
  if time.time_ns() - stamp[1] < _SETTLED_NS:
    return
  entry = _entry(path)
  data = gzip.compress(json.dumps([path, stamp, images]).encode(), 1)
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(entry) as file:
      file.write(data)
  except OSError as e:
    logging.warning('the index of %s is not cached: %s', path, e.strerror)


def _index(path: pathlib.Path) -> tuple[list[Sample], Stamp, str]:
  """A shard's images, its stamp, and why reading ended early or ''."""
  key, damage = os.path.abspath(path), ''
  try:
    stamp = _stamp(os.stat(key))
    images = _load(key, stamp)
    if images is None:
      images, damage = images_in(key)
      if images and not damage:
        _save(key, stamp, images)
  except OSError as e:
    raise UserError(f'cannot read the tar {path}: {e.strerror}') from None
  if damage:  # Not cached: each start reads it and warns again.
    logging.warning(
      'the tar %s is damaged: %s; its %d images before that are used',
      path, damage, len(images),
    )  # fmt: skip
  return images, stamp, damage


class TarShards(EncodedImages):
  """The images of many tars, shard after shard.

  `name(i)` is "shard.tar:member"; `names` are the samples' keys without
  their folder.
  """

  def __init__(self, listing: Listing):
    """Indexes every shard.

    Raises:
      NoImageError: no image in any.
      UserError: a shard that cannot be opened.
    """
    # Threads help if the shards are on a network file system.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      found = list(pool.map(_index, listing.paths))
    images, self._stamps, damage = zip(*found, strict=True)
    self.damaged = {
      name: why for name, why in zip(listing.names, damage, strict=True) if why
    }
    super().__init__(listing, [len(shard) for shard in images])
    self._samples = [sample for shard in images for sample in shard]
    if not self._samples:
      first, held = str(self.paths[0]), damage[0]
      if not held:
        ends = sorted({os.path.splitext(name)[1] for name, *_ in walk(first)})
        held = f'it holds {", ".join(ends) or "nothing"}'
      raise NoImageError(
        f'the tar {first} (of {len(self.paths)}) holds no image, no member '
        f'such as KEY.jpg or KEY.png: {held}'
      )

  def _name(self, row: int) -> str:
    shard, _ = self._place(row)
    return f'{self._listing.names[shard]}:{self._key(row)}'

  def _key(self, row: int) -> str:
    return self._samples[row][0]

  def _title(self, row: int) -> str:
    return pathlib.PurePath(self._key(row)).name.split('.')[0]

  def _label(self, row: int) -> int | None:
    return self._samples[row][3]

  def _bytes(self, row: int) -> bytes:
    _, offset, size, _ = self._samples[row]
    shard, _ = self._place(row)
    path = os.path.join(self._listing.root, self._listing.names[shard])
    try:
      file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
      raise UserError(
        f'the shard {path} is gone since it was indexed'
      ) from None
    try:
      if _stamp(os.fstat(file)) != self._stamps[shard]:
        raise UserError(
          f'the shard {path} has changed since it was indexed; start again'
        )
      return read_bytes(file, offset, size, self._where(row))
    finally:
      os.close(file)
