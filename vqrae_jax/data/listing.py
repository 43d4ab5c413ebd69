"""Which files `DATA` names, and of which kind; nothing is opened.

A folder is searched recursively at every start. Links to folders are followed,
and each real folder is listed once, so loops end. Globs and braces are expanded
here. All files that `DATA` names must be of one kind.
"""

import collections
import dataclasses
import glob
import heapq
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from absl import logging

from vqrae_jax.errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
# Kind: its name in messages, the endings of its files.
KINDS = {
  'image': ('image files', EXTENSIONS),
  'tar': ('.tar shards', ('.tar',)),
  'record': ('ArrayRecord files', ('.array_record', '.arrayrecord')),
  'packed': (
    'compressed tars',
    ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4'),
  ),
}
_MAX_BRACES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Listing:
  """Files of one kind below a folder.

  Attributes:
    root: the folder.
    names: paths relative to it.
    kind: a key of `KINDS`.
    classes: whether sub-folders of image files are classes.
  """

  root: pathlib.Path
  names: list[str]
  kind: str
  classes: bool = True

  @property
  def paths(self) -> list[pathlib.Path]:
    """The paths, in the order of `names`."""
    return [self.root / name for name in self.names]


def kind_of(name: str) -> str | None:
  """The kind of a file by the end of its name; None if it is none of them."""
  # macOS writes ._x.jpg beside x.jpg; it is not an image.
  if name.startswith('._'):
    return None
  low = name.lower()
  return next((k for k, (_, ends) in KINDS.items() if low.endswith(ends)), None)


def files_below(root: str) -> Iterator[str]:
  """Paths of all files below a folder, relative to it, unsorted.

  A file whose status cannot be read, such as a link to itself, is skipped with
  a warning; broken links and hidden files and folders (".x") are skipped.

  Raises:
    UserError: a folder cannot be listed.
  """
  # Links wait until all real folders are listed: a folder is named by its own
  # path, or, if only links lead to it, by the first link's.
  seen, waiting, links = set(), [''], []
  while waiting or links:
    folder = waiting.pop() if waiting else heapq.heappop(links)[1]
    where = os.path.join(root, folder) if folder else root
    try:
      status = os.stat(where)
      if (status.st_dev, status.st_ino) in seen:
        continue
      seen.add((status.st_dev, status.st_ino))
      with os.scandir(where) as found:
        entries = list(found)
    except OSError as e:
      raise UserError(f'cannot list the folder {where}: {e.strerror}') from None
    for entry in entries:
      if entry.name.startswith('.'):
        continue
      name = os.path.join(folder, entry.name)
      try:
        if entry.is_dir(follow_symlinks=False):
          waiting.append(name)
        elif entry.is_file():
          yield name
        elif entry.is_dir():
          heapq.heappush(links, (os.fsencode(name), name))
      except OSError as e:
        logging.warning(
          '%s is skipped: %s', os.path.join(root, name), e.strerror
        )


def list_data(data: str) -> Listing:
  """The files that a folder, a file, a glob or a brace pattern names.

  Raises:
    UserError: a URL, nothing there, no file of a known kind, files of several
      kinds, compressed tars, or a folder that cannot be listed.
  """
  if '://' in data:
    raise UserError(
      f'data "{data}" is a URL, and data is read from local paths: mount the '
      'bucket (gcsfuse, mountpoint-s3) or copy it, and name that folder'
    )
  path = os.path.expanduser(data)
  if os.path.isdir(path):
    root = pathlib.Path(path)
    names = list(files_below(os.path.abspath(path)))
  elif os.path.isfile(path):
    root, names = _below([path])
  else:
    matches = [m for p in braces(path) for m in _matches(data, path, p)]
    # A pattern may name a file twice.
    root, names = _below({m for m in matches if os.path.isfile(m)})
  return _of_one_kind(data, root, names)


def _matches(data: str, path: str, pattern: str) -> list[str]:
  found = glob.glob(pattern, recursive=True)
  if not found and pattern == path:
    raise UserError(
      f'data "{data}" is not a folder, file, glob or "bundled:photos"'
    )
  if not found:
    raise UserError(f'data "{data}": nothing matches {pattern}')
  return found


def braces(pattern: str) -> Iterator[str]:
  """Expands x-{000..002}.tar and x-{a,b}.tar as a shell does.

  Raises:
    UserError: a range of over a million numbers.
  """
  for match in re.finditer(r'\{([^{}]*)\}', pattern):
    before, after = pattern[: match.start()], pattern[match.end() :]
    if parts := _expanded(match[1]):
      for part in parts:
        yield from braces(before + part + after)
      return
  yield pattern


def _expanded(inside: str) -> list[str]:
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


def _of_one_kind(data: str, root: pathlib.Path, names: list[str]) -> Listing:
  found = collections.defaultdict(list)
  for name in names:
    found[kind_of(os.path.basename(name))].append(name)
  others = found.pop(None, [])
  if len(found) > 1:
    held = [f'{len(found[kind]):,} {KINDS[kind][0]}' for kind in sorted(found)]
    fewest = min(found.values(), key=len)
    raise UserError(
      f'data "{data}" holds {" and ".join(held)}; name one kind by a glob, '
      f'such as "{root}/**/*{os.path.splitext(fewest[0])[1]}"'
    )
  if 'packed' in found:
    raise UserError(
      f'data "{data}" is compressed tars ({len(found["packed"]):,}), which '
      'cannot be read at random; decompress them to .tar'
    )
  if not found:
    ends = collections.Counter(os.path.splitext(n)[1].lower() for n in others)
    held = [f'{n:,} {e or "without suffix"}' for e, n in ends.most_common(5)]
    raise UserError(
      f'data "{data}" holds no image ({", ".join(EXTENSIONS)}), no .tar and no '
      f'.array_record to read; it holds {", ".join(held) or "no file"}'
    )
  ((kind, names),) = found.items()
  # In pathlib's order, part by part; as bytes, since names may not be UTF-8.
  names.sort(key=lambda n: os.fsencode(n).replace(b'/', b'\0'))
  return Listing(root, names, kind)


def images_at(paths: Iterable[pathlib.Path]) -> Listing:
  """The given image files, in their order, without classes."""
  return Listing(*_below([os.path.abspath(p) for p in paths]), 'image', False)


def _below(files: Iterable[str]) -> tuple[pathlib.Path, list[str]]:
  """(the folder that holds all, their paths below it)."""
  files = list(files)
  # By characters, so that paths such as "./a//b" keep their spelling.
  root = os.path.dirname(os.path.commonprefix(files))  # noqa: RUF071
  cut = len(root) + (root not in ('', '/'))
  return pathlib.Path(root), [file[cut:] for file in files]
