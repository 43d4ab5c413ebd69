"""One run a workdir: two would interleave their rows and checkpoints.

The lock is the kernel's, on an open file, so that a killed run leaves none.
"""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

import jax

from vqrae_jax.errors import UserError


def check_no_run_in(workdir: pathlib.Path) -> None:
  """Raises UserError if a run is going on there; writes nothing."""
  if (workdir / 'lock').exists():
    with only_run_in(workdir):
      pass


@contextlib.contextmanager
def only_run_in(workdir: pathlib.Path) -> Iterator[None]:
  """Holds workdir/lock while the body runs; made if absent.

  Raises:
    UserError: another process holds it.
  """
  if jax.process_index():
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'lock').open('a') as file:  # touches nothing
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'another run is going on in {workdir}; stop it, or name another '
        '--workdir'
      ) from None
    except OSError:  # a file system without locks
      pass
    yield
