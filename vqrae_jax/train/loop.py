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
import numpy as np
from absl import logging

from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import pictures
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import summary
from vqrae_jax.train.report import Report, write_json
from vqrae_jax.train.run import Run, check_workdir, host_copy


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
  workdir = pathlib.Path(workdir)
  check_workdir(workdir)
  run = Run(config)
  spec, total = run.spec, run.plan.total_steps
  if profile and profile[1] > total:
    raise UserError(
      f'--profile={profile[0]}:{profile[1]} ends after the {total} steps of '
      'the run'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    write_json(workdir / 'config.json', config_lib.plain(config))
  logging.info('%s', run.describe())
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
    variables = host_copy(
      state_lib.variables_of(state, frozen, ema=True), run.mesh
    )
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
  them; every host takes part."""
  variables = state_lib.variables_of(state, frozen, ema=True)
  painted = _reconstruct(run.tokenizer, variables, images)
  shown, painted = host_copy((images, painted), run.mesh)
  return pictures.grid(shown[:8], pictures.to_uint8(painted[:8]))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
  return tokenizer.apply(variables, images).images
