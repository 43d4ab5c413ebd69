"""Paths on disks and in buckets; writing that nobody reads half done."""

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

Path = pathlib.Path | epath.Path


def to_path(path: str | os.PathLike) -> Path:
  """A `pathlib.Path`, or an `epath.Path` of a URL such as gs://bucket/run."""
  if is_url(path):
    return epath.Path(path)
  return pathlib.Path(os.path.expanduser(path))


def is_url(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket, not on a disk."""
  return '://' in os.fspath(path)


def digest(path: Path) -> str:
  """The SHA-256 of a file, in hex."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """An open file that takes the place of `path` when the block ends.

  It has a unique name in the folder of `path` and is created exclusively: two
  processes never write to the same file, and no link is followed. If the block
  raises, nothing is left and `path` is as it was. The mode follows the umask.
  An object of a bucket (gs://…) appears when its own write ends.
  """
  if is_url(path):
    with epath.Path(path).open('wb') as file:
      yield file
    return
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{uuid.uuid4().hex}.writing')
  try:
    with open(temporary, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise


def write_json(path: Path, value: Any) -> None:
  """JSON, all of it or nothing; null where a number is not finite."""
  value = json.loads(json.dumps(value), parse_constant=lambda _: None)
  with atomic_write(path) as file:
    file.write(json.dumps(value, indent=2).encode() + b'\n')
