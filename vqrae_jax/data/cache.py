"""Listings and indices kept between runs, as arrays, never as pickles.

They lie in `paths.cache_folder()`. An entry carries the key it was made for
and the stamps of the files it describes; one that is missing, damaged or of
other stamps is simply made anew, and a folder that cannot be written costs
time only.
"""

import contextlib
import hashlib
import os
import pathlib
import tempfile
import time

import numpy as np

from vqrae_jax.paths import cache_folder

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
