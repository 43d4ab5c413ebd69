"""One run a workdir: two would interleave their rows and checkpoints.

The lock is the kernel's, on an open file, so that a killed run leaves none.
Process 0 holds it, and all hosts hear what became of it: none waits for one
that has stopped.
"""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from vqrae_jax.errors import UserError


def check_no_run_in(workdir: pathlib.Path) -> None:
  """Raises UserError if a run is going on there; writes nothing."""
  free, path = True, workdir / 'lock'
  if not jax.process_index() and path.exists():
    with path.open('a') as file:
      free = _taken(file)
  _check(free, workdir)


@contextlib.contextmanager
def only_run_in(workdir: pathlib.Path) -> Iterator[None]:
  """Holds workdir/lock while the body runs; made if absent.

  Raises:
    UserError: another process holds it; on every host.
  """
  with contextlib.ExitStack() as held:
    free = True
    if not jax.process_index():
      workdir.mkdir(parents=True, exist_ok=True)
      # To append: a look at it touches nothing.
      free = _taken(held.enter_context((workdir / 'lock').open('a')))
    _check(free, workdir)
    yield


def agreed(good: bool) -> bool:
  """What process 0 finds; every host must ask."""
  if jax.process_count() > 1:
    good = bool(multihost_utils.broadcast_one_to_all(np.int32(good)))
  return good


def _taken(file: IO) -> bool:
  """Takes the lock of an open file, or is False where another has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    pass
  return True


def _check(free: bool, workdir: pathlib.Path) -> None:
  if not agreed(free):
    raise UserError(
      f'another run is going on in {workdir}; stop it, or name another '
      '--workdir'
    )
