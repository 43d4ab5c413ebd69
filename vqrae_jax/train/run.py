"""The pieces of a run, made and checked before anything compiles.

Whatever can be seen to be wrong is said here, not after days of training:
data, held-out photographs, the folder the tokenizer will go to, shapes,
schedules, losses, devices.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from vqrae_jax import export, sharding
from vqrae_jax.data.pipeline import TrainBatches
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import evaluator
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import ranges
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.types import Frozen, TrainState


def check_workdir(workdir: pathlib.Path) -> None:
  """The workdir can be made, and its tokenizer folder can be replaced."""
  existing = next(p for p in (workdir, *workdir.parents) if p.exists())
  if not existing.is_dir():
    raise UserError(f'--workdir={workdir}: {existing} is a file, not a folder')
  export.check_target(workdir / 'tokenizer')


class Run:
  """Everything static about a run, and how its state starts."""

  def __init__(self, config: Any, mesh: jax.sharding.Mesh | None = None):
    self.spec = spec = config_lib.read_config(config)
    self.tokenizer = build_tokenizer(spec.model)
    if odd := ranges.unusual(spec, self.tokenizer):
      logging.warning(odd)
    data = spec.data
    self.source = open_source(data.source, data.include, data.exclude)
    if spec.eval is not None:
      e = spec.eval
      self.held_out = open_source(e.source, e.include, e.exclude)
      self.tokenizer.grid(e.tile, e.tile)
      evaluator.check_tiles(self.held_out, e.tile)
    self.mesh = mesh or sharding.make_mesh(
      spec.mesh.layout, tensor=spec.mesh.tensor
    )
    sharding.check_batch(spec.batch_size, self.mesh)
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
    shapes = jax.eval_shape(
      lambda: state_lib.fresh_state(self.plan, data.size, spec.seed)
    )
    image = jax.ShapeDtypeStruct((spec.batch_size, *data.size, 3), jnp.uint8)
    step_lib.check_reach(self.plan, *shapes, image)

  def start(self) -> tuple[TrainState, Frozen, Callable]:
    """(state, frozen, jitted step) at step 0, on the ambient mesh."""
    spec, plan = self.spec, self.plan
    state, frozen = state_lib.init_state(
      plan, self.mesh, spec.data.size, spec.seed
    )
    places = sharding.shardings_for(state, self.mesh)
    first = sharding.place_batch(self.batches.batch(0), self.mesh)
    begin = jax.jit(
      _placed(functools.partial(state_lib.init_codebook, plan)),
      out_shardings=places,
      donate_argnums=0,
    )
    state = begin(state, frozen, first['images'])
    step = jax.jit(
      _placed(functools.partial(step_lib.train_step, plan)),
      out_shardings=(places, None),
      donate_argnums=0,
    )
    return state, frozen, step

  def rates_at(self, step: int) -> dict[str, float]:
    """{"lr/PART": the highest rate} of encoder, quantizer and decoder."""
    rates: dict[str, float] = {}
    for schedule, part in self.plan.parts:
      name, rate = f'lr/{part}', float(schedule(step))
      rates[name] = max(rates.get(name, 0.0), rate)
    return rates

  def describe(self) -> str:
    """One line: what is trained, on what, where."""
    leaves = jax.tree.leaves(self.plan.shapes['params'])
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    moving = sum(
      math.prod(leaf.shape)
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


def _placed(fn: Callable) -> Callable:
  """fn traced under the rules that give activations their mesh axes."""

  @functools.wraps(fn)
  def traced(*args):
    with nn.logical_axis_rules(sharding.ACTIVATION_RULES):
      return fn(*args)

  return traced


def host_copy(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree of arrays on any hosts as numpy on every host; all must call."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  gathered = jax.jit(lambda t: t, out_shardings=whole)(tree)
  return jax.tree.map(np.asarray, gathered)
