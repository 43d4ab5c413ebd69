"""The files of a folder in depth, by kind; a large listing is kept.

Each real folder is searched once; links to folders are followed, so loops
end. The listing of a large tree is kept between runs (`cache.py`) and holds
as long as no folder of it has changed, which adding, removing and renaming
all do: then only folders are asked for their times, not a million files.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import heapq
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np

from vqrae_jax.data.decode import EXTENSIONS
from vqrae_jax.errors import UserError
from vqrae_jax.paths import cache_folder

# ----------------------------------------------------------------------------
# Many short strings in two arrays: a million names in tens of megabytes.


class Names:
  """An immutable list of names, kept as one blob of bytes.

  Bytes that are no UTF-8 come back as the surrogates that `os` uses for them,
  so that a name read from a folder opens the file it came from.
  """

  def __init__(self, blob: np.ndarray, ends: np.ndarray):
    """uint8 [bytes] all names, one after another; int64 [n] where each ends."""
    self.blob, self.ends = blob, ends

  @classmethod
  def of(cls, names: Iterable[bytes]) -> 'Names':
    """Names from their bytes."""
    names = list(names)
    blob = np.frombuffer(b''.join(names), np.uint8)
    lengths = np.fromiter((len(n) for n in names), np.int64, len(names))
    return cls(blob, np.cumsum(lengths))

  @classmethod
  def joined(cls, parts: 'Iterable[Names]') -> 'Names':
    """One list after another."""
    parts = list(parts)
    starts = np.cumsum([0, *(len(p.blob) for p in parts)])
    ends = [p.ends + s for p, s in zip(parts, starts[:-1], strict=True)]
    return cls(
      np.concatenate([np.zeros(0, np.uint8), *(p.blob for p in parts)]),
      np.concatenate([np.zeros(0, np.int64), *ends]),
    )

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    start = self.ends[index - 1] if index else 0
    return (
      self.blob[start : self.ends[index]]
      .tobytes()
      .decode('utf8', 'surrogateescape')
    )

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))


# ----------------------------------------------------------------------------
# Listings and indices kept between runs, as arrays, never as pickles.
#
# They lie in `paths.cache_folder()`. An entry carries the key it was made for
# and the stamps of the files it describes; one that is missing, damaged or of
# other stamps is simply made anew, and a folder that cannot be written costs
# time only.

# A file changed again within its clock's tick has the same stamp: what is
# younger than this is not kept. Two seconds is the coarsest clock (FAT's).
_SETTLED_NS = 2_000_000_000
_VERSION = 1


def stamp(status: os.stat_result) -> tuple[int, int, int]:
  """What changes when a file or a folder does."""
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _path(kind: str, key: str) -> pathlib.Path:
  name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
  return cache_folder() / f'{kind}-{name}.npz'


def load(kind: str, key: str) -> dict[str, np.ndarray] | None:
  """The arrays saved for this kind and key, or None.

  Every byte passes the archive's checksums; the caller compares stamps.
  """
  try:
    with np.load(_path(kind, key), allow_pickle=False) as entry:
      arrays = {name: entry[name] for name in entry.files}
    of = arrays.pop('key').tobytes(), int(arrays.pop('version'))
  except Exception:  # A damaged zip raises anything; it is made anew.
    return None
  return arrays if of == (os.fsencode(key), _VERSION) else None


def save(
  kind: str, key: str, arrays: dict[str, np.ndarray], *, changed: int
) -> None:
  """Keeps arrays, unless that is not safe or not possible.

  Args:
    kind, key: what `load` will ask for.
    arrays: of plain types.
    changed: the latest change of what they describe, in ns since the epoch.
  """
  if time.time_ns() - changed < _SETTLED_NS:
    return
  path = _path(kind, key)
  arrays = arrays | {
    'key': np.frombuffer(os.fsencode(key), np.uint8),
    'version': np.int64(_VERSION),
  }
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: many hosts may write the same entry.
    with tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=path.stem, suffix='.tmp', delete=False
    ) as file:
      temporary = file.name
      np.savez(file, **arrays)
    os.replace(temporary, path)
  except OSError:
    if temporary:
      with contextlib.suppress(OSError):
        os.unlink(temporary)


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
  entry = load('folder', key)
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
  save('folder', key, arrays, changed=changed)


def _unchanged(root: str, entry) -> bool:
  folders = Names(entry['folders'], entry['folder_ends'])
  for folder, stamp in zip(folders, entry['stamps'].tolist(), strict=True):
    try:
      now = os.stat(os.path.join(root, folder))
    except OSError:
      return False
    if list(stamp(now)) != stamp:
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
    stamps.append(stamp(status))
  return found, others, folders, stamps


# ----------------------------------------------------------------------------
# Which files a `DATA` word names, and of which kind; nothing is opened.
#
# Folders are searched in depth (`tree.py`); braces and globs are written out
# here, and what they name must be of one kind.

_MAX_BRACES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Listing:
  """Files of one kind below a folder, sorted as paths are.

  Attributes:
    root: the folder.
    names: paths relative to it.
    kind: a key of `KINDS`.
  """

  root: pathlib.Path
  names: Names
  kind: str

  @property
  def paths(self) -> list[pathlib.Path]:
    """The whole paths."""
    return [self.root / name for name in self.names]


def list_data(data: str) -> Listing:
  """The files that a folder, a file, a glob or a brace pattern names.

  Raises:
    UserError: nothing there, nothing of a known kind, or of several kinds.
  """
  if '://' in data:
    raise UserError(
      f'data "{data}" is a URL; name files of this machine (mount the bucket, '
      'or download it)'
    )
  path = os.path.expanduser(data)
  if os.path.isdir(path):
    found, others = list_tree(path)
    return _of_one_kind(data, pathlib.Path(path), found, others)
  if os.path.isfile(path):
    matches = [path]
  else:
    matches = [m for word in braces(path) for m in _matches(data, path, word)]
  # A pattern may name a file twice.
  files = {os.fsencode(m) for m in matches if os.path.isfile(m)}
  root, names = _below(sorted(files))
  found = {kind: [] for kind in KINDS}
  others = collections.Counter()
  for name in names:
    kind = kind_of(os.path.basename(name))
    if kind:
      found[kind].append(name)
    else:
      others[ending(name)] += 1
  if not files:
    others['folders'] = len(matches)
  return _of_one_kind(data, root, found, others)


def _matches(data: str, path: str, word: str) -> list[str]:
  found = glob.glob(word, recursive=True)
  if not found and word == path:
    raise UserError(
      f'data "{data}" is no folder, file, glob or "bundled:photos"'
    )
  if not found:
    raise UserError(f'data "{data}": there is no {word}')
  return found


def braces(pattern: str) -> Iterator[str]:
  """x-{000..002}.tar and x-{a,b}.tar as a shell writes them out."""
  match = re.search(r'\{([^{}]*)\}', pattern)
  words = match and _words(match[1])
  if not words:
    yield pattern
    return
  for word in words:
    yield from braces(pattern[: match.start()] + word + pattern[match.end() :])


def _words(inside: str) -> list[str]:
  numbers = re.fullmatch(r'(\d+)\.\.(\d+)', inside)
  if not numbers:
    return inside.split(',') if ',' in inside else []
  first, last = int(numbers[1]), int(numbers[2])
  if abs(last - first) >= _MAX_BRACES:
    raise UserError(f'data with {{{inside}}} names over {_MAX_BRACES:,} files')
  padded = any(n.startswith('0') and len(n) > 1 for n in numbers.groups())
  width = max(map(len, numbers.groups())) if padded else 0
  step = 1 if first <= last else -1
  return [f'{n:0{width}}' for n in range(first, last + step, step)]


def _of_one_kind(data, root, found, others) -> Listing:
  counts = {kind: len(names) for kind, names in found.items() if len(names)}
  if len(counts) > 1:
    held = ' and '.join(
      f'{n:,} {KINDS[kind][0]}' for kind, n in sorted(counts.items())
    )
    first = os.path.splitext(os.fsdecode(next(iter(found[min(counts)]))))
    raise UserError(
      f'data "{data}" holds {held}; name one kind by a glob, such as '
      f'"{root}/**/*{first[1]}"'
    )
  if 'packed' in counts:
    raise UserError(
      f'data "{data}" is compressed tars ({counts["packed"]:,}), which cannot '
      'be read at random; decompress them to .tar'
    )
  if not counts:
    held = ', '.join(f'{n:,} {end}' for end, n in others.most_common(5) if n)
    raise UserError(
      f'data "{data}" holds no image ({", ".join(EXTENSIONS)}), no .tar and no '
      f'.array_record to read; it holds {held or "nothing"}'
    )
  (kind,) = counts
  names = found[kind]
  if not isinstance(names, Names):
    names = sorted_names(names)
  return Listing(root, names, kind)


def images_at(paths: list[pathlib.Path]) -> Listing:
  """Given image files, in their own order."""
  root, names = _below([os.fsencode(os.path.abspath(p)) for p in paths])
  return Listing(root, Names.of(names), 'image')


def _below(files: list[bytes]) -> tuple[pathlib.Path, list[bytes]]:
  """(the folder that holds all, what they are called below it)."""
  # By characters, so that "./a//b" is cut where it stands as written.
  root = os.path.dirname(os.path.commonprefix(files))  # noqa: RUF071
  cut = len(root) + (root not in (b'', b'/'))
  return pathlib.Path(os.fsdecode(root)), [file[cut:] for file in files]
