"""A run from its config to a tokenizer on disk, with its figures.

Order: read and check the config, open the data, plan, make the state, step,
export, open the export again and evaluate that: the figures are of the files
that a user gets.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vqrae_jax.errors import Stopped, UserError
from vqrae_jax.losses import adversarial
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import reporting
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as finite
from vqrae_jax.train.checkpoint import Checkpoints, Position, check_skipped
from vqrae_jax.train.reporting import Report, write_json
from vqrae_jax.train.run import Run, check_workdir, host_copy

# ----------------------------------------------------------------------------
# When a run is asked to stop: SIGTERM or Ctrl-C, agreed on by all hosts.
#
# One process minds its own signals. Many ask `jax.distributed`, whose service
# sees a SIGTERM on any host and names one step for all. A second Ctrl-C stops
# at once.


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


# ----------------------------------------------------------------------------
# One run in a workdir: two would interleave their rows and checkpoints.
#
# Process 0 holds workdir/lock by `filelock`: the kernel's lock on an open file,
# so that a killed run leaves none. Who removes the file lets another run start,
# so the first checks before each checkpoint that the file is still its own, and
# stops if not. All hosts agree on what process 0 finds.


def _lock_path(workdir: pathlib.Path) -> pathlib.Path:
  path = workdir / 'lock'
  if path.is_symlink() or (path.exists() and not path.is_file()):
    raise UserError(
      f'{path} is no regular file, and a lock goes there; move it'
    )
  return path


def _locked(path: pathlib.Path) -> filelock.BaseFileLock | None:
  """The lock, held, or None where another run holds it."""
  lock = filelock.FileLock(path, timeout=0)
  try:
    lock.acquire()
  except filelock.Timeout:
    return None
  return lock


def check_no_run_in(workdir: pathlib.Path) -> None:
  """Raises UserError if a run is active there; writes nothing."""
  free, path = True, _lock_path(workdir)
  if not jax.process_index() and path.exists():
    lock = _locked(path)
    free = lock is not None
    if lock:
      lock.release()
  _check(free, workdir)


@contextlib.contextmanager
def only_run_in(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
  """Holds workdir/lock while the body runs; made if absent.

  Yields a check that every host calls before a checkpoint: the file may have
  been removed, and another run started.

  Raises:
    UserError: another process holds it, or that check failed; on every host.
  """
  first, path = not jax.process_index(), _lock_path(workdir)
  lock = mine = None
  if first:
    workdir.mkdir(parents=True, exist_ok=True)
    if lock := _locked(path):
      mine = path.stat().st_ino
  _check(not first or lock is not None, workdir)

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
    if lock:
      lock.release()


def agreed(good: bool) -> bool:
  """What process 0 finds; every host must ask."""
  if jax.process_count() > 1:
    good = bool(multihost_utils.broadcast_one_to_all(np.int32(good)))
  return good


def _check(free: bool, workdir: pathlib.Path) -> None:
  if not agreed(free):
    raise UserError(
      f'another run is active in {workdir}; stop it, or name another --workdir'
    )


# ----------------------------------------------------------------------------
# What tells of an adversarial game that has gone wrong, while it runs.
#
# The usual ways: the discriminator separates everything and nothing more is
# learnt from it; its logits run away; the decoder's adversarial gradient all but
# vanishes, so that the balance lies at its bound. Each is judged by means over
# the steps between two rows of the log, said once, and again only after it had
# stopped.

# A discriminator whose loss is below this share of what guessing gives.
WON = 0.02
RUN_AWAY = 100.0


class Alarms:
  """Listens to a run's steps.

  Args:
    adversary: the plan's second player, of which the starts and the loss's
      name are read; None is silent.
  """

  def __init__(self, adversary: Any):
    self._adversary = adversary
    self._heard: list[Mapping[str, float]] = []
    self._sounding: set[str] = set()
    if adversary is not None:
      zero = jnp.zeros(1)
      loss = adversarial.D_LOSSES[adversary.spec.loss]
      self._guessing = float(loss(zero, zero))

  def hear(self, step: int, metrics: Mapping[str, float]) -> None:
    """The figures of a completed step; those left out tell nothing."""
    player = self._adversary
    if player is None or step <= player.start or metrics['nonfinite']:
      return
    self._heard.append(dict(metrics, heard=step > player.gan_start))

  def words(self) -> list[str]:
    """A line for each alarm that begins, judged by what was heard since the
    last call."""
    heard, self._heard = self._heard, []
    if not heard:
      return []
    now = self._judge(heard)
    new = [line for name, line in now.items() if name not in self._sounding]
    self._sounding = set(now)
    return new

  def _judge(self, heard: list[Mapping[str, float]]) -> dict[str, str]:
    def mean(name):
      return float(np.mean([row[name] for row in heard]))

    found = {}
    loss, real, fake = map(
      mean, ('loss/discriminator', 'logits/real', 'logits/fake')
    )
    if loss < WON * self._guessing:
      found['won'] = (
        f'the discriminator tells every reconstruction (its loss is {loss:.2g},'
        f' guessing gives {self._guessing:.2g}); lower '
        'discriminator.schedule.lr, or add discriminator.lecam or r1'
      )
    if max(abs(real), abs(fake)) > RUN_AWAY:
      found['run away'] = (
        f"the discriminator's logits run away (real {real:.3g}, fake "
        f'{fake:.3g}); add discriminator.lecam or r1, or lower its rate'
      )
    balances = [row['gan_balance'] for row in heard if row['heard']]
    bound = 0.99 * adversarial.MAX_WEIGHT
    if balances and np.mean([b >= bound for b in balances]) > 0.5:
      found['balance'] = (
        'the adversarial gradient has all but vanished: gan_balance lies at '
        f'its bound {adversarial.MAX_WEIGHT:.0e}; start losses.gan later, or '
        'lower discriminator.schedule.lr'
      )
    return found


def _read(metrics: dict[str, jax.Array]) -> dict[str, float]:
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def dry_run(config: Any) -> dict[str, float]:
  """One step, nothing written; its metrics."""
  run = Run(config)
  with jax.set_mesh(run.mesh):
    state, frozen, step = run.start()
    batch = run.place(run.batches.batch(0))
    _, metrics = step(state, frozen, batch)
    metrics = _read(metrics)
  finite.check_finite(1, metrics)
  del metrics['samples']  # a checksum, no figure
  return metrics


def train(
  config: Any,
  workdir: str | pathlib.Path,
  profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Trains as `config` says and leaves everything in `workdir`.

  A workdir with checkpoints goes on from the newest one that is whole.

  Args:
    config: a ConfigDict or mapping (`configs/`).
    workdir: made if absent: config.json, metrics.jsonl, checkpoints/,
      tensorboard/, tokenizer/, summary.json and, with `eval`,
      reconstructions.png.
    profile: (first, last) step of a jax.profiler trace in workdir/profile.

  Returns:
    What summary.json holds.

  Raises:
    UserError: a config that cannot run, a checkpoint of another run, or a
      loss that is no number.
    Stopped: a signal asked for it; the state is saved.
  """
  workdir = pathlib.Path(workdir).expanduser()
  check_workdir(workdir)
  check_no_run_in(workdir)
  run = Run(config)
  _check_profile(profile, run.plan.total_steps)
  every = run.spec.checkpoint.every
  kept = Checkpoints(workdir / 'checkpoints', run.spec.checkpoint.keep)
  if not every and kept.steps():
    raise UserError(
      f'{workdir} has checkpoints, and checkpoint.every=0 would start over '
      'beside them; name another --workdir, or remove its checkpoints'
    )
  seen, manifest = kept.steps(), kept.latest()
  with contextlib.ExitStack() as held:  # the lock, to the last file
    with jax.set_mesh(run.mesh), contextlib.closing(kept):
      if manifest is None:
        state, frozen, step_fn = run.start()
        position = Position()
      else:
        state, frozen, step_fn = run.resume(kept, manifest)
        position = Position.of(manifest)
        if position.step > run.plan.total_steps:
          raise UserError(
            f'{workdir} is at step {position.step}, past the '
            f'{run.plan.total_steps} steps of duration={run.spec.duration!r}; '
            'lengthen it, or name another --workdir'
          )
        if over := _finished(workdir, position.step, run.plan.total_steps):
          _warn_of_changes(workdir / 'config.json', config)
          return over
        logging.info('goes on from step %d', position.step)
      check_lock = held.enter_context(only_run_in(workdir))
      if not agreed(kept.steps() == seen):
        raise UserError(
          f'another run has written to {workdir} since this one began to read '
          'it; start the command again'
        )
      _note_config(config, workdir, changed=manifest is not None)
      logging.info('%s; the first step compiles', run.describe())
      if every:
        kept.begin_from(position.step)
      going = _Going(run, workdir, kept, frozen, position, profile)
      going.check_lock = check_lock
      with contextlib.closing(going.report), StopRequest() as stop:
        state = going.steps(state, step_fn, stop)
      variables = host_copy(
        state_lib.variables_of(state, frozen, ema=True), run.mesh
      )
    return reporting.finish(run, variables, workdir, going.figures())


def _finished(
  workdir: pathlib.Path, step: int, total: int
) -> dict[str, Any] | None:
  """What summary.json holds, if the run is over: then all of it stays."""
  path = workdir / 'summary.json'
  if step < total or not (path.exists() and (workdir / 'tokenizer').is_dir()):
    return None
  try:
    figures = dict(json.loads(path.read_bytes()))
  except (ValueError, TypeError):
    return None
  if figures.get('steps') != total:
    return None
  logging.warning(
    '%s is finished (%d steps): nothing is trained or written; lengthen '
    'duration, or name another --workdir', workdir, total,
  )  # fmt: skip
  return figures


def _check_profile(profile: tuple[int, int] | None, total: int) -> None:
  if profile and profile[1] > total:
    raise UserError(
      f'--profile={profile[0]}:{profile[1]} ends after the {total} steps of '
      'the run'
    )


def _note_config(config: Any, workdir: pathlib.Path, changed: bool) -> None:
  """Writes config.json; says what a resumed run changes in it."""
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'config.json'
  if changed:
    _warn_of_changes(path, config)
  write_json(path, config_lib.plain(config))


def _warn_of_changes(path: pathlib.Path, config: Any) -> None:
  """A line for each key that is not as config.json has it, if it has any."""
  if not path.exists():
    return
  now = json.loads(json.dumps(config_lib.plain(config), default=str))
  try:
    old = trees.flatten(dict(json.loads(path.read_bytes())))
  except (ValueError, TypeError) as e:
    logging.warning('%s is damaged (%s): no comparing with it', path, e)
    return
  new = trees.flatten(now)
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      logging.warning(
        'the config changed: %s was %s, is %s',
        name.replace('/', '.'),
        old.get(name),
        new.get(name),
      )


class _Going:
  """The loop's bookkeeping: what is pending, written, saved and measured."""

  def __init__(self, run, workdir, kept, frozen, position, profile):
    self.run, self.workdir, self.kept = run, workdir, kept
    self.frozen, self.position, self.profile = frozen, position, profile
    self.shown = reporting.Shown(run, frozen)
    self.alarms = Alarms(run.plan.adversary)
    self.measured: dict[int, dict[str, float]] = {}
    self.first = position.step
    spec = run.spec
    self.report = Report(
      workdir,
      total_steps=run.plan.total_steps,
      batch_size=spec.batch_size,
      tensorboard=spec.log.tensorboard,
      start_step=self.first,
    )
    self.pending: tuple[int, Any] | None = None
    self.began = self.compiled = self.ended = time.perf_counter()
    self.waited = 0.0
    if spec.checkpoint.every:
      self.says = {
        'run': run.identity(),
        'frozen': run.frozen_record(frozen),
      }

  def steps(self, state, step_fn, stop) -> Any:
    """All that is left of the run; the last state."""
    run, spec, total = self.run, self.run.spec, self.run.plan.total_steps
    batches = run.batches.iterate(self.first)
    for number in range(self.first + 1, total + 1):
      self._profile(number, start=True)
      asked = time.perf_counter()
      batch = run.place(next(batches))
      self.waited += time.perf_counter() - asked
      state, metrics = step_fn(state, self.frozen, batch)
      # One step behind, so the device always has work.
      self._settle()
      self.pending = (number, metrics)
      if number == self.first + 1:
        jax.block_until_ready(metrics)
        self.compiled, self.waited = time.perf_counter(), 0.0
      self._profile(number, start=False)
      self._show(state, number)
      stopping = stop.wanted(number) and number < total
      every = spec.checkpoint.every
      if every and (number % every == 0 or number == total or stopping):
        self._settle()
        # While steps are left out the checkpoint before them stays the newest:
        # should the state be spoilt, older ones are not pushed out.
        if not self.position.nonfinite_in_a_row or number == total or stopping:
          self._save(state)
      if stopping:
        self._stop(stop, number)
    self._settle()
    self.ended = time.perf_counter()
    return state

  def _show(self, state, number: int) -> None:
    """Pictures and held-out figures, where the config asks for them."""
    spec, last = self.run.spec, number == self.run.plan.total_steps
    every = spec.log.images_every
    if every and (number % every == 0 or last):
      picture = self.shown.picture(state)
      self.report.images(number, picture)
      reporting.save(picture, self.workdir, number)
    every = spec.eval.every if spec.eval is not None else 0
    if every and (number % every == 0 or last):
      self.measured[number] = self.shown.figures(state)

  def _settle(self) -> None:
    """Reads the pending step's metrics, listens to them, writes its row."""
    if self.pending is None:
      return
    run, (number, metrics) = self.run, self.pending
    self.pending = None
    metrics = _read(metrics)
    self.position = self.position.after(number, metrics)
    self._check_nonfinite(number, metrics)
    self.report.unreadable(run.batches.unreadable)
    check_skipped(run, self.position, self.workdir)
    self.report.step()
    self.alarms.hear(number, metrics)
    measured = self.measured.pop(number, {})
    every, last = run.spec.log.every, number == run.plan.total_steps
    if number % every == 0 or last or measured:
      for words in self.alarms.words():
        logging.warning('step %d: %s', number, words)
      wait, self.waited = self.waited, 0.0
      row = run.heard(number, metrics)
      row |= run.rates_at(number - 1, self.position.nonfinite)
      row['nonfinite'] = self.position.nonfinite
      row['skipped'] = self.position.skipped
      row['samples'] = f'{self.position.samples:08x}'
      self.report.row(number, row | measured, wait)

  def _check_nonfinite(self, number: int, metrics) -> None:
    """Says that a step was left out; stops where too many are."""
    words = finite.problem(number, metrics)
    if not words:
      return
    in_a_row = self.position.nonfinite_in_a_row
    most = self.run.spec.max_nonfinite
    if in_a_row <= most and self.position.nonfinite < self.run.plan.total_steps:
      logging.warning(
        '%s: the step is left out, %d in a row (max_nonfinite=%d)',
        words, in_a_row, most,
      )  # fmt: skip
      return
    streak = f', {in_a_row} steps in a row' if in_a_row > 1 else ''
    words = f'{words}{streak}; {finite.REMEDY}'
    self.kept.wait()
    if steps := self.kept.steps():
      # Its values may be finite and spoilt: only a step later shows it.
      words += (
        f'; the same command goes on from step {steps[-1]}: should that be '
        f'spoilt too, remove {self.workdir}/checkpoints/{steps[-1]:08d}.json'
      )
    raise finite.NonFinite(words)

  def _save(self, state) -> None:
    self.check_lock()
    position = dataclasses.asdict(self.position)
    self.kept.save(
      self.position.step, state, {**self.says, 'position': position}
    )

  def _stop(self, stop, number) -> None:
    if not self.run.spec.checkpoint.every:
      raise Stopped(
        f'by {stop.name} after step {number}; without checkpoints '
        '(checkpoint.every=0) the run starts over'
      )
    self.kept.wait()
    raise Stopped(
      f'by {stop.name} after step {number}, which is saved in '
      f'{self.workdir}/checkpoints; the same command goes on from there'
    )

  def _profile(self, number: int, start: bool) -> None:
    if not self.profile:
      return
    if start and number == self.profile[0]:
      jax.profiler.start_trace(str(self.workdir / 'profile'))
    if not start and number == self.profile[1]:
      jax.block_until_ready(self.pending)
      jax.profiler.stop_trace()

  def figures(self) -> dict[str, Any]:
    """Steps and speed, this process's own."""
    total, run = self.run.plan.total_steps, self.run
    found: dict[str, Any] = {
      'steps': total,
      'samples': f'{self.position.samples:08x}',
      'skipped': self.position.skipped,
      'train_seconds': self.ended - self.began,
    }
    done = total - self.first - 1
    if done > 0:
      seconds = max(self.ended - self.compiled, 1e-9)
      found['images_per_second'] = done * run.spec.batch_size / seconds
    return found
