"""Compiled programs kept on disk: the next start of a run reads them.

JAX's persistent compilation cache, in `$VQRAE_JAX_CACHE/compile_cache` or the
run's own `compile_cache/`, which may be in a bucket. Its keys cover the
program, the devices (for a CPU, its features), XLA's flags and its version;
unreadable entries are compiled again. A `JAX_COMPILATION_CACHE_DIR` that the
user has set is respected.
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
  """Sets up the cache. Call at process start, before anything is compiled.

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
  # XLA's own cache files are for GPUs and local disks only; their path is in
  # the keys, so a run that was moved would find nothing (jax 0.10.2).
  if jax.default_backend() != 'gpu' or is_url(folder):
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  name, seconds = _SHORTEST
  if name not in os.environ:
    jax.config.update(name.lower(), seconds)


def log_saved() -> None:
  """Logs what was read from the cache instead of compiled, if anything."""
  if _saved:
    logging.info(
      '%d compiled programs were read from %s: %.0f s of compiling saved',
      len(_saved), jax.config.jax_compilation_cache_dir, sum(_saved),
    )  # fmt: skip
  _saved.clear()
