"""Folders: where this package keeps files between runs, and whether one can be
written."""

import os
import pathlib
import tempfile

from vqrae_jax.errors import UserError


def cache_folder() -> pathlib.Path:
  """`$VQRAE_JAX_CACHE`, or `$XDG_CACHE_HOME/vqrae_jax`, or
  `~/.cache/vqrae_jax`; it need not exist."""
  own = os.environ.get('VQRAE_JAX_CACHE')
  if own:
    return pathlib.Path(os.path.expanduser(own))
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'vqrae_jax'


def check_writable(folder: pathlib.Path, flag: str) -> None:
  """A file can be made in `folder`, or in the nearest parent that exists;
  tried, since permissions do not tell (root, /proc, a full disk).

  Raises:
    UserError: naming `flag`.
  """
  above = folder.absolute().parents
  existing = next(p for p in (folder, *above) if p.exists())
  if not existing.is_dir():
    raise UserError(f'{flag}={folder}: {existing} is a file, not a folder')
  try:
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as e:
    raise UserError(
      f'{flag}={folder}: cannot write in {existing}: {e.strerror}'
    ) from None
