"""What a run says: a progress bar, a log line, metrics.jsonl, TensorBoard.

Only process 0 writes. A row of metrics.jsonl holds the step and its metrics;
each step appears once.
"""

import json
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm


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
    self._writes = jax.process_index() == 0
    self._batch = batch_size
    self._total = total_steps
    self._events = self._rows = self._bar = None
    self._since = (time.perf_counter(), start_step)
    if not self._writes:
      return
    self._rows = (workdir / 'metrics.jsonl').open('w', encoding='utf8')
    if tensorboard:
      from tensorboardX import SummaryWriter

      if not start_step:  # as metrics.jsonl: no curve of an earlier run
        shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
      self._events = SummaryWriter(str(workdir / 'tensorboard'))
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

  def row(self, step: int, metrics: dict[str, float]) -> None:
    """A row for a completed step; images/s counts since the last row."""
    now, (then, before) = time.perf_counter(), self._since
    rate = (step - before) * self._batch / max(now - then, 1e-9)
    self._since = (now, step)
    if not self._writes:
      return
    row = {'step': step, **metrics, 'images_per_second': rate}
    self._rows.write(json.dumps(row) + '\n')
    self._rows.flush()
    left = (self._total - step) * self._batch / rate if rate else 0
    words = ' '.join(
      f'{k.removeprefix("loss/")} {v:.4g}'
      for k, v in metrics.items()
      if not k.startswith('lr/')
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
        if name != 'step':
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


def write_json(path: pathlib.Path, value: Any) -> None:
  """JSON, written beside and renamed."""
  temporary = path.with_name(path.name + '.writing')
  temporary.write_text(json.dumps(value, indent=2, default=str) + '\n')
  temporary.replace(path)
