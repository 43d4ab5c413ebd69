"""Checkpoints: Orbax arrays, and a manifest that vouches for them.

  checkpoints/00001000/      Orbax: every leaf of the state, none of Frozen
  checkpoints/00001000.json  the manifest, written last

A flipped bit restores in silence and an empty folder passes for a step
(orbax-checkpoint 0.12.8, 2026-11). So a step counts only by its manifest, which
holds the SHA-256 of each file, the leaves, and what the caller says of the
run: data position, hashes of frozen trees. A step that does not verify is
named, and the one before it is taken.

Saving is asynchronous: the arrays are copied to the host, the rest happens
behind the next steps. On many hosts the folder is one that all of them see.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging as std_logging
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees

# ----------------------------------------------------------------------------
# Where a run is in its data, and what it met on the way there.


@dataclasses.dataclass
class Position:
  """All that a checkpoint needs beside arrays.

  Attributes:
    step: completed steps; the next sample is step x batch_size.
    skipped: unreadable photographs met so far, over all hosts.
    nonfinite: steps left out so far (`finite.py`).
    nonfinite_in_a_row: those of them since the last that counted.
  """

  step: int = 0
  skipped: int = 0
  nonfinite: int = 0
  nonfinite_in_a_row: int = 0

  @classmethod
  def of(cls, manifest: Mapping[str, Any]) -> 'Position':
    """The position that a checkpoint's manifest tells.

    Raises:
      UserError: it tells none, or one of another version of this package.
    """
    try:
      return cls(**manifest['position'])
    except (KeyError, TypeError) as e:
      raise UserError(
        f'checkpoint {manifest["step"]}: its manifest tells no position '
        f'({e}); go on with the version of vqrae_jax that wrote it'
      ) from None

  def after(self, step: int, metrics: Mapping[str, float]) -> 'Position':
    """The position after a step, by what the step read and said."""
    spoilt = int(metrics['nonfinite'])
    return Position(
      step=step,
      skipped=self.skipped + int(metrics['skipped']),
      nonfinite=self.nonfinite + spoilt,
      nonfinite_in_a_row=spoilt and self.nonfinite_in_a_row + 1,
    )


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """A checkpoint's run is the one that the config describes.

  Raises:
    UserError: with the first key that differs.
  """
  old, new = trees.flatten(before), trees.flatten(now)
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      key = name.replace('/', '.')
      raise UserError(
        f'the run in this workdir has {key}={old.get(name)}, the config says '
        f'{new.get(name)}; go back to that, or name another --workdir'
      )


# ----------------------------------------------------------------------------
# What a resumed run's config may not change: the leaves of its state.
#
# A checkpoint names every leaf it holds. Where a config asks for others, the
# keys that do so are named, and not the leaves of an optimizer.

_TRAINED, _OPTIMIZER = 'tokenizer/params/', 'tokenizer/opt_state/'


def check_same_leaves(
  before: Mapping[str, tuple[int, ...]],
  now: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  """A config's state has the leaves that a checkpoint holds.

  Args:
    before: {leaf name: shape} of the checkpoint.
    now: the same of the config.
    where: the run's workdir, for the error.

  Raises:
    UserError: with the keys that made them differ. What no key explains is
      left to `Checkpoints.restore`, which names leaves.
  """
  why = _reasons(before, now)
  if why:
    raise UserError(
      f'the run in {where} cannot go on: {"; ".join(why)}; go back to that, '
      f'or name another --workdir with --config.init_from={where}'
    )


def _reasons(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  was, wants = (_under(_TRAINED, side) for side in (before, now))
  why = []
  for names, verb, other in (
    (sorted(was - wants), 'freeze', 'trained'),
    (sorted(wants - was), 'train', 'kept frozen'),
  ):
    if names:
      more = f' and {len(names) - 1} more' if len(names) > 1 else ''
      why.append(f'schedules {verb} {names[0]}{more}, which it {other}')
  if why:  # the other leaves follow those
    return why
  had, has = (bool(_under('ema/', side)) for side in (before, now))
  if had != has:
    why.append(
      'ema=0, and it kept a moving average'
      if had
      else 'ema is above 0, and it kept no moving average'
    )
  old, new = before.get('usage'), now.get('usage')
  if old and new and old[0] != new[0]:
    why.append(f'log.usage_window={new[0]}, and it had {old[0]}')
  if _under(_OPTIMIZER, before) != _under(_OPTIMIZER, now):
    why.append(
      'optim.clip or optim.weight_decay is on where it was off, or the other '
      'way round'
    )
  return why


def _under(prefix: str, leaves: Mapping[str, Any]) -> set[str]:
  return {n.removeprefix(prefix) for n in leaves if n.startswith(prefix)}


MANIFEST_VERSION = 1
# What a run writes; a folder that a user put beside it is never touched.
_OURS = re.compile(r'[0-9]{8,}(\.json|\.orbax-checkpoint-tmp.*)?$')


def as_leaves(tree: Any) -> dict[str, Any]:
  """{leaf name: array or shape} as they are stored: keys as their data.

  Arrays of no element are left out, which Orbax cannot store.
  """

  def data(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      if isinstance(leaf, jax.ShapeDtypeStruct):
        plain = jax.eval_shape(jax.random.key_data, leaf)
        return plain.update(sharding=leaf.sharding)
      return jax.random.key_data(leaf)
    return leaf

  return {
    name: data(leaf) for name, leaf in trees.flatten(tree).items() if leaf.size
  }


def from_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """`as_leaves`' inverse, in the form of `tree`."""

  def made(name, leaf):
    if not leaf.size:
      return jnp.zeros(leaf.shape, leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(leaves[name])
    return leaves[name]

  return trees.map_named(made, tree)


def _table(leaves: Mapping[str, Any]) -> dict[str, list]:
  return {n: [list(x.shape), str(x.dtype)] for n, x in sorted(leaves.items())}


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
  """SHA-256 of a manifest as JSON, whatever the order of its keys."""
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: pathlib.Path) -> dict[str, str]:
  """{relative path: SHA-256} of every file."""
  return {
    str(p.relative_to(folder)): _sha256(p)
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


@contextlib.contextmanager
def _quiet():
  """Orbax explains a damaged file in hundreds of lines; one is enough."""
  loggers = [std_logging.getLogger(n) for n in ('absl', 'orbax')]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(std_logging.CRITICAL)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, folder: pathlib.Path, keep: int = 3):
    """Args:
    folder: made at the first save.
    keep: how many of the newest stay.
    """
    self._folder = folder.absolute()
    self._keep = keep
    self._saver: ocp.AsyncCheckpointer | None = None
    self._thread: threading.Thread | None = None
    self._failure: Exception | None = None

  def __str__(self) -> str:
    return str(self._folder.parent)

  # -- reading ---------------------------------------------------------------
  def steps(self) -> list[int]:
    """Steps that have a manifest, oldest first."""
    return sorted(
      int(p.stem) for p in self._folder.glob('*.json') if _OURS.match(p.name)
    )

  def latest(self) -> dict[str, Any] | None:
    """The manifest of the newest step that verifies; None without any.

    Raises:
      UserError: there are steps, and none of them verifies.
    """
    chosen, why = -1, ''
    if jax.process_index() == 0:
      chosen, why = self._newest_whole()
    if jax.process_count() > 1:
      chosen = int(multihost_utils.broadcast_one_to_all(np.int64(chosen)))
    if chosen == -2:
      raise UserError(
        f'no checkpoint in {self._folder} is whole ({why}); remove the folder '
        'to start the run over'
      )
    return None if chosen == -1 else self._manifest(chosen)

  def _newest_whole(self) -> tuple[int, str]:
    """(step, ""), or -1 without any checkpoint, or -2 with none whole."""
    found = self.steps()[::-1]
    why = ''
    for step in found:
      fault = self._fault(step)
      if fault is None:
        return step, ''
      logging.warning('checkpoint %d is not used: %s', step, fault)
      why = why or f'step {step}: {fault}'
    return (-2, why) if found else (-1, '')

  def _fault(self, step: int) -> str | None:
    """What is wrong with a step's files, or None."""
    try:
      manifest = self._manifest(step)
      want = manifest['files']
      version = manifest['version']
    except (OSError, ValueError, KeyError, TypeError) as e:
      return f'its manifest cannot be read ({e!r})'
    if version != MANIFEST_VERSION:
      return f'its manifest has version {version}, not {MANIFEST_VERSION}'
    # Manifests of before 2026-12 have no digest of their own.
    digest = manifest.pop('digest', None)
    if digest not in (None, _digest(manifest)) or manifest.get('step') != step:
      return 'its manifest is changed since it was written'
    folder = self._path(step)
    try:
      have = _files(folder)
    except OSError as e:
      return str(e)
    for name in sorted(want.keys() | have.keys()):
      if want.get(name) != have.get(name):
        what = 'missing' if name not in have else 'changed since it was written'
        return f'{folder.name}/{name} is {what}'
    return None

  def restore(
    self, manifest: Mapping[str, Any], target: Any, *, part: bool = False
  ) -> Any:
    """The arrays of a step, laid out as `target` says.

    Args:
      manifest: from `latest`.
      target: the state as ShapeDtypeStructs with shardings, on any mesh.
      part: `target` may hold a part of the leaves.

    Raises:
      UserError: the checkpoint holds other leaves than the target.
    """
    want, have = as_leaves(target), manifest['leaves']
    step = manifest['step']
    shapes = {
      n: jax.ShapeDtypeStruct(shape, dtype)
      for n, (shape, dtype) in have.items()
      if not part or n in want
    }
    trees.check_same(want, shapes, f'checkpoint {step} in {self._folder}')
    options = ocp.args.PyTreeRestore(
      item=trees.unflatten(want),
      restore_args=ocp.checkpoint_utils.construct_restore_args(
        trees.unflatten(want)
      ),
      partial_restore=part,
    )
    try:
      with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(self._path(step), args=options)
    except (ValueError, OSError, KeyError) as e:
      words = str(e).split('\n')[0][:200]
      raise UserError(
        f'checkpoint {step} in {self._folder} cannot be read: {words}; '
        f'remove {self._path(step).name}.json to go back to the one before it'
      ) from None
    return from_leaves(target, trees.flatten(found))

  # -- writing ---------------------------------------------------------------
  def begin_from(self, step: int) -> None:
    """Forgets what lies after `step`: torn saves and steps not taken."""
    if jax.process_index() or not self._folder.is_dir():
      return
    for later in self.steps():
      if later > step:
        self._manifest_path(later).unlink()
    kept = {self._path(s).name for s in self.steps()}
    for path in self._folder.iterdir():
      ours = path.is_dir() and _OURS.match(path.name)
      if ours and path.name not in kept:
        shutil.rmtree(path, ignore_errors=True)

  def save(self, step: int, state: Any, says: Mapping[str, Any]) -> None:
    """Saves a state; returns when it is copied, not when it is written.

    Args:
      step: completed steps; what is saved under it already is replaced.
      state: arrays on any devices.
      says: plain JSON, kept in the manifest.
    """
    self.wait()
    if jax.process_index() == 0:
      self._manifest_path(step).unlink(missing_ok=True)
    if self._saver is None:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    leaves = as_leaves(state)
    manifest = {
      'version': MANIFEST_VERSION,
      'step': step,
      **says,
      'leaves': _table(leaves),
    }
    self._saver.save(
      self._path(step),
      args=ocp.args.PyTreeSave(trees.unflatten(leaves)),
      force=True,
    )
    self._thread = threading.Thread(
      target=self._vouch, args=(step, manifest), name=f'checkpoint {step}'
    )
    self._thread.start()

  def _vouch(self, step: int, manifest: dict) -> None:
    """Writes the manifest once the files are there; removes old steps."""
    try:
      self._saver.wait_until_finished()
      if jax.process_index() == 0:
        manifest['files'] = _files(self._path(step))
        manifest['digest'] = _digest(manifest)
        path = self._manifest_path(step)
        temporary = path.with_name(f'{path.name}.writing')
        temporary.write_text(json.dumps(manifest) + '\n')
        temporary.replace(path)
        logging.info('checkpoint %d is written', step)
        for old in self.steps()[: -self._keep]:
          self._manifest_path(old).unlink()
          shutil.rmtree(self._path(old), ignore_errors=True)
    except Exception as e:
      self._failure = e

  def wait(self) -> None:
    """Returns when what was saved lies on disk.

    Raises:
      UserError: it could not be written.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      words = str(failure).split('\n')[0][:200]
      raise UserError(
        f'a checkpoint could not be written to {self._folder}: {words}'
      ) from failure

  def close(self) -> None:
    """Waits, and lets Orbax go."""
    try:
      self.wait()
    finally:
      if self._saver is not None:
        self._saver.close()
        self._saver = None

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / f'{step:08d}'

  def _manifest_path(self, step: int) -> pathlib.Path:
    return self._folder / f'{step:08d}.json'

  def _manifest(self, step: int) -> dict[str, Any]:
    return json.loads(self._manifest_path(step).read_bytes())
