"""Optimisation: AdamW, and a schedule for every leaf by the regex of its name.

A row is (regex, schedule). The first row that matches a leaf's full name claims
it, and every leaf must be claimed. A schedule of None freezes its leaves: they
are left out of the trainable tree at init, so no optimizer state, EMA tree or
checkpoint holds a copy. A schedule with `layers` has a vector [L] over the
stacked blocks: a factor for each, or None for a block that must stay bitwise
unchanged.

Numbers (rates, schedules' lengths, clip, decay) are traced arguments of the
update, so that changing one does not recompile. What changes the program or the
state (None masks, decay forms, b1, b2, whether there is a clip or a decay) is
in the static `Optimizer`.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.specs import at_least, one_of

UNITS = ('steps', 'epochs')
DECAYS = ('cosine', 'linear', 'constant')

# Nested dicts and lists of f32[] (Python numbers on the host).
Numbers = Mapping[str, Any]


def steps_of(
  duration: int | float | str, steps_per_epoch: float, where: str
) -> int:
  """The number of steps in 300, "300 steps" or "1.5 epochs".

  Raises:
    UserError: the value has another form.
  """
  value, _, unit = str(duration).strip().partition(' ')
  unit = unit.strip() or 'steps'
  unit = unit if unit.endswith('s') else f'{unit}s'
  try:
    number = float(value)
  except ValueError:
    number = np.nan
  if unit not in UNITS or not np.isfinite(number):
    raise UserError(
      f'{where}={duration!r} must be a number of steps, "300 steps" or '
      f'"1.5 epochs"{did_you_mean(unit, UNITS) if unit not in UNITS else ""}'
    )
  if unit == 'steps' and number != int(number):
    raise UserError(f'{where}={duration!r} must be a whole number of steps')
  if number < 0:
    raise UserError(f'{where}={duration!r} must not be negative')
  return round(number * steps_per_epoch if unit == 'epochs' else number)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A learning rate over the run.

  Attributes:
    lr: the peak. At least 0.
    end_lr: the value at the run's end. At least 0.
    warmup: "1 epochs", "2000 steps" or a number of steps, in which the rate
      rises linearly from zero to `lr`. At least 0 steps.
    decay: from `lr` to `end_lr`. One of "cosine", "linear", "constant".
    layers: a factor for each stacked block, None for a frozen one. Each at
      least 0, or None.
  """

  lr: float
  end_lr: float = 0.0
  warmup: int | str = 0
  decay: str = 'cosine'
  layers: tuple[float | None, ...] | None = None

  def __post_init__(self):
    one_of('decay', self.decay, DECAYS)
    at_least(0, '', self, 'lr', 'end_lr')
    steps_of(self.warmup, 1, 'warmup')
    if self.decay == 'constant' and self.end_lr not in (0, self.lr):
      raise UserError(
        f'decay="constant" stays at lr={self.lr}; end_lr={self.end_lr} needs '
        '"cosine" or "linear"'
      )
    if not self.lr and not self.end_lr:
      raise UserError('lr=0 trains nothing; None freezes leaves')
    if any(factor is not None and factor < 0 for factor in self.layers or ()):
      raise UserError(f'layers={self.layers} must be 0 or more, None if frozen')
    if self.layers and not any(self.layers):
      raise UserError(f'layers={self.layers} trains no block; freeze with None')


def decays(name: str, leaf: Any) -> bool:
  """Whether weight decay acts on a leaf: matrices, not biases or scales."""
  last = name.rsplit('/', 1)[-1]
  return last in ('kernel', 'codes') and leaf.ndim > 1


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
  """AdamW's numbers.

  Attributes:
    b1: decay of the average of gradients. In [0, 1).
    b2: decay of the average of squared gradients. In [0, 1).
    eps: added to the root of the average of squares. Above 0.
    weight_decay: for matrices, not for biases and scales. At least 0.
    clip: the maximum global norm of the gradients; None: no clipping. Above 0,
      or None.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float | None = 1.0

  def __post_init__(self):
    for name in ('b1', 'b2'):
      if not 0 <= (value := getattr(self, name)) < 1:
        raise UserError(f'optim.{name}={value} must lie in [0, 1)')
    at_least(0, 'optim.', self, 'weight_decay')
    if self.eps <= 0:
      raise UserError(f'optim.eps={self.eps} must be above 0')
    if self.clip is not None and self.clip <= 0:
      raise UserError(f'optim.clip={self.clip} must be above 0, or None (off)')


def learning_rate(decay: str, numbers: Numbers, step: Any) -> jax.Array:
  """f32[], the rate at `step`, counted from 0: linear warm-up, then `decay`.

  Args:
    decay: "cosine", "linear" or "constant".
    numbers: lr, end_lr, warmup and total, the last two in steps.
    step: i32[].
  """
  step = jnp.asarray(step, jnp.float32)
  warmup, total = numbers['warmup'], numbers['total']
  # The first step already moves: step 0 of a warm-up has rate lr / warmup.
  rise = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
  part = (step - warmup) / jnp.maximum(total - warmup, 1)
  part = jnp.clip(part, 0.0, 1.0)
  left = {
    'cosine': 0.5 * (1 + jnp.cos(jnp.pi * part)),
    'linear': 1 - part,
    'constant': jnp.ones_like(part),
  }[decay]
  return rise * (numbers['end_lr'] + (numbers['lr'] - numbers['end_lr']) * left)


def loss_weight(numbers: Numbers, step: Any) -> jax.Array:
  """f32[], a loss's weight at `step`: zero before `start`, then rising
  linearly for `ramp` steps to `weight`."""
  since = jnp.asarray(step, jnp.float32) - numbers['start'] + 1
  return numbers['weight'] * jnp.clip(since / (numbers['ramp'] + 1), 0.0, 1.0)


def _per_block(values: Any, leaf: Any) -> jax.Array:
  """Values [depth], reshaped to broadcast with a leaf [depth, …]."""
  return jnp.asarray(values).reshape((-1,) + (1,) * (leaf.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The static part of AdamW over {leaf name: leaf}; hashable.

  Its numbers are an argument: eps, clip and weight_decay (if there are any)
  and "schedules", a list of the numbers of `learning_rate`, with "layers", a
  factor for each block, if the schedule has them.

  Attributes:
    b1, b2: AdamW's.
    clip: whether the global gradient norm is clipped.
    weight_decay: whether there is any.
    schedules: for each schedule its decay, and which blocks are trained (None:
      the schedule is one number for the leaf).
    leaves: (leaf name, index of its schedule, whether weight decay applies).
    updates: how many one step makes, all at that step's rate.
  """

  b1: float
  b2: float
  clip: bool
  weight_decay: bool
  schedules: tuple[tuple[str, tuple[bool, ...] | None], ...]
  leaves: tuple[tuple[str, int, bool], ...]
  updates: int = 1

  def init(self, params: Mapping[str, Any]) -> Any:
    """The state of an optimizer that has made no update."""
    return self._chain(collections.defaultdict(float)).init(params)

  def update(
    self, numbers: Numbers, grads: Any, state: Any, params: Any, norm: Any
  ) -> tuple[dict[str, jax.Array], Any]:
    """(the updates for `optax.apply_updates`, the next state); `norm` is the
    norm of `grads`."""
    return self._chain(numbers, norm).update(grads, state, params)

  def norm(self, grads: Mapping[str, Any]) -> jax.Array:
    """f32[], the norm of the unfrozen gradients, which `clip` bounds."""
    leaves = self.mask_frozen_layers(grads).values()
    # As products: squares would be written out, a copy of all gradients. Not of
    # flat ones: GPUs would gather those that are sharded.
    squares = [jnp.tensordot(g, g, g.ndim, precision='highest') for g in leaves]
    return jnp.sqrt(sum(squares))

  def last_update_norm(
    self, numbers: Numbers, params: Mapping[str, Any], state: Any
  ) -> jax.Array:
    """f32[], the norm of the update that led to `params` and `state`, computed
    from the moments; 0 before the first update."""
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    updates = state[-1]['schedule_count']
    rates = self.rates(numbers, (updates - 1) // self.updates)

    def square(name, index, decays):
      m = adam.mu[name] / (1 - self.b1**adam.count)
      v = adam.nu[name] / (1 - self.b2**adam.count)
      u, rate = m / (jnp.sqrt(v) + numbers['eps']), rates[index]
      if self.schedules[index][1] is not None:
        # A block that does not move has the factor 0.
        rate = rate * _per_block(numbers['schedules'][index]['layers'], u)
      if self.weight_decay and decays:
        # Of the parameters before: u = -rate (adam + decay (params - u)).
        decay = numbers['weight_decay']
        u = (u + decay * params[name]) / (1 - rate * decay)
      return jnp.sum((rate * u) ** 2)

    norm = jnp.sqrt(sum(square(*leaf) for leaf in self.leaves))
    return jnp.where(updates > 0, norm, 0.0)

  def mask_frozen_layers(self, grads: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients with zeros in blocks that a schedule freezes, so that the
    clipped and the logged norm cover only what is trained."""

    def masked(name, index):
      moves, g = self.schedules[index][1], grads[name]
      if moves is None or all(moves):
        return g
      return jnp.where(_per_block(moves, g), g, 0.0)

    return {name: masked(name, index) for name, index, _ in self.leaves}

  def rates(self, numbers: Numbers, step: Any) -> list[jax.Array]:
    """The learning rate of each schedule."""
    schedules = zip(self.schedules, numbers['schedules'], strict=True)
    return [learning_rate(decay, n, step) for (decay, _), n in schedules]

  def _chain(
    self, numbers: Numbers, norm: Any = 1.0
  ) -> optax.GradientTransformation:
    decayed = {name: decays for name, _, decays in self.leaves}
    chain = [optax.stateless(lambda grads, _: self.mask_frozen_layers(grads))]
    if self.clip:
      scale = jnp.where(norm < numbers['clip'], 1.0, numbers['clip'] / norm)
      chain.append(
        optax.stateless(lambda g, _: jax.tree.map(lambda g: scale * g, g))
      )
    chain.append(optax.scale_by_adam(self.b1, self.b2, numbers['eps']))
    if self.weight_decay:
      decay = optax.add_decayed_weights(numbers['weight_decay'])
      chain.append(optax.masked(decay, lambda p: {n: decayed[n] for n in p}))
    chain.append(self._scale_by_rate(numbers))
    return optax.chain(*chain)

  def _scale_by_rate(self, numbers: Numbers) -> optax.GradientTransformation:
    """Multiplies updates by minus the rate; its state counts the updates."""

    def init(params):
      del params
      return {'schedule_count': jnp.zeros([], jnp.int32)}

    def update(updates, state, params=None):
      del params
      count = state['schedule_count']
      rates = self.rates(numbers, count // self.updates)

      def scaled(name, index):
        u = updates[name]
        u = -rates[index].astype(u.dtype) * u
        moves = self.schedules[index][1]
        if moves is None:
          return u
        factors = _per_block(numbers['schedules'][index]['layers'], u)
        # Adding -0.0 changes no bit of a parameter.
        return jnp.where(_per_block(moves, u), factors * u, -0.0)

      scaled = {name: scaled(name, index) for name, index, _ in self.leaves}
      return scaled, {'schedule_count': count + 1}

    return optax.GradientTransformation(init, update)


def make_optimizer(
  adamw: AdamWConfig,
  schedules: Mapping[str, Schedule],
  leaves: Mapping[str, Any],
  total_steps: int,
  steps_per_epoch: float,
  updates: int = 1,
  key: str = 'schedule',
  epoch: str = '',
) -> tuple[Optimizer, dict[str, Any]]:
  """(AdamW over {leaf name: leaf}, each leaf at its own rate; its numbers).

  Args:
    adamw: the shared numbers.
    schedules: {leaf name: schedule} of every trainable leaf.
    leaves: {leaf name: array or shape}.
    total_steps: the schedules' length, for the decays.
    steps_per_epoch: for warm-ups in epochs.
    updates: how many one step makes, all at that step's rate.
    key: the schedules' key in the config, for the error of a warm-up.
    epoch: what an epoch is, for the same error.

  Raises:
    UserError: a warm-up that leaves no step, or `layers` of another depth than
      the leaf's.
  """
  distinct = list(dict.fromkeys(schedules[name] for name in leaves))
  numbers: dict[str, Any] = {'eps': adamw.eps, 'schedules': []}
  if adamw.clip is not None:
    numbers['clip'] = adamw.clip
  if adamw.weight_decay:
    numbers['weight_decay'] = adamw.weight_decay
  forms = []
  for schedule in distinct:
    warmup = steps_of(schedule.warmup, steps_per_epoch, f'{key} warmup')
    if warmup >= total_steps:
      raise UserError(
        f'{key} warmup={schedule.warmup!r} is {warmup} steps and leaves none '
        f'of the {total_steps} steps there are{epoch}; shorten it or '
        'lengthen duration'
      )
    entry = dict(
      lr=schedule.lr, end_lr=schedule.end_lr, warmup=warmup, total=total_steps
    )
    moves = None
    if schedule.layers is not None:
      entry['layers'] = [factor or 0.0 for factor in schedule.layers]
      moves = tuple(factor is not None for factor in schedule.layers)
    numbers['schedules'].append(entry)
    forms.append((schedule.decay, moves))
  rows = []
  for name, leaf in leaves.items():
    schedule = schedules[name]
    depth = leaf.shape[0] if leaf.shape else 0
    if schedule.layers is not None and len(schedule.layers) != depth:
      raise UserError(
        f'a schedule with {len(schedule.layers)} layers claims "{name}", which '
        f'stacks {depth} layers; the two must be equal'
      )
    rows.append((name, distinct.index(schedule), decays(name, leaf)))
  return Optimizer(
    b1=adamw.b1,
    b2=adamw.b2,
    clip=adamw.clip is not None,
    weight_decay=bool(adamw.weight_decay),
    schedules=tuple(forms),
    leaves=tuple(rows),
    updates=updates,
  ), numbers
