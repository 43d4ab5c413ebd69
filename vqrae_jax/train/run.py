"""The pieces of a run, made and checked before anything compiles.

Whatever can be seen to be wrong is said here, not after days of training:
data, held-out photographs, the folder the tokenizer will go to, shapes,
schedules, losses, devices.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from vqrae_jax import export, sharding
from vqrae_jax.data.decode import EncodedImages
from vqrae_jax.data.pipeline import TrainBatches
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import evaluator
from vqrae_jax.models.tokenizer import build_tokenizer, describe
from vqrae_jax.ops import trees
from vqrae_jax.paths import check_writable
from vqrae_jax.train import checkpoint, initialize
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import initialize as frozen_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.checkpoint import Checkpoints, as_leaves
from vqrae_jax.types import Frozen, TrainState


def check_workdir(workdir: pathlib.Path) -> None:
  """The workdir can be made, and its tokenizer folder can be replaced."""
  check_writable(workdir, '--workdir')
  folder = workdir / 'checkpoints'
  if os.path.lexists(folder) and not folder.is_dir():
    raise UserError(f'{folder} is no folder, and checkpoints go there; move it')
  export.check_target(workdir / 'tokenizer')


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


def _opened(section: str, spec: Any) -> EncodedImages:
  """A section's photographs; its key is named where there are none."""
  try:
    return open_source(spec.source, spec.include, spec.exclude)
  except UserError as e:
    raise UserError(f'{e} (--config.{section}.source)') from None


class Run:
  """Everything static about a run, and how its state starts."""

  def __init__(self, config: Any, mesh: jax.sharding.Mesh | None = None):
    self.spec = spec = config_lib.read_config(config)
    config_lib.check_placeholders(spec)
    self._hashes: dict[str, str] | None = None
    self._origins: dict[str, tuple[str, str | None]] = {}
    self.tokenizer = build_tokenizer(spec.model)
    config_lib.check_latents(spec, self.tokenizer)
    if odd := config_lib.config_warnings(spec, self.tokenizer):
      logging.warning(odd)
    data = spec.data
    self.source = _opened('data', data)
    if spec.eval is not None:
      e = spec.eval
      self.held_out = _opened('eval', e)
      self.tokenizer.grid(e.tile, e.tile)
      evaluator.check_tiles(self.held_out, e.tile)
      if both := self.held_out.shared_with(self.source):
        logging.warning(
          '%d of the %d photographs of eval are trained on too: leave them out '
          'by data.exclude, or choose others by eval.include',
          both, len(self.held_out),
        )  # fmt: skip
    self.mesh = mesh or sharding.make_mesh(
      spec.mesh.layout, tensor=spec.mesh.tensor
    )
    sharding.check_batch(spec.batch_size, self.mesh, spec.accumulate)
    self.batches = TrainBatches(
      self.source,
      data.augment(),
      batch_size=spec.batch_size,
      seed=spec.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    examples = data.examples or len(self.source)
    self.plan = state_lib.make_plan(
      spec, self.tokenizer, examples / spec.batch_size
    )
    # Shapes suffice to see that every leaf is moved.
    shapes = jax.eval_shape(lambda: state_lib.fresh_state(self.plan, 0))
    image = jax.ShapeDtypeStruct((spec.batch_size, *data.size, 3), jnp.uint8)
    step_lib.check_reach(self.plan, *shapes, image)

  def start(self) -> tuple[TrainState, Frozen, Callable]:
    """(state, frozen, jitted step) at step 0, on the ambient mesh."""
    spec, plan = self.spec, self.plan
    given = self._bring()
    logging.info('begins with %s', given.says)
    if given.warning:
      logging.warning(given.warning)
    if given.left:
      logging.info('not taken, and begun anew: %s', given.left)
    state, frozen = state_lib.init_state(
      plan, self.mesh, spec.seed, given.leaves
    )
    if not any(n.startswith('codebook/quantizer/') for n in given.leaves):
      first = sharding.place_batch(self.batches.batch(0), self.mesh)
      begin = jax.jit(
        _placed(functools.partial(state_lib.init_codebook, plan)),
        out_shardings=sharding.shardings_for(state, self.mesh),
        donate_argnums=0,
      )
      state = begin(state, frozen, first['images'])
    return state, frozen, self._step(state)

  def resume(
    self, kept: Checkpoints, manifest: Mapping[str, Any]
  ) -> tuple[TrainState, Frozen, Callable]:
    """(state, frozen, jitted step) as a checkpoint left them.

    Raises:
      UserError: the checkpoint is of another run, or frozen leaves differ.
    """
    check_same_run(manifest['run'], self.identity())
    shapes, frozen = state_lib.abstract_state(self.plan, self.mesh)
    checkpoint.check_same_leaves(
      {n: tuple(shape) for n, (shape, _) in manifest['leaves'].items()},
      {n: leaf.shape for n, leaf in as_leaves(shapes).items()},
      str(kept),
    )
    state = kept.restore(manifest, shapes)
    if jax.tree.leaves(frozen):
      # By the same program as at the run's start: bitwise the same leaves.
      given = self._bring(again=True)
      if given.says:
        logging.info('beside its checkpoint: %s', given.says)
      _, frozen = state_lib.init_state(
        self.plan, self.mesh, self.spec.seed, given.leaves
      )
    where = f'checkpoint {manifest["step"]}'
    frozen_lib.check_frozen(
      self.frozen_hashes(frozen), manifest['frozen'], where
    )
    return state, frozen, self._step(state)

  def _bring(self, again: bool = False) -> initialize.Given:
    """What the config brings; where it came from is kept for manifests.

    `again`: for the frozen trees of a run that goes on; all else is in its
    checkpoint, and where that came from may be gone.
    """
    spec = self.spec
    init, init_from = spec.init, spec.init_from
    if again:
      init, init_from = self._still_needed()
    given = initialize.given_leaves(self.tokenizer, init_from, init)
    if not (given.says or again):
      given = dataclasses.replace(given, says='random weights')
    begins = init_from or init.encoder
    given = initialize.with_teacher(given, self.tokenizer, spec.teacher, begins)
    source = given.source or f'seed {spec.seed}'
    leaves, says = frozen_lib.networks_of(
      self.plan.networks, self.plan.adversary, spec.init.networks
    )
    given = dataclasses.replace(
      given,
      leaves=given.leaves | leaves,
      says='; '.join(filter(None, (given.says, says))),
    )
    kind = (f'{spec.init.networks} weights', None)
    self._origins = {'losses': kind, 'discriminator': kind}
    self._origins['params'] = (source, given.revision)
    if given.teacher is not None:
      self._origins['teacher'] = given.teacher
    return given

  def _still_needed(self) -> tuple[config_lib.InitSpec, str | None]:
    """`init` and `init_from` without what brings no frozen tree."""
    spec, trained = self.spec, set(self.plan.trainable)
    held = {n for n in self.plan.leaves if n not in trained}
    parts = {n.partition('/')[0] for n in held}
    if spec.teacher == config_lib.INIT:
      parts.add('encoder')
    return initialize.still_needed(spec, parts)

  def _step(self, state: TrainState) -> Callable:
    def step(state, frozen, batch):
      state, metrics = step_lib.train_step(
        self.plan, state, frozen, batch['images']
      )
      # What was read, over all hosts: a mark of the samples, and the misses.
      metrics['samples'] = batch['mark'].sum(dtype=jnp.uint32)
      metrics['skipped'] = batch['skipped'].sum()
      return state, metrics

    return jax.jit(
      _placed(step),
      out_shardings=(sharding.shardings_for(state, self.mesh), None),
      donate_argnums=0,
    )

  def frozen_hashes(self, frozen: Frozen) -> dict[str, str]:
    """{tree: SHA-256}, computed once; every host takes part."""
    if self._hashes is None:
      self._hashes = frozen_lib.hash_frozen(
        frozen, lambda x: host_copy(x, self.mesh)
      )
    return self._hashes

  def frozen_record(self, frozen: Frozen) -> dict[str, dict]:
    """What a manifest says of the frozen trees."""
    record = {}
    for name, sha256 in self.frozen_hashes(frozen).items():
      source, revision = self._origins[name]
      record[name] = {'sha256': sha256, 'source': source, 'revision': revision}
    return record

  def identity(self) -> dict[str, Any]:
    """What must stay as it is while a run goes on: plain JSON."""
    spec = self.spec
    return {
      'seed': spec.seed,
      'batch_size': spec.batch_size,
      'photographs': len(self.source),
      'image_size': list(spec.data.size),
      'model': json.loads(export.canonical_json(describe(self.tokenizer))),
    }

  def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's batch from `batches`, as the step takes it."""
    rows = {
      'images': batch['images'],
      'mark': sample_marks(batch['index'], batch['photo']),
      'skipped': batch['skipped'],
    }
    return sharding.place_batch(rows, self.mesh)

  def rates_at(self, step: int, left_out: int = 0) -> dict[str, float]:
    """{"lr/PART": the highest rate} of encoder, quantizer and decoder,
    {"weight/LOSS": its weight}. The second player says its own.

    Args:
      step: completed steps before the one that is asked for.
      left_out: those of them that moved nothing: no optimizer counts them.
    """
    rates: dict[str, float] = {}
    for schedule, part in self.plan.parts:
      name, rate = f'lr/{part}', float(schedule(step - left_out))
      rates[name] = max(rates.get(name, 0.0), rate)
    weights, adversary = dict(self.plan.weights), self.plan.adversary
    if adversary is not None:
      weights['gan'] = adversary.weight
    return rates | {f'weight/{n}': float(w(step)) for n, w in weights.items()}

  def heard(self, number: int, metrics: Mapping) -> dict[str, float]:
    """A step's metrics without those of a player that was not asked yet."""
    adversary = self.plan.adversary
    if adversary is None:
      return dict(metrics)
    silent: tuple[str, ...] = ()
    if number <= adversary.gan_start:
      silent += ('loss/gan', 'gan_balance')
    if number <= adversary.start:
      silent += ('loss/discriminator', 'loss/lecam', 'loss/r1')
      silent += ('logits/', 'discriminator/')
    return {k: v for k, v in metrics.items() if not k.startswith(silent)}

  def describe(self) -> str:
    """One line: what is trained, on what, where."""
    leaves = jax.tree.leaves(self.plan.shapes['params'])
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    moving = sum(
      math.prod(leaf.shape) * self.plan.schedules[name].moving_share
      for name, leaf in self.plan.leaves.items()
      if name in self.plan.trainable
    )
    h, w = self.spec.data.size
    k = self.tokenizer.codebook_size
    kind = type(self.tokenizer.quantizer).__name__
    return (
      f'{parameters / 1e6:.1f}M parameters, {moving / 1e6:.1f}M of them '
      f'trained, {kind}{f" with {k} codes" if k else ""}, '
      f'{len(self.source)} photographs at {h}x{w}, batch '
      f'{self.spec.batch_size}, {self.plan.total_steps} steps on '
      f'{self.mesh.size} {jax.devices()[0].platform} device(s)'
    )


def sample_marks(index: np.ndarray, photo: np.ndarray) -> np.ndarray:
  """uint32[b], a hash of (sample index, photograph) each; sums of them tell
  one batch from another, on any number of hosts."""
  odd = np.uint64(0x9E3779B97F4A7C15)
  mixed = (index.astype(np.uint64) + np.uint64(1)) * odd
  mixed = (mixed ^ (mixed >> np.uint64(29)) ^ photo.astype(np.uint64)) * odd
  return (mixed >> np.uint64(32)).astype(np.uint32)


def _placed(fn: Callable) -> Callable:
  """fn traced under the rules that give activations their mesh axes."""

  @functools.wraps(fn)
  def traced(*args):
    with nn.logical_axis_rules(sharding.ACTIVATION_RULES):
      return fn(*args)

  return traced


def host_copy(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree of arrays on any hosts as numpy on every host; all must call."""
  if jax.process_count() > 1:
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.jit(lambda t: t, out_shardings=whole)(tree)
  return jax.tree.map(np.asarray, tree)
