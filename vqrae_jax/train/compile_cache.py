"""Compiled programs kept on disk: the next start of a run reads them.

JAX's persistent compilation cache, in `$VQRAE_JAX_CACHE/compile_cache` or the
run's own `compile_cache/`, which may be in a bucket. Its keys hold the program,
the devices (of a CPU its features), XLA's flags and version; what cannot be
read is compiled again. A user's own `JAX_COMPILATION_CACHE_DIR` stays.
"""

import os

import jax
from absl import logging

from vqrae_jax import sharding
from vqrae_jax.files import Path, is_url
from vqrae_jax.paths import cache_folder

_SAVED = '/jax/compilation_cache/compile_time_saved_sec'
# JAX keeps what took a second; a start has dozens of shorter ones.
_SHORTEST = ('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', 0.2)
_saved: list[float] = []


def _note(event: str, seconds: float, **_) -> None:
  if event == _SAVED:
    _saved.append(seconds)


def keep_in(workdir: Path | None) -> None:
  """For a process's start, before it compiles anything.

  Args:
    workdir: the run's; None keeps programs in `$VQRAE_JAX_CACHE` alone.
  """
  sharding.compile_afresh_on_cpu()
  if not jax.config.jax_enable_compilation_cache:
    return
  jax.monitoring.register_event_duration_secs_listener(_note)
  folder = cache_folder() if os.environ.get('VQRAE_JAX_CACHE') else workdir
  if folder is None or jax.config.jax_compilation_cache_dir:
    return
  jax.config.update(
    'jax_compilation_cache_dir', os.fspath(folder / 'compile_cache')
  )
  # XLA's own files beside them are of GPUs and on disks; their path is in the
  # keys, so that a run that was moved would find nothing (jax 0.10.2).
  if jax.default_backend() != 'gpu' or is_url(folder):
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  name, seconds = _SHORTEST
  if name not in os.environ:
    jax.config.update(name.lower(), seconds)


def log_saved() -> None:
  """A line of what was read in place of being compiled, if anything was."""
  if _saved:
    logging.info(
      '%d compiled programs were read from %s: %.0f s of compiling saved',
      len(_saved), jax.config.jax_compilation_cache_dir, sum(_saved),
    )  # fmt: skip
  _saved.clear()
