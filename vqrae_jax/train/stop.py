"""When a run is asked to stop: SIGTERM or Ctrl-C, agreed on by all hosts.

One process minds its own signals. Many ask `jax.distributed`, whose service
sees a SIGTERM on any host and names one step for all. A second Ctrl-C stops
at once.
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """`with StopRequest() as stop: … if stop.wanted(step): …`."""

  def __init__(self):
    self._signal: int | None = None
    self._old: dict[int, object] = {}

  def __enter__(self) -> 'StopRequest':
    # Signals reach the main thread only; the service has its own handler.
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._signal = number

  def wanted(self, step: int) -> bool:
    """Whether to stop after this step; every host asks, and all agree."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signal is not None

  @property
  def name(self) -> str:
    """What asked for it."""
    if self._signal is None:
      return 'the scheduler'
    return signal.Signals(self._signal).name
