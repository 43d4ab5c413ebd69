"""What a run says: a progress bar, a log line, metrics.jsonl, TensorBoard.

Only process 0 writes, but for the names of unreadable photographs, which each
host lists for itself. A row of metrics.jsonl holds the step and its metrics;
each step appears once: a run that goes on cuts the rows after its checkpoint.
"""

import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

# Not in the line of a row: words, and counts that are nearly always 0.
_QUIET = ('samples', 'skipped', 'nonfinite')


class Report:
  """Writes a run's figures while it goes."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    total_steps: int,
    batch_size: int,
    tensorboard: bool,
    start_step: int = 0,
  ):
    process = jax.process_index()
    self._writes = process == 0
    name = f'unreadable.{process}.jsonl' if process else 'unreadable.jsonl'
    self._unreadable_path = workdir / name
    self._unreadable: set[str] | None = None
    if not start_step:
      self._unreadable_path.unlink(missing_ok=True)
    self._batch = batch_size
    self._total = total_steps
    self._events = self._rows = self._bar = None
    self._since = (time.perf_counter(), start_step)
    if not self._writes:
      return
    path = workdir / 'metrics.jsonl'
    keep_rows(path, start_step)
    self._rows = path.open('a', encoding='utf8')
    if tensorboard:
      from tensorboardX import SummaryWriter

      if not start_step:  # as metrics.jsonl: no curve of an earlier run
        shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
      self._events = SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=start_step + 1
      )
    self._bar = tqdm(
      total=total_steps * batch_size,
      initial=start_step * batch_size,
      unit='img',
      unit_scale=True,
      desc='train',
      dynamic_ncols=True,
      # A log file gets a line per row instead of a bar.
      disable=not sys.stderr.isatty(),
    )

  def step(self) -> None:
    """One step has been sent off."""
    if self._bar is not None:
      self._bar.update(self._batch)

  def unreadable(self, found: Mapping[str, str]) -> None:
    """Names and reasons of photographs that were replaced; new ones are
    logged and appended to the host's list."""
    if self._unreadable is None:
      self._unreadable = _names_in(self._unreadable_path)
    new = [(n, r) for n, r in found.items() if n not in self._unreadable]
    if not new:
      return
    with self._unreadable_path.open('a', encoding='utf8') as file:
      for name, reason in new:
        self._unreadable.add(name)
        logging.warning('%s is replaced by another: %s', name, reason)
        line = json.dumps({'name': name, 'reason': reason})
        file.write(line + '\n')

  def row(self, step: int, metrics: dict[str, Any], waited: float) -> None:
    """A row for a completed step.

    Args:
      step: completed steps.
      metrics: numbers, or words that stay out of the curves.
      waited: seconds that the loop waited for data since the last row.
    """
    now, (then, before) = time.perf_counter(), self._since
    seconds = max(now - then, 1e-9)
    rate = (step - before) * self._batch / seconds
    self._since = (now, step)
    if not self._writes:
      return
    row = {
      'step': step,
      **{k: _plain(v) for k, v in metrics.items()},
      'images_per_second': rate,
      'data_wait': min(waited / seconds, 1.0),
    }
    self._rows.write(json.dumps(row) + '\n')
    self._rows.flush()
    left = (self._total - step) * self._batch / rate if rate else 0
    words = ' '.join(
      f'{k.removeprefix("loss/")} {v:.4g}'
      for k, v in metrics.items()
      if not k.startswith(('lr/', 'weight/')) and k not in _QUIET
    )
    line = f'step {step}/{self._total} {words} {rate:.1f} img/s ETA {left:.0f}s'
    if self._bar is None or self._bar.disable:
      logging.info(line)
    else:
      brief = {
        k.removeprefix('loss/'): f'{v:.3g}'
        for k, v in metrics.items()
        if k.startswith('loss/') or k in ('psnr', 'usage')
      }
      self._bar.set_postfix(brief, refresh=False)
    if self._events is not None:
      for name, value in row.items():
        if name != 'step' and isinstance(value, int | float):
          self._events.add_scalar(name, value, step)

  def images(self, step: int, picture: np.ndarray) -> None:
    """uint8 [h w 3] into TensorBoard."""
    if self._events is not None:
      self._events.add_image(
        'reconstructions', picture, step, dataformats='HWC'
      )

  def close(self) -> None:
    """Flushes and closes everything."""
    for thing in (self._rows, self._events, self._bar):
      if thing is not None:
        thing.close()


def _plain(value: Any) -> Any:
  """What JSON can say: null for what is no number."""
  lost = isinstance(value, float) and not math.isfinite(value)
  return None if lost else value


def keep_rows(path: pathlib.Path, last: int) -> None:
  """Leaves the rows of metrics.jsonl up to step `last`; torn ones go too."""
  kept = []
  if last and path.exists():
    for line in path.read_bytes().splitlines():
      try:
        if json.loads(line)['step'] <= last:
          kept.append(line + b'\n')
      except (ValueError, KeyError, TypeError):
        continue
  temporary = path.with_name(path.name + '.writing')
  temporary.write_bytes(b''.join(kept))
  temporary.replace(path)


def _names_in(path: pathlib.Path) -> set[str]:
  if not path.exists():
    return set()
  names = set()
  for line in path.read_bytes().splitlines():
    try:
      names.add(json.loads(line)['name'])
    except (ValueError, KeyError, TypeError):
      continue
  return names


def write_json(path: pathlib.Path, value: Any) -> None:
  """JSON, written beside and renamed."""
  temporary = path.with_name(path.name + '.writing')
  temporary.write_text(json.dumps(value, indent=2, default=str) + '\n')
  temporary.replace(path)
