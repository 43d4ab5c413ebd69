"""A run from its config to a tokenizer on disk, with its figures.

Order: read and check the config, open the data, plan, make the state, step,
export, open the export again and evaluate that: the figures are of the files
that a user gets.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vqrae_jax import sharding
from vqrae_jax.data.pipeline import TrainBatches
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import pictures
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train import summary
from vqrae_jax.train.report import Report, write_json


class NonFinite(UserError):
  """A loss that is no number; the run stops where it happened."""


def check_finite(step: int, metrics: dict[str, float]) -> None:
  """Raises `NonFinite` that names the step and the losses."""
  bad = [
    k
    for k, v in metrics.items()
    if (k.startswith('loss/') or k == 'grad_norm') and not np.isfinite(v)
  ]
  if bad:
    values = ', '.join(f'{k}={v}' for k, v in sorted(metrics.items()))
    raise NonFinite(
      f'{", ".join(bad)} not finite at step {step} ({values}); lower the '
      'learning rate, lengthen the warm-up, or compute in float32'
    )


class Run:
  """The pieces of a run, made from its config, before the first step."""

  def __init__(self, config: Any, mesh: jax.sharding.Mesh | None = None):
    self.spec = spec = config_lib.read_config(config)
    self.tokenizer = build_tokenizer(spec.model)
    data = spec.data
    self.source = open_source(data.source, data.include, data.exclude)
    if spec.eval is not None:
      e = spec.eval
      self.held_out = open_source(e.source, e.include, e.exclude)
      self.tokenizer.grid(e.tile, e.tile)
    self.batches = TrainBatches(
      self.source,
      data.augment(),
      batch_size=spec.batch_size,
      seed=spec.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    examples = data.examples or len(self.source)
    per_epoch = max(examples // spec.batch_size, 1)
    self.plan = state_lib.make_plan(spec, self.tokenizer, per_epoch)
    self.mesh = mesh or sharding.make_mesh(
      spec.mesh.layout, tensor=spec.mesh.tensor
    )
    shards = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    if spec.batch_size % shards:
      raise UserError(
        f'batch_size={spec.batch_size} must be a multiple of the {shards} '
        'devices that share it'
      )
    # Shapes suffice to see that every leaf is moved: nothing compiles yet.
    state, frozen = jax.eval_shape(
      lambda: state_lib.fresh_state(self.plan, data.size, spec.seed)
    )
    image = jax.ShapeDtypeStruct((spec.batch_size, *data.size, 3), jnp.uint8)
    step_lib.check_reach(self.plan, state, frozen, image)

  def start(self):
    """(state, frozen, compiled step) at step 0, on the mesh."""
    spec, plan = self.spec, self.plan
    state, frozen = state_lib.init_state(
      plan, self.mesh, spec.data.size, spec.seed
    )
    places = sharding.shardings_for(state, self.mesh)
    first = sharding.place_batch(self.batches.batch(0), self.mesh)
    begin = jax.jit(
      functools.partial(state_lib.init_codebook, plan),
      out_shardings=places,
      donate_argnums=0,
    )
    state = begin(state, frozen, first['images'])
    step = jax.jit(
      functools.partial(step_lib.train_step, plan),
      out_shardings=(places, None),
      donate_argnums=0,
    )
    return state, frozen, step

  def rates_at(self, step: int) -> dict[str, float]:
    """{"lr/NAME": rate} of encoder, quantizer and decoder, where they move."""
    rates: dict[str, float] = {}
    for name, rate in self.plan.rates.items():
      rates.setdefault(f'lr/{name.split("/")[0]}', rate)
    return {name: float(rate(step)) for name, rate in rates.items()}


def _read(metrics: dict[str, jax.Array]) -> dict[str, float]:
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def dry_run(config: Any) -> dict[str, float]:
  """One step, nothing written; its metrics."""
  run = Run(config)
  with jax.set_mesh(run.mesh):
    state, frozen, step = run.start()
    batch = sharding.place_batch(run.batches.batch(0), run.mesh)
    _, metrics = step(state, frozen, batch['images'])
    metrics = _read(metrics)
  check_finite(1, metrics)
  return metrics


def train(
  config: Any,
  workdir: str | pathlib.Path,
  profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Trains as `config` says and leaves everything in `workdir`.

  Args:
    config: a ConfigDict or mapping (`configs/`).
    workdir: made if absent: config.json, metrics.jsonl, tensorboard/,
      tokenizer/, summary.json and, with `eval`, reconstructions.png.
    profile: (first, last) step of a jax.profiler trace in workdir/profile.

  Returns:
    What summary.json holds.

  Raises:
    UserError: a config that cannot run, or a loss that is no number.
  """
  run = Run(config)
  spec, total = run.spec, run.plan.total_steps
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    write_json(workdir / 'config.json', config_lib.plain(config))
  logging.info('%s', describe_run(run))
  report = Report(
    workdir,
    total_steps=total,
    batch_size=spec.batch_size,
    tensorboard=spec.log.tensorboard,
  )
  began = time.perf_counter()
  with jax.set_mesh(run.mesh):
    state, frozen, step_fn = run.start()
    batches = run.batches.iterate(0)
    shown = sharding.place_batch(run.batches.batch(0), run.mesh)['images']
    pending: tuple[int, Any] | None = None
    compiled_at = time.perf_counter()
    for number in range(1, total + 1):
      if profile and number == profile[0]:
        jax.profiler.start_trace(str(workdir / 'profile'))
      batch = sharding.place_batch(next(batches), run.mesh)
      state, metrics = step_fn(state, frozen, batch['images'])
      if pending is not None:
        # One step behind, so the device always has work.
        _settle(run, report, *pending)
      else:
        jax.block_until_ready(metrics)
        compiled_at = time.perf_counter()
      pending = (number, metrics)
      if profile and number == profile[1]:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
      every = spec.log.images_every
      if every and (number % every == 0 or number == total):
        report.images(number, _picture(run, state, frozen, shown))
    if pending is not None:
      _settle(run, report, *pending, last=True)
    ended = time.perf_counter()
    variables = state_lib.variables_of(state, frozen, ema=True)
  report.close()
  rate = (total - 1) * spec.batch_size / max(ended - compiled_at, 1e-9)
  figures = {
    'steps': total,
    'train_seconds': ended - began,
    'images_per_second': rate,
  }
  return summary.finish(run, variables, workdir, figures)


def _settle(run, report, number, metrics, last=False) -> None:
  """Reads a step's metrics: stops on no-numbers, writes its row."""
  metrics = _read(metrics)
  check_finite(number, metrics)
  report.step()
  if number % run.spec.log.every == 0 or last:
    report.row(number, metrics | run.rates_at(number - 1))


def _picture(run, state, frozen, images) -> np.ndarray:
  """The first images of the run above what the averaged weights make of
  them."""
  images = images[: min(8, images.shape[0])]
  variables = state_lib.variables_of(state, frozen, ema=True)
  painted = _reconstruct(run.tokenizer, variables, images)
  return pictures.grid(np.asarray(images), pictures.to_uint8(painted))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
  return tokenizer.apply(variables, images).images


def describe_run(run: Run) -> str:
  """One line: what is trained, on what, where."""
  leaves = jax.tree.leaves(run.plan.shapes['params'])
  parameters = sum(int(np.prod(leaf.shape)) for leaf in leaves)
  h, w = run.spec.data.size
  return (
    f'{parameters / 1e6:.1f}M parameters, '
    f'{type(run.tokenizer.quantizer).__name__} with '
    f'{run.tokenizer.codebook_size} codes, {len(run.source)} photographs at '
    f'{h}x{w}, batch {run.spec.batch_size}, {run.plan.total_steps} steps on '
    f'{run.mesh.size} {jax.devices()[0].platform} device(s)'
  )
