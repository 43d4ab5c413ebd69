"""Where this package keeps files between runs, for every room that does."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
  """`$VQRAE_JAX_CACHE`, or `$XDG_CACHE_HOME/vqrae_jax`, or
  `~/.cache/vqrae_jax`; it need not exist."""
  own = os.environ.get('VQRAE_JAX_CACHE')
  if own:
    return pathlib.Path(own).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'vqrae_jax'
