"""A run from its config to a tokenizer on disk, with its figures.

Four stages, each one value: `read_config` (pure), `setup` (everything static),
`initialize` or `restore` (the state), `run` (the steps). Then the tokenizer is
exported, opened again and evaluated: the figures are of the files that a user
gets.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vqrae_jax import export, hosts, sharding
from vqrae_jax.errors import Stopped, UserError, read_json
from vqrae_jax.files import Path, is_url, write_json
from vqrae_jax.paths import check_writable
from vqrae_jax.train import compile_cache, reporting
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.checkpoint import Checkpoints, Position
from vqrae_jax.train.gan import Alarms, active_metrics
from vqrae_jax.train.initialize import (
  Started,
  initialize,
  reachable,
  restore,
)
from vqrae_jax.train.reporting import finish
from vqrae_jax.train.setup import Setup
from vqrae_jax.train.step import judged
from vqrae_jax.types import Tree

REMEDY = 'lower the learning rate, lengthen the warm-up, or compute in float32'


class NonFinite(UserError):
  """Losses or gradients that are not finite; the run stops."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
  """`with stop_requests() as stop: … if stop(step): …`: SIGTERM or Ctrl-C,
  agreed on by all hosts.

  One process handles its own signals. Many ask `jax.distributed`, whose
  service sees a SIGTERM on any host and names one step for all. A second
  Ctrl-C stops at once.

  Yields a function of the completed steps, which every host calls after each:
  what asked to stop, or None.
  """
  alone = jax.process_count() == 1
  received: list[int] = []

  def note(number, frame):
    del frame
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)

  def stop(step: int) -> str | None:
    if alone:
      return signal.Signals(received[-1]).name if received else None
    reached = multihost_utils.reached_preemption_sync_point(step)
    return 'the scheduler' if reached else None

  # Signals reach the main thread only; the service has its own handler.
  main = threading.current_thread() is threading.main_thread()
  handled = (signal.SIGTERM, signal.SIGINT) if alone and main else ()
  old = {number: signal.signal(number, note) for number in handled}
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


# ----------------------------------------------------------------------------
# One run in a workdir: two would interleave their rows and checkpoints.
#
# Process 0 holds workdir/lock by `filelock`: the kernel's lock on an open file,
# so that a killed run leaves none. Who removes the file lets another run start,
# so the first checks before each checkpoint that the file is still its own, and
# stops if not. All hosts agree on what process 0 finds.


def check_no_run_in(workdir: Path) -> None:
  """Raises UserError if a run is active there; makes nothing."""
  if not is_url(workdir) and agreed(os.path.lexists(workdir / 'lock')):
    with only_run_in(workdir):
      pass


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[Callable[[], None]]:
  """Holds workdir/lock while the body runs; made if absent.

  Yields a check that every host calls before a checkpoint: the file may have
  been removed, and another run started.

  Raises:
    UserError: another process holds it, or that check failed; on every host.
  """
  if is_url(workdir):  # a bucket has no locks
    yield lambda: None
    return
  first, path = not jax.process_index(), workdir / 'lock'
  if path.is_symlink() or (path.exists() and not path.is_file()):
    raise UserError(f'{path} is no regular file for a lock; move it')
  lock, mine = filelock.FileLock(path, timeout=0), None
  if first:
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(filelock.Timeout):
      lock.acquire()
      mine = path.stat().st_ino
  if not agreed(mine is not None):
    raise UserError(
      f'another run is active in {workdir}; stop it, or name another --workdir'
    )

  def check() -> None:
    there = path.stat().st_ino if first and path.exists() else None
    if not agreed(there == mine):
      raise UserError(
        f'{path} was removed while this run was active, so another may have '
        'started; stop that, and start the command again'
      )

  try:
    yield check
  finally:
    lock.release()


def agreed(good: bool) -> bool:
  """What process 0 finds; every host must ask."""
  return bool(multihost_utils.broadcast_one_to_all(np.int32(good)))


def train(
  config: Any,
  workdir: str | os.PathLike,
  profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Trains as `config` says and leaves everything in `workdir`.

  A workdir with checkpoints resumes from the newest one that verifies.

  Args:
    config: a ConfigDict or mapping (`configs/`).
    workdir: a folder, or gs://…; made if absent: config.json, metrics.jsonl,
      checkpoints/, tensorboard/, tokenizer/, summary.json and, with `eval`,
      reconstructions.png.
    profile: (first, last) step of a jax.profiler trace in workdir/profile.

  Returns:
    What summary.json holds.

  Raises:
    UserError: a config that cannot run, a checkpoint of another run, or losses
      that are not finite.
    Stopped: a signal asked for it; the state is saved.
  """
  workdir = reachable(workdir, '--workdir')
  check_workdir(workdir)
  check_no_run_in(workdir)
  setup = setup_lib.setup(config_lib.read_config(config))
  total, spec = setup.total_steps, setup.config.checkpoint
  if profile and (last := profile[1]) > total:
    raise UserError(f'--profile={profile[0]}:{last} is past the {total} steps')
  checkpoints = Checkpoints(workdir / 'checkpoints', spec.keep)
  seen = checkpoints.steps()
  if seen and not spec.every:
    raise UserError(
      f'{workdir} has checkpoints, and checkpoint.every=0 would start over '
      'beside them; name another --workdir, or remove its checkpoints'
    )
  with contextlib.ExitStack() as lock:  # held to the last file
    lock.enter_context(hosts.loss_reported())
    setup.check_agreement()
    reporting.check_wandb(setup.config)
    with jax.set_mesh(setup.mesh), contextlib.closing(checkpoints):
      manifest = checkpoints.latest()
      position = Position(**(manifest['position'] if manifest else {}))
      if position.step > total:
        raise UserError(
          f'{workdir} is at step {position.step}, past the {total} steps of '
          f'duration={setup.config.duration!r}; lengthen it, or name another '
          '--workdir'
        )
      if manifest is None:
        started = initialize(setup)
      else:
        started = restore(setup, checkpoints, manifest)
        figures = reporting.read_summary(workdir)
        exported = (workdir / 'tokenizer').is_dir()
        if exported and position.step == figures.get('steps') == total:
          logging.warning(
            '%s is finished (%d steps): nothing is trained or written; '
            'lengthen duration, or name another --workdir', workdir, total,
          )  # fmt: skip
          _warn_of_changes(workdir / 'config.json', config)
          return figures
        logging.info('resumed from step %d', position.step)
        if profile and profile[1] <= position.step:
          logging.warning(
            '--profile=%d:%d: these steps are done, nothing is traced', *profile
          )
      networks = reporting.eval_networks(setup.config)
      check_lock = lock.enter_context(only_run_in(workdir))
      if not agreed(checkpoints.steps() == seen):
        raise UserError(
          f'another run has written to {workdir} since this one began to read '
          'it; start the command again'
        )
      if not jax.process_index():
        workdir.mkdir(parents=True, exist_ok=True)
        if manifest is not None:
          _warn_of_changes(workdir / 'config.json', config)
        write_json(workdir / 'config.json', config_lib.recorded(config))
      logging.info('%s', setup.describe())
      if spec.every:
        checkpoints.begin_from(position.step)
      state, figures = run(
        setup, started, networks, workdir, checkpoints, position, check_lock,
        profile,
      )  # fmt: skip
      variables = state_lib.variables_of(state, started.frozen, ema=True)
      variables = sharding.host_copy(variables, setup.mesh, everywhere=False)
    return finish(setup, networks, variables, workdir, figures)


def dry_run(config: Any) -> dict[str, float]:
  """One step, nothing written; its metrics."""
  setup = setup_lib.setup(config_lib.read_config(config))
  with hosts.loss_reported(), jax.set_mesh(setup.mesh):
    setup.check_agreement()
    reporting.check_wandb(setup.config)
    reporting.eval_networks(setup.config)
    started = initialize(setup)
    batch = setup.place(setup.batches.batch(0))
    hparams = setup_lib.f32(setup.hparams)
    state, metrics = setup.train_step()(
      started.state, started.frozen, hparams, batch
    )
    metrics = _floats(metrics | setup.update_norms()(state, hparams))
  logging.info('%s', setup.describe())
  if words := nonfinite(1, metrics):
    raise NonFinite(f'{words}; {REMEDY}')
  return metrics


def run(
  setup: Setup,
  started: Started,
  networks: Tree,
  workdir: Path,
  checkpoints: Checkpoints,
  position: Position,
  check_lock: Callable[[], None],
  profile: tuple[int, int] | None,
) -> tuple[Any, dict[str, Any]]:
  """(the last state, the run's figures): all steps that are left.

  Args:
    setup: everything static.
    started: the state, the frozen trees and their record.
    networks: of the held-out metrics.
    workdir: where rows, pictures and checkpoints go.
    checkpoints: where the state is saved.
    position: of `started.state`.
    check_lock: is called before each checkpoint.
    profile: steps of a trace, or None.
  """
  visualizer = reporting.Visualizer(setup, started.frozen, networks)
  loop = _Loop(setup, visualizer, workdir, checkpoints, position)
  total, every = setup.total_steps, setup.config.checkpoint.every
  state, step_fn = started.state, setup.train_step()
  update_norms = setup.update_norms()
  hparams = setup_lib.f32(setup.hparams)
  batches = setup.batches.iterate(position.step)
  compiled = set()  # shapes of images
  with (
    contextlib.closing(loop.report),
    stop_requests() as stop,
    contextlib.ExitStack() as trace,
  ):
    for number in range(position.step + 1, total + 1):
      if profile and number == max(profile[0], position.step + 1) <= profile[1]:
        trace.enter_context(jax.profiler.trace(str(workdir / 'profile')))
      asked = time.perf_counter()
      batch = next(batches)
      loop.wait(time.perf_counter() - asked)
      batch = setup.place(batch)
      state, metrics = step_fn(state, started.frozen, hparams, batch)
      if loop.has_row(number):
        metrics |= update_norms(state, hparams)
      # One step behind, so that the device always has work.
      loop.settle()
      loop.pending = (number, metrics)
      if (shape := batch['images'].shape) not in compiled:
        compiled.add(shape)
        jax.block_until_ready(metrics)
        logging.info(
          'step %d, the first at %dx%d pixels, took %.0f s with compiling',
          number, *shape[1:3], time.perf_counter() - asked,
        )  # fmt: skip
        compile_cache.log_saved()
        # Speed is measured from here.
        loop.ready, loop.waited = time.perf_counter(), 0.0
        loop.waited_in_all, loop.measured = 0.0, number
        loop.report.measure_from(number)
      if profile and number == profile[1]:
        jax.block_until_ready(metrics)
        trace.close()
      loop.show(state, number)
      stopped_by = stop(number) if number < total else None
      last = number == total or stopped_by
      if every and (number % every == 0 or last):
        loop.settle()
        # While steps are skipped the checkpoint before them stays the newest:
        # a state that only later steps show to be bad replaces no good one.
        if last or not loop.position.nonfinite_in_a_row:
          check_lock()
          manifest = {
            'run': setup.identity(),
            'frozen': started.record,
            'position': dataclasses.asdict(loop.position),
          }
          checkpoints.save(number, state, manifest)
      if stopped_by:
        loop.stop(stopped_by)
    loop.settle()
    figures = loop.figures()
    # A signal meanwhile finds the last state on disk too.
    checkpoints.wait()
    if every and (stopped_by := stop(total)):
      loop.stop(stopped_by)
  return state, figures


class _Loop:
  """The loop's bookkeeping: what is pending, written, saved and measured."""

  def __init__(
    self,
    setup: Setup,
    visualizer: reporting.Visualizer,
    workdir: Path,
    checkpoints: Checkpoints,
    position: Position,
  ):
    self.setup, self.visualizer, self.workdir = setup, visualizer, workdir
    self.checkpoints, self.position = checkpoints, position
    self.first = position.step
    config = setup.config
    tokens = math.prod(setup.tokenizer.index_shape(*config.data.size))
    tokens *= config.log.usage_window * config.batch_size
    tokens //= setup.tokenizer.quantizer.codes_per_token  # of each codebook
    reachable = min(tokens / max(setup.tokenizer.codebook_size, 1), 1.0)
    warmup = self.first + config.log.usage_window
    self.alarms = Alarms(setup.step.gan, setup.hparams, warmup, reachable)
    self.evaluated: dict[int, dict[str, float]] = {}
    self.report = reporting.Report(workdir, setup, self.first)
    self.pending: tuple[int, Any] | None = None
    self.began = self.ready = time.perf_counter()
    self.measured = self.first  # the step that speed is measured from
    self.waited = self.waited_in_all = 0.0

  def _due(self, every: int, number: int) -> bool:
    """Each so many steps, and the last one; 0: never."""
    last = number == self.setup.total_steps
    return bool(every) and (number % every == 0 or last)

  def _evaluates(self, number: int) -> bool:
    spec = self.setup.config.eval
    return spec is not None and self._due(spec.every, number)

  def has_row(self, number: int) -> bool:
    """Whether a step has a row of metrics."""
    return self._due(self.setup.config.log.every, number) or self._evaluates(
      number
    )

  def wait(self, seconds: float) -> None:
    """A batch came after so many. At most so long the device waited, where it
    had ended its step before that."""
    _, metrics = self.pending or (0, {})
    if all(x.is_ready() for x in metrics.values()):
      self.waited += seconds
      self.waited_in_all += seconds

  def show(self, state: Any, number: int) -> None:
    """Pictures and held-out figures, where the config asks for them."""
    every = self.setup.config.log.images_every
    if self._due(every, number):
      self.report.picture(number, self.visualizer.picture(state))
    if self._evaluates(number):
      self.evaluated[number] = self.visualizer.figures(state)

  def settle(self) -> None:
    """Reads the pending step's metrics, checks them, writes its row."""
    if self.pending is None:
      return
    setup, (number, metrics) = self.setup, self.pending
    self.pending = None
    metrics = _floats(metrics)
    self.position = self.position.after(number, metrics)
    self._check_nonfinite(number, metrics)
    self.report.unreadable(setup.batches.unreadable)
    self._check_skipped()
    self.report.step()
    self.alarms.add(number, metrics)
    if self.has_row(number):
      for warning in self.alarms.warnings():
        logging.warning('step %d: %s', number, warning)
      wait, self.waited = self.waited, 0.0
      row = active_metrics(number, metrics, setup.hparams)
      skipped = int(metrics['nonfinite'])
      row |= setup.rates_at(number - 1, self.position.nonfinite - skipped)
      if skipped:  # the state's last update is that of a step before
        row |= {n: 0.0 for n in row if n.endswith('update_norm')}
      row['nonfinite'] = self.position.nonfinite
      row['skipped'] = self.position.skipped
      self.report.row(number, row | self.evaluated.pop(number, {}), wait)

  def _check_nonfinite(self, number: int, metrics: Mapping) -> None:
    """Logs that a step was skipped; stops where too many are."""
    words = nonfinite(number, metrics)
    if not words:
      return
    most, position = self.setup.config.max_nonfinite, self.position
    in_a_row = position.nonfinite_in_a_row
    if in_a_row <= most and position.nonfinite < self.setup.total_steps:
      logging.warning(
        '%s: the step is skipped, %d in a row (max_nonfinite=%d)',
        words, in_a_row, most,
      )  # fmt: skip
      return
    streak = f', {in_a_row} steps in a row' if in_a_row > 1 else ''
    self.checkpoints.wait()
    resume = ''
    if steps := self.checkpoints.steps():
      # Its values may be finite and bad: only a later step shows it.
      resume = (
        f'; the same command resumes from step {steps[-1]}; if that state is '
        f'bad too, remove {self.workdir}/checkpoints/{steps[-1]:08d}'
      )
    raise NonFinite(f'{words}{streak}; {REMEDY}{resume}')

  def _check_skipped(self) -> None:
    """Stops a run whose images are unreadable more often than allowed."""
    setup, position = self.setup, self.position
    samples = position.step * setup.config.batch_size
    share = setup.config.data.max_skipped
    # Each epoch draws every unreadable image once, the current one too.
    epochs = -(-samples // len(setup.source))
    most = int(round(share * epochs * len(setup.source), 6))
    if position.skipped <= most:
      return
    here = reversed(setup.batches.unreadable.items())
    name, reason = next(here, ('another host', 'see its log'))
    raise UserError(
      f'{position.skipped} unreadable images were drawn for {samples} samples; '
      f'data.max_skipped={share} allows {most}; the last was {name}: {reason}; '
      f'{self.workdir}/unreadable.jsonl names them: repair or remove them, or '
      'raise data.max_skipped'
    )

  def stop(self, signal_name: str) -> None:
    """Ends the run as a signal asked; raises Stopped."""
    step = self.position.step
    if not self.setup.config.checkpoint.every:
      raise Stopped(
        f'by {signal_name} after step {step}; without checkpoints '
        '(checkpoint.every=0) the run starts over'
      )
    self.checkpoints.wait()
    raise Stopped(
      f'by {signal_name} after step {step}, which is saved in '
      f'{self.workdir}/checkpoints; the same command resumes from there, and '
      f'python -m vqrae_jax.train.export --run={self.workdir} '
      '--out=tokenizer writes its tokenizer'
    )

  def figures(self) -> dict[str, Any]:
    """Steps and speed, this process's own."""
    total, ended = self.setup.total_steps, time.perf_counter()
    found: dict[str, Any] = dict(steps=total, skipped=self.position.skipped)
    found['train_seconds'] = ended - self.began
    if (steps := total - self.measured) > 0:
      images = steps * self.setup.config.batch_size
      seconds = max(ended - self.ready, 1e-9)
      found['images_per_second'] = images / seconds
      found['data_wait'] = min(self.waited_in_all / seconds, 1.0)
    return found


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def nonfinite(step: int, metrics: Mapping[str, float]) -> str:
  """Which of a step's losses and norms are not finite; '' if all are."""
  names = sorted(metrics.keys() - {'skipped', 'nonfinite'})
  bad = [n for n in names if judged(n) and not np.isfinite(metrics[n])]
  if not bad:
    return ''
  values = ', '.join(f'{n}={metrics[n]:.4g}' for n in names)
  return f'{", ".join(bad)} not finite at step {step} ({values})'


def check_workdir(workdir: Path) -> None:
  """The workdir can be made, and its tokenizer folder can be replaced."""
  if is_url(workdir):
    return
  check_writable(workdir, '--workdir')
  if re.search(r'[][\\]', os.path.abspath(workdir)):
    raise UserError(
      f'--workdir={workdir}: Orbax takes [, ] and \\ in a path for a pattern '
      'and would write checkpoints that cannot be read; name another'
    )
  folder = workdir / 'checkpoints'
  if os.path.lexists(folder) and not folder.is_dir():
    raise UserError(f'{folder} is not a folder for checkpoints; move it')
  export.check_target(workdir / 'tokenizer')


def _warn_of_changes(path: Path, config: Any) -> None:
  """A warning for each key that is not as config.json has it."""
  if not path.exists():
    return
  try:
    old = read_json(path)
  except UserError as e:
    logging.warning('%s; it is not compared', e)
    return
  now = config_lib.recorded(config)
  for key, (before, after) in config_lib.differences(old, now).items():
    logging.warning('the config changed: %s was %s, is %s', key, before, after)
