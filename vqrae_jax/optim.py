"""Optimisation: AdamW, and a schedule for every leaf by the regex of its name.

A row is (regex, schedule); the first that matches a leaf's whole name claims
it, and every leaf must be claimed. A schedule of None freezes its leaves:
they are left out of the trainable tree at init, so no optimizer state,
average or checkpoint holds a copy. A schedule with `layers` gives a vector
[L] over the stacked blocks: a factor each, None for a slice that must not
move by one bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.ops import trees

UNITS = ('steps', 'epochs')
DECAYS = ('cosine', 'linear', 'constant')

Rates = dict[str, Callable[[Any], Any]]


def steps_of(
  duration: int | float | str, steps_per_epoch: float | None, where: str
) -> int:
  """Steps of 300, "300 steps" or "1.5 epochs".

  Raises:
    UserError: another form, or epochs of a source without a length.
  """
  words = str(duration).split()
  unit = words[1] if len(words) == 2 else 'steps'
  unit = unit if unit.endswith('s') else f'{unit}s'
  try:
    number = float(words[0]) if len(words) in (1, 2) else None
  except ValueError:
    number = None
  if (
    number is None
    or not np.isfinite(number)
    or unit not in UNITS
    or isinstance(duration, bool)
  ):
    raise UserError(
      f'{where}={duration!r} must be a number of steps, "300 steps" or '
      f'"1.5 epochs"{did_you_mean(unit, UNITS) if unit not in UNITS else ""}'
    )
  if unit == 'steps' and number != int(number):
    raise UserError(f'{where}={duration!r} must be a whole number of steps')
  if number < 0:
    raise UserError(f'{where}={duration!r} must not be negative')
  if unit == 'epochs':
    if not steps_per_epoch:
      raise UserError(
        f'{where}={duration!r} counts epochs, but the data has no known '
        'length; set data.examples or give steps'
      )
    number *= steps_per_epoch
  return round(number)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A learning rate over the run.

  Attributes:
    lr: the peak.
    end_lr: the value at the run's end.
    warmup: a duration; linear from zero to `lr`.
    decay: "cosine", "linear" or "constant" after it.
    layers: a factor for each stacked block, None for a frozen one.
  """

  lr: float
  end_lr: float = 0.0
  warmup: int | str = 0
  decay: str = 'cosine'
  layers: tuple | None = None

  def __post_init__(self):
    if self.decay not in DECAYS:
      raise UserError(
        f'schedule decay={self.decay!r}{did_you_mean(self.decay, DECAYS)}'
      )
    if not (0 <= self.lr < np.inf and 0 <= self.end_lr < np.inf):
      raise UserError(
        f'schedule lr={self.lr}, end_lr={self.end_lr} must be finite and not '
        'negative'
      )
    if not self.lr and not self.end_lr:
      raise UserError('schedule lr=0 trains nothing; None freezes leaves')
    for factor in self.layers or ():
      number = isinstance(factor, int | float) and 0 <= factor < np.inf
      if factor is not None and not number:
        raise UserError(
          f'schedule layers={self.layers}: {factor!r} must be a finite factor, '
          'not negative, or None for a frozen block'
        )
    if self.layers and not any(self.layers):
      raise UserError(
        f'schedule layers={self.layers} moves no block; give the row None for '
        'its schedule'
      )

  @property
  def moving_share(self) -> float:
    """The share of a leaf's slices that move."""
    if self.layers is None:
      return 1.0
    return sum(map(bool, self.layers)) / len(self.layers)

  def rate(self, total: int, warmup: int) -> Callable[[Any], Any]:
    """step -> f32[], for a run of `total` steps."""
    if warmup >= total > 0:
      raise UserError(
        f'schedule warmup of {warmup} steps leaves none of the {total} steps '
        'of the run'
      )

    def at(step):
      step = jnp.asarray(step, jnp.float32)
      # The first step already moves: step 0 of a warm-up has rate lr/warmup.
      rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
      part = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
      left = {
        'cosine': 0.5 * (1 + jnp.cos(jnp.pi * part)),
        'linear': 1 - part,
        'constant': jnp.ones_like(part),
      }[self.decay]
      return rise * (self.end_lr + (self.lr - self.end_lr) * left)

    return at


def match_schedules(
  rows: Sequence[tuple[str, Schedule | None]], names: Sequence[str]
) -> dict[str, Schedule | None]:
  """{leaf name: its schedule, None if frozen}; every leaf is claimed."""
  return trees.first_match(rows, names, 'schedules')


def _layer_factors(layers: Sequence, ndim: int) -> tuple[np.ndarray, ...]:
  shape = (-1,) + (1,) * (ndim - 1)
  factor = np.asarray([f or 0.0 for f in layers], np.float32).reshape(shape)
  moves = np.asarray([f is not None for f in layers]).reshape(shape)
  return factor, moves


def mask_frozen_layers(
  grads: Mapping[str, Any], schedules: Mapping[str, Schedule]
) -> dict[str, Any]:
  """Gradients with zero in slices that `layers` freezes, so that the norm
  that is clipped, and the one that is logged, are of what moves."""

  def one(name, g):
    layers = schedules[name].layers
    if layers is None or None not in layers:
      return g
    return jnp.where(_layer_factors(layers, g.ndim)[1], g, 0.0)

  return {name: one(name, g) for name, g in grads.items()}


def _check_layers(name: str, leaf: Any, schedule: Schedule) -> None:
  depth = leaf.shape[0] if leaf.shape else 0
  if schedule.layers is not None and len(schedule.layers) != depth:
    raise UserError(
      f'a schedule with {len(schedule.layers)} layers claims "{name}", which '
      f'stacks {depth}'
    )


def decays(name: str, leaf: Any) -> bool:
  """Whether weight decay acts on a leaf: matrices, not biases or scales."""
  last = name.rsplit('/', 1)[-1]
  return last in ('kernel', 'codes') and leaf.ndim > 1


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
  """AdamW's numbers; `clip` bounds the global gradient norm (None: no)."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float | None = 1.0

  def __post_init__(self):
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(
          f'optim.{name}={getattr(self, name)} must lie in [0, 1)'
        )
    if not (0 < self.eps < np.inf and 0 <= self.weight_decay < np.inf):
      raise UserError(
        f'optim.eps={self.eps} must be above 0 and '
        f'optim.weight_decay={self.weight_decay} not below, both finite'
      )
    if self.clip is not None and not self.clip > 0:
      raise UserError(
        f'optim.clip={self.clip} must be above 0, or None for no clipping'
      )


def make_optimizer(
  adam: AdamWConfig,
  schedules: Mapping[str, Schedule],
  params: Mapping[str, Any],
  total_steps: int,
  steps_per_epoch: float | None,
  updates: int = 1,
) -> tuple[optax.GradientTransformation, Rates]:
  """AdamW over {leaf name: leaf}, each leaf at its own rate.

  Args:
    adam: the shared numbers.
    schedules: {leaf name: schedule} of every trainable leaf.
    params: {leaf name: array or shape}.
    total_steps: the run's length, for the decays.
    steps_per_epoch: for warm-ups in epochs.
    updates: in one step; all of a step are at its rate.

  Returns:
    The transformation, and {leaf name: step -> rate} for the logs.
  """
  rates: Rates = {}
  factors = {}
  made: dict[Schedule, Callable[[Any], Any]] = {}  # leaves share their rate
  for name, leaf in params.items():
    schedule = schedules[name]
    _check_layers(name, leaf, schedule)
    warmup = steps_of(schedule.warmup, steps_per_epoch, 'schedule warmup')
    if schedule not in made:
      made[schedule] = schedule.rate(total_steps, warmup)
    rates[name] = made[schedule]
    if schedule.layers is not None:
      factors[name] = _layer_factors(schedule.layers, leaf.ndim)

  def scaled(deltas, step):
    """-rate × update; exactly zero in a frozen slice."""

    now = {rate: rate(step // updates) for rate in made.values()}

    def one(name, update):
      update = -now[rates[name]].astype(update.dtype) * update
      if name not in factors:
        return update
      factor, moves = factors[name]
      return jnp.where(moves, factor * update, 0.0)

    return {name: one(name, u) for name, u in deltas.items()}

  decayed = {name: decays(name, leaf) for name, leaf in params.items()}
  chain = [
    optax.stateless(lambda grads, _: mask_frozen_layers(grads, schedules))
  ]
  if adam.clip is not None:
    chain.append(optax.clip_by_global_norm(adam.clip))
  chain.append(optax.scale_by_adam(adam.b1, adam.b2, adam.eps))
  if adam.weight_decay:
    chain.append(
      optax.add_decayed_weights(
        adam.weight_decay, mask=lambda p: {n: decayed[n] for n in p}
      )
    )
  chain.append(_scale_by_step(scaled))
  return optax.chain(*chain), rates


def _scale_by_step(fn: Callable) -> optax.GradientTransformation:
  """A transformation whose only state is the count of updates."""

  def init(params):
    del params
    return {'schedule_count': jnp.zeros([], jnp.int32)}

  def update(updates, state, params=None):
    del params
    step = state['schedule_count']
    return fn(updates, step), {'schedule_count': step + 1}

  return optax.GradientTransformation(init, update)


def updates_of(opt_state: Any) -> jax.Array:
  """i32[], how often `make_optimizer`'s transformation was applied."""
  return opt_state[-1]['schedule_count']


def apply_updates(
  params: Mapping[str, jax.Array], updates: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """params + updates; a zero update leaves every bit (-0.0 too)."""
  return {
    name: jnp.where(updates[name] == 0, p, p + updates[name]).astype(p.dtype)
    for name, p in params.items()
  }
