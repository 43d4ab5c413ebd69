"""Checkpoints: Orbax's files, and the SHA-256 of each of them.

  checkpoints/00001000/_CHECKPOINT_METADATA    Orbax's, with our manifest in it
  checkpoints/00001000/state/                  every leaf, none of Frozen
  checkpoints/00001000/sha256.0-of-1.json      what process 0 of 1 hashed

`ocp.CheckpointManager` names the steps, copies the arrays, writes in the
background and commits a step atomically. It has no checksums: a flipped bit
restores silently and an empty folder passes for a step (orbax-checkpoint
0.12.8, 2026-11). So a step is valid only once every process has hashed the
files that it wrote, after the commit, and only while the files match their
hashes. We also remove old steps ourselves: Orbax does so before the new step is
hashed, and treats every folder with a number as a step.

With many hosts, all of them must see the same folder.
"""

import contextlib
import dataclasses
import errno
import json
import logging as std_logging
import os
import re
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vqrae_jax.errors import BAD_JSON, UserError
from vqrae_jax.files import atomic_write, digest, is_url
from vqrae_jax.ops import trees
from vqrae_jax.train.config import differences


@dataclasses.dataclass
class Position:
  """How far a run has progressed, and what it skipped.

  Attributes:
    step: completed steps; the next sample is step x batch_size.
    skipped: unreadable images met so far, over all hosts.
    nonfinite: skipped steps so far (`step.py`).
    nonfinite_in_a_row: steps skipped since the last one that was not.
  """

  step: int = 0
  skipped: int = 0
  nonfinite: int = 0
  nonfinite_in_a_row: int = 0

  def after(self, step: int, metrics: Mapping[str, float]) -> 'Position':
    """The position after a step, by its metrics."""
    nonfinite = int(metrics['nonfinite'])
    return Position(
      step=step,
      skipped=self.skipped + int(metrics['skipped']),
      nonfinite=self.nonfinite + nonfinite,
      nonfinite_in_a_row=nonfinite and self.nonfinite_in_a_row + 1,
    )


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Checks that a checkpoint is of the run that the config describes.

  Raises:
    UserError: names the first key that differs.
  """
  for key, (old, new) in differences(before, now).items():
    raise UserError(
      f'the run in this workdir has {key}={old}, now it would be {new}; go '
      'back to that, or name another --workdir'
    )


def _explain_leaves(
  before: Mapping[str, Any], now: Mapping[str, Any], workdir: epath.Path
) -> None:
  """Names the key of a config that made its state have other leaves than a
  checkpoint holds.

  Args:
    before: {leaf name: its shape} of the checkpoint, as ShapeDtypeStructs.
    now: the same of the config.
    workdir: of the run, for the error.

  Raises:
    UserError: if a key explains it.
  """

  def changed(prefix):
    return sorted(n for n in before.keys() ^ now.keys() if n.startswith(prefix))

  old, new = (s['usage'].shape[0] if 'usage' in s else 0 for s in (before, now))
  if leaves := changed('tokenizer/params/'):
    name = leaves[0].removeprefix('tokenizer/params/')
    verb = 'freeze' if leaves[0] in before else 'train'
    why = f'schedules {verb} {name} ({len(leaves)} such leaves), unlike before'
  elif leaves := changed('ema/'):
    why = f'ema is {"off" if leaves[0] in before else "on"}, unlike before'
  elif old and new and old != new:
    why = f'log.usage_window={new}, and it was {old}'
  elif changed('tokenizer/opt_state/'):
    why = 'optim.clip or optim.weight_decay is turned on or off'
  else:
    return
  raise UserError(
    f'the run in {workdir} cannot be resumed: {why}; undo that, or name '
    f'another --workdir with --config.init_from={workdir}'
  )


MANIFEST_VERSION = 2
_STEP = re.compile(r'[0-9]{8,}')
# A save that was killed, by Orbax's name for it.
_KILLED = re.compile(r'[0-9]{8,}\.orbax-checkpoint-tmp.*')
_SUMS = re.compile(r'sha256\.[0-9]+-of-([0-9]+)\.json')
# Other errors of a disk may pass: no checkpoint is given up for them.
_UNREADABLE = (
  FileNotFoundError, NotADirectoryError, IsADirectoryError, *BAD_JSON,
)  # fmt: skip
_KILLED_SAVE = 'its save was not completed'
_ORBAX = os.path.dirname(ocp.__file__)


def as_leaves(tree: Any) -> dict[str, Any]:
  """{leaf name: array or shape} as they are stored: keys as their data.

  Empty arrays are left out, since Orbax cannot store them.
  """

  def data(leaf):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      plain = jax.eval_shape(jax.random.key_data, leaf)
      return plain.update(sharding=leaf.sharding)
    return jax.random.key_data(leaf)

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


def _files(folder: epath.Path) -> dict[str, epath.Path]:
  """{relative path: file} of what Orbax wrote of a step, in order."""
  found = {}
  for path in sorted(folder.iterdir()):  # epath has no `**`
    if path.is_dir():
      found |= {f'{path.name}/{n}': p for n, p in _files(path).items()}
    elif not path.name.startswith('sha256.') and path.suffix != '.writing':
      found[path.name] = path
  return found


def _writer(name: str) -> int:
  """The process that wrote a file; 0 writes what is not of one process."""
  part = re.search(r'process_([0-9]+)(/|$)', name)
  return int(part[1]) if part else 0


def _sums(folder: epath.Path) -> list[epath.Path]:
  """The files with the hashes of a step; none unless all are there."""
  found = [p for p in folder.iterdir() if _SUMS.fullmatch(p.name)]
  counts = {int(_SUMS.fullmatch(p.name)[1]) for p in found}
  return found if counts == {len(found)} else []


def _manifest(folder: epath.Path) -> dict[str, Any] | None:
  """What `save` said of a step; None of a folder that it did not make."""
  try:
    text = (folder / '_CHECKPOINT_METADATA').read_text()
    manifest = json.loads(text)['custom_metadata']
    return manifest if 'vqrae_jax' in manifest else None
  except _UNREADABLE:
    return None


_OPTIONS = ocp.CheckpointManagerOptions(
  step_format_fixed_length=8,
  save_root_metadata=False,
  lightweight_initialize=True,
  # Created asynchronously, a folder that fails is waited for 5 minutes.
  async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
)


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  """Orbax's way to write arrays, as they are: its zstd takes 8 % off random
  normals for half of a save's CPU time (`benchmarks/checkpoints.py`). A leaf
  that several devices hold is cut among them only if each part has a MiB:
  cutting takes a program for each shape and device."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=2**20
  )
  plain = ocp.PyTreeCheckpointHandler(
    use_compression=False,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    ),
  )
  registry.add('state', ocp.args.PyTreeSave, plain)
  return registry


def _not_of_orbax(record: std_logging.LogRecord) -> bool:
  """Orbax logs a failure in hundreds of lines; ours is one."""
  return not record.pathname.startswith(_ORBAX)


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, folder: epath.PathLike, keep: int = 3):
    """Args:
    folder: made at the first save; a path or a URL such as gs://….
    keep: how many of the newest stay.
    """
    path = epath.Path(folder)
    self._folder = path if is_url(path) else path.absolute()
    self._keep = keep
    self._manager: ocp.CheckpointManager | None = None
    self._thread = futures.ThreadPoolExecutor(1)
    self._writing: futures.Future | None = None
    std_logging.getLogger('absl').addFilter(_not_of_orbax)

  def _path(self, step: int) -> epath.Path:
    return self._folder / f'{step:08d}'

  def _folders(self) -> list[int]:
    """Steps that have a folder, whoever made it; oldest first."""
    if not self._folder.is_dir():
      return []
    found = (p for p in self._folder.iterdir() if _STEP.fullmatch(p.name))
    return sorted(int(p.name) for p in found if p.is_dir())

  # -- reading ---------------------------------------------------------------
  def steps(self) -> list[int]:
    """Steps whose save was completed, oldest first."""
    return [step for step in self._folders() if _sums(self._path(step))]

  def latest(self) -> dict[str, Any] | None:
    """The manifest of the newest step that verifies; None if there are no
    steps.

    Every process must call this: each reads a share of the files.

    Raises:
      UserError: there are steps, but none of them verifies.
      OSError: a disk does not answer, of whatever host.
    """
    newest = np.full(1000, -1)
    found = self._folders()[: -len(newest) - 1 : -1]
    newest[: len(found)] = found
    newest = multihost_utils.broadcast_one_to_all(newest)
    why = ''
    for step in newest[newest >= 0].tolist():
      fault = error = None
      try:
        fault = self._fault(step)
      except OSError as e:
        error = e
      found = 0 if fault is None else 1 if fault == _KILLED_SAVE else 2
      found = multihost_utils.process_allgather(np.int32(3 if error else found))
      if (found := found.max()) == 3:
        raise error or OSError(
          f'another host cannot read checkpoint {step}; see its log'
        )
      if not found:
        return _manifest(self._path(step))
      if fault is not None:
        logging.warning('checkpoint %d is not used: %s', step, fault)
      if found == 2 and not why:
        why = f'step {step}: {fault or "see the log of another host"}'
    if why:
      raise UserError(
        f'no checkpoint in {self._folder} is intact ({why}); remove or move '
        'the folder to start the run over'
      )
    return None

  def _fault(self, step: int) -> str | None:
    """What is wrong with this process's share of a step's files, or None."""
    folder = self._path(step)
    try:
      sums, have = _sums(folder), _files(folder)
      if not sums:
        if (self._folder / f'{step:08d}.json').exists():
          return 'it is of an older form, which commit 0d4c29b reads'
        if _manifest(folder) is not None:
          return _KILLED_SAVE
        return 'it is not a checkpoint of vqrae_jax' if have else 'it is empty'
      want: dict[str, str] = {}
      for path in sums:
        want |= json.loads(path.read_text())
      for i, name in enumerate(sorted(want.keys() | have.keys())):
        if name not in have:
          return f'{folder.name}/{name} is missing'
        mine = i % jax.process_count() == jax.process_index()
        if mine and want.get(name) != digest(have[name]):
          return f'{folder.name}/{name} is changed since it was written'
    except _UNREADABLE as e:
      return f'it cannot be read ({e!r:.200})'
    found = _manifest(folder) or {}
    version, of = found.get('vqrae_jax'), found.get('step')
    if version != MANIFEST_VERSION or of != step:
      return f'its manifest names step {of} and format version {version}'
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
    folder = self._path(manifest['step'])
    shapes = {
      n: jax.ShapeDtypeStruct(shape, dtype)
      for n, (shape, dtype) in have.items()
      if not part or n in want
    }
    if not part:
      _explain_leaves(shapes, want, self._folder.parent)
    trees.check_same(want, shapes, f'checkpoint {folder}')
    nested = trees.unflatten(want)
    options = ocp.args.PyTreeRestore(
      item=nested,
      restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
      partial_restore=part,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      found = reader.restore(folder / 'state', args=options)
    return from_leaves(target, trees.flatten(found))

  # -- writing ---------------------------------------------------------------
  def begin_from(self, step: int) -> None:
    """Removes killed saves and the steps after `step`, and nothing else."""
    if jax.process_index() or not self._folder.is_dir():
      return
    for path in self._folder.iterdir():
      if _STEP.fullmatch(path.name) and path.is_dir():
        over = int(path.name) > step or not _sums(path)
        ours = _sums(path) or _manifest(path) is not None
        # An empty folder of that name holds nothing to lose.
        if over and (ours or not _files(path)):
          path.rmtree()
      elif _KILLED.fullmatch(path.name):
        path.rmtree()

  def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
    """Saves a state; returns once it is copied, before it is written.

    Args:
      step: completed steps.
      state: arrays on any devices.
      extra: plain JSON, kept in the manifest.

    Raises:
      UserError: something is where it is to be written.
      OSError: this save or the one before cannot be written.
    """
    self.wait()
    leaves, path = as_leaves(state), self._path(step)
    table = {n: [list(x.shape), str(x.dtype)] for n, x in leaves.items()}
    manifest = {'vqrae_jax': MANIFEST_VERSION, 'step': step, **extra}
    arrays = ocp.args.PyTreeSave(trees.unflatten(leaves))
    if path.exists():
      raise UserError(f'{path} is in the way of a checkpoint; move it')
    try:
      if self._manager is None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
          self._folder, options=_OPTIONS, handler_registry=_handlers()
        )
      self._manager.save(
        step,
        args=ocp.args.Composite(state=arrays),
        custom_metadata=manifest | {'leaves': table},
        force=True,  # when to save is the loop's decision
      )
    except Exception as e:
      raise self._unwritten(e) from e
    self._writing = self._thread.submit(self._finish, path)

  def _finish(self, folder: epath.Path) -> None:
    """Hashes what this process wrote, after the commit; removes old steps."""
    self._manager.wait_until_finished()
    index, count = jax.process_index(), jax.process_count()
    sums = {
      name: digest(path)
      for name, path in _files(folder).items()
      if _writer(name) == index
    }
    with atomic_write(folder / f'sha256.{index}-of-{count}.json') as file:
      file.write(json.dumps(sums).encode())
    if index == 0:
      logging.info('checkpoint %d is written', int(folder.name))
      for old in self.steps()[: -self._keep]:
        self._path(old).rmtree()

  def _unwritten(self, failure: Exception) -> OSError:
    """Not a `UserError`: the same command may succeed later."""
    words = str(failure).split('\n')[0] or type(failure).__name__
    text = f'a checkpoint could not be written to {self._folder}: {words}'
    return OSError(errno.EIO, text)

  def wait(self) -> None:
    """Returns once everything saved is on disk.

    Raises:
      OSError: it could not be written.
    """
    writing, self._writing = self._writing, None
    try:
      if writing is not None:
        writing.result()
    except Exception as e:
      raise self._unwritten(e) from e

  def close(self) -> None:
    """Waits, and closes Orbax."""
    try:
      self.wait()
    finally:
      if self._manager is not None:
        with contextlib.suppress(Exception):  # which `wait` has raised
          self._manager.close()
