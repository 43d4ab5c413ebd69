"""What a run says: a progress bar, a log line, metrics.jsonl, TensorBoard.

Only process 0 writes, but for the names of unreadable photographs, which each
host lists for itself. A row of metrics.jsonl holds the step and its metrics;
each step appears once: a run that goes on cuts the rows after its checkpoint.
"""

import functools
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
from PIL import Image
from tqdm import tqdm

from vqrae_jax import export, sharding
from vqrae_jax.evaluate import evaluator, visualize
from vqrae_jax.files import atomic_write
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.run import Run, host_copy

# ----------------------------------------------------------------------------
# What a run shows of itself on the way: pictures, and figures of held-out
# tiles, both of the averaged weights.
#
# The images are fixed: tiles spread evenly over the held-out photographs, or,
# without an `eval.source`, the run's first ones. Every host takes part, since
# parameters may lie over all of them.

SHOWN = 8
LARGE = 128  # pixels: smaller images are enlarged by a whole number


class Shown:
  """A run's fixed images and what its weights make of them.

  Attributes:
    images: uint8 [m h w 3], at most 8, for the pictures.
  """

  def __init__(self, run: Run, frozen: Any):
    self._run, self._frozen = run, frozen
    if run.spec.eval is None:
      if run.spec.log.images_every:
        logging.info('pictures are of training images: there is no eval.source')
      first = run.place(run.batches.batch(0))['images']
      self.images = host_copy(first, run.mesh)[:SHOWN]
      return
    photographs = [
      run.held_out[i] for i in visualize.spread(len(run.held_out), SHOWN)
    ]
    tiles = evaluator.tiles_of(photographs, run.spec.eval.tile)
    self.images = tiles[visualize.spread(len(tiles), SHOWN)]

  def _variables(self, state: Any) -> Any:
    return state_lib.variables_of(state, self._frozen, ema=True)

  def picture(self, state: Any) -> np.ndarray:
    """uint8 [2h m*w 3]: the images above their reconstructions."""
    painted = _reconstruct(
      self._run.tokenizer, self._variables(state), self.images
    )
    painted = host_copy(painted, self._run.mesh)
    return visualize.grid(self.images, visualize.to_uint8(painted))

  def figures(self, state: Any) -> dict[str, float]:
    """{"eval/psnr", "eval/ssim", …} of all held-out tiles, through indices."""
    mesh, spec = self._run.mesh, self._run.spec.eval
    # Whole rows for every device.
    batch = -(-spec.batch_size // mesh.size) * mesh.size
    over = sharding.batch_sharding(mesh)

    def place(rows):
      return jax.make_array_from_callback(rows.shape, over, rows.__getitem__)

    measured, _ = evaluator.measure(
      self._run.tokenizer,
      self._variables(state),
      evaluator.tile_batches(self._run.held_out, spec.tile, batch),
      place=place,
      read=lambda x: host_copy(x, mesh),
    )
    return {f'eval/{name}': x for name, x in measured.results().items()}


def save(picture: np.ndarray, workdir: pathlib.Path, step: int) -> None:
  """Writes workdir/pictures/STEP.png, on process 0; small images enlarged."""
  if not jax.process_index():
    path = workdir / 'pictures' / f'{step:08d}.png'
    times = max(LARGE // (len(picture) // 2), 1)
    picture = picture.repeat(times, 0).repeat(times, 1)
    visualize.save_png(Image.fromarray(picture), path)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
  return tokenizer.apply(variables, images).images


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
  with atomic_write(path) as file:
    file.write(b''.join(kept))


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
  """JSON, all of it or nothing."""
  with atomic_write(path) as file:
    file.write(json.dumps(value, indent=2, default=str).encode() + b'\n')


# ----------------------------------------------------------------------------
# The end of a run: the tokenizer on disk, its figures and its picture.
#
# What is evaluated is the exported directory, opened anew.

PAGE_IMAGES = 12  # photographs on the page
# Figures in the order of summary.json and of the table at the end.
_TABLE = (
  ('psnr', 'PSNR, dB (held out, pooled)', '.2f'),
  ('psnr_block_mean', 'PSNR of block means, dB', '.2f'),
  ('psnr_shuffled', 'PSNR with codes shuffled, dB', '.2f'),
  ('ssim', 'SSIM', '.3f'),
  ('bits_per_image', 'bits per image', '.0f'),
  ('codes_used', 'codes used', 'd'),
  ('train_seconds', 'training, s', '.0f'),
  ('images_per_second', 'images/s', '.0f'),
)


def finish(
  run: Any, variables: Any, workdir: pathlib.Path, figures: dict[str, Any]
) -> dict[str, Any]:
  """Exports, evaluates, writes summary.json; returns what it holds.

  Args:
    run: the loop's `Run`.
    variables: the averaged weights and the live codebook.
    workdir: where tokenizer/, summary.json and reconstructions.png go.
    figures: what the loop measured.
  """
  if jax.process_index():
    return figures
  folder = workdir / 'tokenizer'
  figures['fingerprint'] = export.save_tokenizer(
    run.tokenizer, variables, folder
  )
  if run.spec.eval is not None:
    figures |= _evaluate(run, folder, workdir)
  write_json(workdir / 'summary.json', figures)
  return figures


def _evaluate(run, folder, workdir) -> dict[str, float]:
  options = {'dtype': run.spec.model.get('dtype', 'float32')}
  tokenizer, variables = export.load_tokenizer(folder, **options)
  spec = run.spec.eval
  names = run.held_out.names
  few = len(names) <= PAGE_IMAGES
  logging.info(
    'evaluating on %s', ', '.join(names) if few else f'{len(names)} photographs'
  )
  figures = evaluator.evaluate_tiles(
    tokenizer, variables, run.held_out, spec.tile, spec.batch_size
  )
  figures['photographs'] = names
  page = picture_of(tokenizer, variables, run.held_out, spec.tile)
  visualize.save_png(page, workdir / 'reconstructions.png')
  return figures


def picture_of(tokenizer, variables, source, tile: int):
  """At most 12 photographs, each above its reconstruction, painted tile by
  tile."""
  originals, painted, labels = [], [], []
  for i in visualize.spread(len(source), PAGE_IMAGES):
    name = source.names[i]
    original, image = evaluator.reconstruct_tiled(
      tokenizer, variables, source[i], tile
    )
    originals.append(original)
    painted.append(visualize.to_uint8(image))
    labels.append(f'{name}  {evaluator.psnr(original, image):.1f} dB')
  title = f'originals above reconstructions, in tiles of {tile} px'
  return visualize.comparison(originals, painted, labels, title)


def table(figures: dict[str, Any]) -> str:
  """The figures that a user asks for first, a line each."""
  rows = [
    (words, format(figures[key], form))
    for key, words, form in _TABLE
    if key in figures
  ]
  width = max(len(words) for words, _ in rows)
  return '\n'.join(f'  {words:<{width}}  {value:>9}' for words, value in rows)
