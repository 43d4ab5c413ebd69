"""Photographs in tar shards, read at random by an index of offsets.

A shard's headers are read once (`tar_index.py`) and kept between runs; then a
photograph is one `pread` of its own bytes. No shard is ever read whole, and
members that are no images (.json, .cls, .pkl) are never read at all.
"""

import concurrent.futures
import io
import os
import pathlib
import threading

import numpy as np
from absl import logging

from vqrae_jax.data.cache import stamp
from vqrae_jax.data.decode import Unreadable
from vqrae_jax.data.encoded import EncodedImages
from vqrae_jax.data.listing import Listing
from vqrae_jax.data.names import Names
from vqrae_jax.data.tar_index import TarIndex, index_tar
from vqrae_jax.errors import UserError

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
      raise Unreadable(self._where(row), f'{size:,} bytes are too many')
    file, kept = self._file(self._shard(row))
    parts = []
    try:
      # Some file systems give less than asked.
      while size:
        # At an offset of the read's own: threads and forks share the file.
        part = os.pread(file.fileno(), size, offset)
        if not part:
          raise Unreadable(self._where(row), f'{size:,} bytes are missing')
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
