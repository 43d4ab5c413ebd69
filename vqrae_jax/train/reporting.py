"""What a run shows: a progress bar, log lines, metrics.jsonl, TensorBoard,
pictures, and at its end the figures of the exported tokenizer.

Only process 0 writes, but for the names of unreadable images, which each host
lists for itself. A row of metrics.jsonl holds the step and its metrics; each
step appears once: a resumed run cuts the rows after its checkpoint.
"""

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image
from tqdm import tqdm

from vqrae_jax import export, sharding
from vqrae_jax.data import sources
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.evaluate import evaluator, metrics, visualize
from vqrae_jax.files import Path, atomic_write, is_url, write_json
from vqrae_jax.models.tokenizer import packages_of
from vqrae_jax.pretrained import networks
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.config import RunConfig
from vqrae_jax.train.setup import Setup
from vqrae_jax.types import Tree

# Not in the line of a row: counts that are nearly always 0.
_QUIET = ('skipped', 'nonfinite')
SHOWN = 8  # images of a picture on the way
PAGE_IMAGES = 12  # of the page at the end
LARGE = 128  # pixels: smaller images are enlarged by an integer factor


class _Lines:
  """A file of JSON lines that grows, on a disk or in a bucket.

  Buckets cannot append: there the file is written again with each line.

  Attributes:
    rows: what it held before; torn lines are left out.
  """

  def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]):
    """`keep` says which of the file's rows stay in it."""
    self.rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
      with contextlib.suppress(ValueError, TypeError, KeyError):
        if keep(row := dict(json.loads(line))):
          self.rows.append(row)
    self._path, self._remote = path, is_url(path)
    self._text = ''.join(json.dumps(row) + '\n' for row in self.rows)
    if path.exists():
      with atomic_write(path) as file:
        file.write(self._text.encode())

  def add(self, row: Mapping[str, Any]) -> None:
    line = json.dumps(row) + '\n'
    if self._remote:
      self._text += line
      self._path.write_text(self._text)
      return
    with open(self._path, 'a', encoding='utf8') as file:
      file.write(line)


class _Curves:
  """TensorBoard's file. Where it cannot be written, its curves end and the run
  goes on: `SummaryWriter` would wait for its dead thread for ever."""

  def __init__(self, folder: Path, start_step: int):
    from tensorboardX import event_file_writer, record_writer
    from tensorboardX.proto.event_pb2 import SessionLog

    record_writer.directory_check(str(folder))
    self._file: Any = event_file_writer.EventsWriter(str(folder / 'events'))
    # A bucket gets all of the file again each time.
    self._every, self._flushed = 600 if is_url(folder) else 120, 0.0  # seconds
    # Curves of an earlier start are cut here.
    start = SessionLog(status=SessionLog.START)
    self._add(start_step + 1, session_log=start)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX import summary
    from tensorboardX.proto.summary_pb2 import Summary

    each = [summary.scalar(name, x).value[0] for name, x in values.items()]
    self._add(step, summary=Summary(value=each))

  def image(self, step: int, picture: np.ndarray) -> None:
    from tensorboardX import summary

    image = summary.image('reconstructions', picture, dataformats='HWC')
    self._add(step, summary=image)

  def close(self) -> None:
    self._try(lambda file: file.close())

  def _add(self, step: int, **content: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    now = time.time()
    event = Event(wall_time=now, step=step, **content)
    self._try(lambda file: file.write_event(event))
    if now > self._flushed + self._every:
      self._flushed = now
      self._try(lambda file: file.flush())

  def _try(self, write: Callable[[Any], Any]) -> None:
    if self._file is None:
      return
    try:
      write(self._file)
    except Exception as e:  # of a disk, or of a bucket's own library
      self._file = None
      logging.warning(
        "TensorBoard's file cannot be written (%s): its curves end here, "
        'metrics.jsonl goes on', e,
      )  # fmt: skip


class Report:
  """Writes a run's metrics while it trains."""

  def __init__(self, workdir: Path, setup: Setup, start_step: int):
    process, self._workdir = jax.process_index(), workdir
    self._batch, self._total = setup.config.batch_size, setup.total_steps
    name = f'unreadable.{process}.jsonl' if process else 'unreadable.jsonl'
    self._unreadable_lines = _Lines(workdir / name, lambda _: start_step > 0)
    listed = self._unreadable_lines.rows
    self._unreadable = {str(row.get('name')) for row in listed}
    self.measure_from(start_step)
    self._bar = tqdm(
      total=self._total * self._batch,
      initial=start_step * self._batch,
      unit='img',
      unit_scale=True,
      desc='train',
      dynamic_ncols=True,
      # A log file gets a line per row instead of a bar.
      disable=process > 0 or not sys.stderr.isatty(),
    )
    self._rows = self._events = self._wandb = None
    if process:
      return

    self._rows = _Lines(
      workdir / 'metrics.jsonl', lambda row: row['step'] <= start_step
    )
    if setup.config.log.tensorboard:
      folder = workdir / 'tensorboard'
      if not start_step and folder.exists():  # the curves of an earlier run
        epath.Path(folder).rmtree()
      self._events = _Curves(folder, start_step)
    if setup.config.log.wandb:
      self._wandb = _wandb_run(workdir, setup, start_step)

  def step(self) -> None:
    """A step has run."""
    self._bar.update(self._batch)

  def unreadable(self, found: Mapping[str, str]) -> None:
    """{name: reason} of images that were replaced; new ones are logged and
    appended to the host's list."""
    for name, reason in found.items():
      if name not in self._unreadable:
        self._unreadable.add(name)
        logging.warning('%s is replaced by another image: %s', name, reason)
        self._unreadable_lines.add({'name': name, 'reason': reason})

  def measure_from(self, step: int) -> None:
    """Images per second count from here."""
    self._since = (time.perf_counter(), step)

  def row(self, step: int, metrics: dict[str, Any], waited: float) -> None:
    """A row for a completed step.

    Args:
      step: completed steps.
      metrics: numbers.
      waited: seconds that the device waited for data since the last row.
    """
    now, (then, before) = time.perf_counter(), self._since
    seconds = max(now - then, 1e-9)
    rate = (step - before) * self._batch / seconds
    self._since = (now, step)
    if self._rows is None:
      return
    row = {
      'step': step,
      # JSON has no NaN.
      **{k: v if math.isfinite(v) else None for k, v in metrics.items()},
      'images_per_second': rate,
      'data_wait': min(waited / seconds, 1.0),
    }
    self._rows.add(row)
    left = (self._total - step) * self._batch / rate if rate else 0
    words = ' '.join(
      f'{k.removeprefix("loss/")} {v:.4g}'
      for k, v in metrics.items()
      if not k.startswith(('lr/', 'weight/')) and k not in _QUIET
    )
    line = (
      f'step {step}/{self._total} {words} {rate:.1f} img/s, '
      f'{row["data_wait"]:.0%} waiting for data, ETA {left:.0f}s'
    )
    if self._bar.disable:
      logging.info(line)
    else:
      brief = {
        k.removeprefix('loss/'): f'{v:.3g}'
        for k, v in metrics.items()
        if k.startswith('loss/') or k in ('psnr', 'usage')
      }
      self._bar.set_postfix(brief, refresh=False)
    row = {k: v for k, v in row.items() if v is not None}
    if self._wandb is not None:
      self._wandb.log(row, step)
    if self._events is not None:
      del row['step']
      self._events.scalars(step, row)

  def picture(self, step: int, picture: np.ndarray) -> None:
    """uint8 [3h w 3] as pictures/STEP.png, a small one enlarged, and into
    TensorBoard."""
    if self._events is not None:
      self._events.image(step, picture)
    if self._wandb is not None:
      import wandb

      self._wandb.log({'reconstructions': wandb.Image(picture)}, step)
    if self._rows is not None:
      picture = visualize.enlarged(picture, len(picture) // 3, LARGE)
      path = self._workdir / 'pictures' / f'{step:08d}.png'
      visualize.save_png(Image.fromarray(picture), path)

  def close(self) -> None:
    """Flushes and closes everything."""
    self._bar.close()
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()


def check_wandb(config: RunConfig) -> None:
  """Raises UserError if `log.wandb` needs a package that is not installed."""
  try:
    if config.log.wandb and not jax.process_index():  # which alone logs
      import wandb  # noqa: F401
  except ImportError:
    raise UserError(
      f'log.wandb={config.log.wandb} needs a package: pip install '
      "'vqrae_jax[wandb]'"
    ) from None


def _wandb_run(workdir: Path, setup: Setup, start_step: int) -> Any:
  """A new run of Weights & Biases, or the one that this workdir began."""
  import wandb

  path = workdir / 'wandb_id'
  known = path.read_text() if start_step and path.exists() else None
  run = wandb.init(
    project=setup.config.log.wandb,
    name=workdir.name,
    id=known,
    resume='allow',
    dir=None if is_url(workdir) else str(workdir),
    config=read_json(workdir / 'config.json'),
  )
  path.write_text(run.id)
  return run


def read_summary(workdir: Path) -> dict[str, Any]:
  """What summary.json holds; {} if it is absent or damaged."""
  try:
    return read_json(workdir / 'summary.json')
  except UserError:
    return {}


_random_network = jax.jit(networks.random, static_argnums=0)


def eval_networks(config: RunConfig) -> Tree:
  """Those of `eval.metrics`, as `metrics.image_rows` takes them.

  Raises:
    UserError: a file that is not here (with the command that brings it).
  """
  names = config.eval.metrics if config.eval is not None else ()
  if config.init.networks == 'random':
    key = jax.random.key(config.seed)
    return {name: _random_network(name, key) for name in names}
  try:
    return {name: networks.load(name) for name in names}
  except UserError as e:
    raise UserError(f'eval.metrics: {e}') from None


class Visualizer:
  """A run's fixed images, and what its EMA weights make of them.

  The images are tiles spread evenly over the held-out images or, without an
  `eval.source`, the run's first ones. Every host takes part, since parameters
  may lie over all of them.
  """

  def __init__(self, setup: Setup, frozen: Any, networks: Tree):
    self._setup, self._frozen, self._networks = setup, frozen, networks

  @functools.cached_property
  def images(self) -> np.ndarray:
    """uint8 [m h w 3], at most 8, for the pictures."""
    setup = self._setup
    if setup.held_out is None:
      logging.info('pictures show training images: there is no eval.source')
      first = setup.place(setup.batches.batch(0))['images']
      return sharding.host_copy(first, setup.mesh)[:SHOWN]
    chosen = sources.spread(len(setup.held_out), SHOWN)
    tiles = evaluator.tiles_of(
      [setup.held_out[i] for i in chosen], setup.config.eval.tile
    )
    return tiles[sources.spread(len(tiles), SHOWN)]

  def picture(self, state: Any) -> np.ndarray:
    """uint8 [3h m*w 3]: the images above their reconstructions and tokens."""
    variables = state_lib.variables_of(state, self._frozen, ema=True)
    found = _reconstruct(self._setup.tokenizer, variables, self.images)
    recon, latents = sharding.host_copy(found, self._setup.mesh)
    tokens = visualize.token_map(latents, recon.shape[1:3])
    return visualize.grid(self.images, visualize.to_uint8(recon), tokens)

  def figures(self, state: Any) -> dict[str, float]:
    """{"eval/psnr", "eval/ssim", …} of all held-out tiles, through indices."""
    mesh, spec = self._setup.mesh, self._setup.config.eval
    batch = -(-spec.batch_size // mesh.size) * mesh.size  # rows for each device
    over = sharding.batch_sharding(mesh)

    def place(rows):
      return jax.make_array_from_callback(rows.shape, over, rows.__getitem__)

    total = metrics.Sums()
    for measured in evaluator.measure(
      self._setup.tokenizer,
      state_lib.variables_of(state, self._frozen, ema=True),
      evaluator.tile_batches(self._setup.held_out, spec.tile, batch),
      place=place,
      read=lambda x: sharding.host_copy(x, mesh),
      networks=self._networks,
    ):
      total = total.merge(measured.sums)
    return {f'eval/{name}': x for name, x in total.results().items()}


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
  out = tokenizer.apply(variables, images)
  return out.images, out.quantizer.z_q


def finish(
  setup: Setup,
  networks: Tree,
  variables: Any,
  workdir: Path,
  figures: dict[str, Any],
) -> dict[str, Any]:
  """Exports the tokenizer, evaluates the export as a user would open it, and
  writes summary.json; returns what that holds.

  Args:
    setup: the run's.
    networks: of the held-out metrics.
    variables: the EMA weights and the live codebook.
    workdir: where tokenizer/, summary.json and reconstructions.png go.
    figures: what the loop measured.
  """
  if jax.process_index():
    return figures
  folder, spec = workdir / 'tokenizer', setup.config.eval
  figures['fingerprint'] = export.save_tokenizer(
    setup.tokenizer, variables, folder
  )
  if spec is not None:
    options = {'dtype': setup.config.model.get('dtype', 'float32')}
    tokenizer, variables = export.load_tokenizer(
      folder, trusted=packages_of(setup.tokenizer), **options
    )
    names = setup.held_out.names
    logging.info(
      'evaluating on %s',
      ', '.join(names) if len(names) <= PAGE_IMAGES else f'{len(names)} images',
    )
    figures |= evaluator.evaluate_tiles(
      tokenizer,
      variables,
      setup.held_out,
      spec.tile,
      spec.batch_size,
      networks,
    )
    figures['eval_images'] = names
    page = picture_of(tokenizer, variables, setup.held_out, spec.tile)
    visualize.save_png(page, workdir / 'reconstructions.png')
  write_json(workdir / 'summary.json', figures)
  return figures


def picture_of(tokenizer, variables, source, tile: int) -> Image.Image:
  """At most 12 images, each above its reconstruction from tiles."""
  originals, recons, labels = [], [], []
  for i in sources.spread(len(source), PAGE_IMAGES):
    original, recon = evaluator.reconstruct_tiled(
      tokenizer, variables, source[i], tile
    )
    originals.append(original)
    recons.append(visualize.to_uint8(recon))
    psnr = evaluator.psnr(original, recon)
    labels.append(f'{source.names[i]}  {psnr:.1f} dB')
  title = f'originals above reconstructions, from tokens of {tile}-px tiles'
  return visualize.comparison(originals, recons, labels, title)
