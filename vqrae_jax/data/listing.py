"""Which files a `DATA` word names, and of which kind; nothing is opened.

Folders are searched in depth (`tree.py`); braces and globs are written out
here, and what they name must be of one kind.
"""

import collections
import dataclasses
import glob
import os
import pathlib
import re
from collections.abc import Iterator

from vqrae_jax.data import tree
from vqrae_jax.data.decode import EXTENSIONS
from vqrae_jax.data.names import Names
from vqrae_jax.data.tree import KINDS
from vqrae_jax.errors import UserError

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
    found, others = tree.list_tree(path)
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
    kind = tree.kind_of(os.path.basename(name))
    if kind:
      found[kind].append(name)
    else:
      others[tree.ending(name)] += 1
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
    names = tree.sorted_names(names)
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
