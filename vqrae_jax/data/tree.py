"""The files of a folder in depth, by kind; a large listing is kept.

Each real folder is searched once; links to folders are followed, so loops
end. The listing of a large tree is kept between runs (`cache.py`) and holds
as long as no folder of it has changed, which adding, removing and renaming
all do: then only folders are asked for their times, not a million files.
"""

import collections
import heapq
import os
from collections.abc import Iterable

import numpy as np

from vqrae_jax.data import cache
from vqrae_jax.data.decode import EXTENSIONS
from vqrae_jax.data.names import Names
from vqrae_jax.errors import UserError

# Smaller trees are listed as fast as a kept listing is checked.
_MIN_KEPT = 1000
# Kind: what a message calls it, the endings of its files.
KINDS = {
  'image': ('image files', EXTENSIONS),
  'tar': ('.tar shards', ('.tar',)),
  'record': ('ArrayRecord files', ('.array_record', '.arrayrecord')),
  'packed': (
    'compressed tars',
    ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4'),
  ),
}
_ENDINGS = [
  (kind, tuple(map(os.fsencode, ends))) for kind, (_, ends) in KINDS.items()
]


def kind_of(name: bytes) -> str | None:
  """The kind of a file by the end of its name."""
  # macOS leaves ._x.jpg beside x.jpg: no image.
  if name.startswith(b'._'):
    return None
  low = name.lower()
  return next((kind for kind, ends in _ENDINGS if low.endswith(ends)), None)


def ending(name: bytes) -> str:
  """A file's extension, as a message counts it."""
  return os.fsdecode(os.path.splitext(name)[1].lower()) or 'without extension'


def sorted_names(names: Iterable[bytes]) -> Names:
  """In the order of pathlib: part by part."""
  return Names.of(sorted(names, key=lambda n: n.replace(b'/', b'\0')))


def list_tree(path: str) -> tuple[dict, collections.Counter]:
  """({kind: names below the folder}, how many files of which other extension).

  Raises:
    UserError: a folder cannot be listed.
  """
  key = os.path.abspath(path)
  entry = cache.load('folder', key)
  if entry is not None and _unchanged(key, entry):
    kind = entry['kind'].tobytes().decode()
    names = Names(entry['names'], entry['name_ends'])
    return {kind: names}, collections.Counter()
  found, others, folders, stamps = _walk(key)
  found = {kind: names for kind, names in found.items() if names}
  # Of several kinds it is an error anyway.
  if len(found) == 1:
    ((kind, names),) = found.items()
    found = {kind: sorted_names(names)}
    if len(names) >= _MIN_KEPT:
      _keep(key, kind, found[kind], Names.of(folders), stamps)
  return found, others


def _keep(key, kind, names, folders, stamps):
  arrays = {
    'kind': np.frombuffer(kind.encode(), np.uint8),
    'names': names.blob,
    'name_ends': names.ends,
    'folders': folders.blob,
    'folder_ends': folders.ends,
    'stamps': np.array(stamps, np.int64),
  }
  changed = max(mtime for _, mtime, _ in stamps)
  cache.save('folder', key, arrays, changed=changed)


def _unchanged(root: str, entry) -> bool:
  folders = Names(entry['folders'], entry['folder_ends'])
  for folder, stamp in zip(folders, entry['stamps'].tolist(), strict=True):
    try:
      now = os.stat(os.path.join(root, folder))
    except OSError:
      return False
    if list(cache.stamp(now)) != stamp:
      return False
  return True


def _walk(root: str):
  """(found by kind, other extensions, folders, a stamp for each)."""
  found = {kind: [] for kind in KINDS}
  others = collections.Counter()
  folders, stamps, seen = [], [], set()
  top = os.fsencode(root)
  # Links wait until all real folders are listed: a folder goes by its own
  # path, and by the first link's only if no other leads to it.
  waiting, links = [b''], []
  while waiting or links:
    folder = waiting.pop() if waiting else heapq.heappop(links)
    where = os.path.join(top, folder) if folder else top
    try:
      # Before listing: a change meanwhile shows as another stamp later.
      status = os.stat(where)
      if (status.st_dev, status.st_ino) in seen:
        continue
      seen.add((status.st_dev, status.st_ino))
      with os.scandir(where) as entries:
        for entry in entries:
          name = os.path.join(folder, entry.name)
          if entry.is_dir(follow_symlinks=False):
            waiting.append(name)
          elif entry.is_file():
            kind = kind_of(entry.name)
            if kind:
              found[kind].append(name)
            else:
              others[ending(entry.name)] += 1
          elif entry.is_dir():
            heapq.heappush(links, name)
          elif entry.is_symlink():
            others['broken links'] += 1
    except OSError as e:
      raise UserError(
        f'cannot list the folder {os.fsdecode(where)}: {e.strerror}'
      ) from None
    folders.append(folder)
    stamps.append(cache.stamp(status))
  return found, others, folders, stamps
