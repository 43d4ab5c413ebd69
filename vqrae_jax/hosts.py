"""How the processes of a multi-host run wait for one another, and what one
says when another is gone.

A collective with a lost process may raise here, as it does on CPU. Elsewhere
it hangs until JAX's coordination service ends this process by SIGABRT and a
C++ stack: at once where process 0 is gone, else when its heartbeats are missed
(about 90 s). No Python code runs then, and jaxlib 0.10.2 cannot call a
`missed_heartbeat_callback` (std::bad_cast). So a shell that outlives this
process says it: it waits at a pipe for a word that an orderly end writes.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import jax

from vqrae_jax.errors import UserError

LOST = (
  'error: a host of this run is gone or does not answer, and the others cannot '
  'continue without it; start the same command again on all hosts'
)
# How collectives and the coordination service say so.
_SAYS_SO = re.compile('Gloo|NCCL|UNAVAILABLE|heartbeat|coordination service')


A_WEEK = 7 * 24 * 3600 * 1000  # milliseconds


def wait_for_all(what: str) -> None:
  """Waits until all processes are here, however long one of them works.

  Before a process ends it must wait: JAX's shutdown gives the others five
  minutes and then aborts all of them.

  Args:
    what: names the place; the same on all processes.
  """
  if jax.process_count() == 1:
    return
  if jax.distributed.is_initialized():
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=A_WEEK)
  else:  # a TPU slice without --distributed: no service, and no such shutdown
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def loss_reported() -> Iterator[None]:
  """`with loss_reported(): …` around all work that needs other hosts; they
  leave it together.

  Ends the process, by a line and exit code 75, if a collective failed since
  another host is gone.
  """
  if jax.process_count() == 1:
    yield
    return
  watch = subprocess.Popen(
    ['sh', '-c', 'read -r word || echo "$0" >&2', LOST],
    stdin=subprocess.PIPE,
    start_new_session=True,  # or Ctrl-C would end it first
  )
  try:
    yield
    wait_for_all('the end of the work')
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    if isinstance(e, UserError) or not _SAYS_SO.search(str(e)):
      raise
    # Not by an exception: until Python has shut down, the service's own
    # threads may still abort this process, and their stack hide the line.
    reason = str(e).strip().partition('\n')[0]
    print(f'{LOST} ({reason})', file=sys.stderr, flush=True)
    watch.communicate(b'done\n')
    os._exit(75)  # EX_TEMPFAIL of sysexits.h: try again
  finally:
    watch.communicate(b'done\n')
