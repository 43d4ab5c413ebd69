"""A config's losses and its discriminator as frozen dataclasses.

A loss is a weight and when it counts; two have more to say. The second player
is a section of its own, since a run that has none builds none.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.losses.adversarial import D_LOSSES
from vqrae_jax.optim import UNITS, Adam, Schedule, steps_of

Duration = int | str
DISTILL_TARGETS = ('teacher', 'self')


@dataclasses.dataclass(frozen=True)
class LossTerm:
  """A weight, and when it counts.

  Attributes:
    weight: of the loss, from the ramp's end on.
    start: the step or epoch from which it counts.
    unit: "steps" or "epochs", of `start` and `ramp`.
    ramp: how long the weight rises, linearly, from zero.
  """

  weight: float
  start: int | float = 0
  unit: str = 'steps'
  ramp: int | float = 0

  def check(self, where: str) -> 'LossTerm':
    """Itself, if a run can have it.

    Args:
      where: its section of the config, for the errors.

    Raises:
      UserError: a weight that trains nothing, or no time to start.
    """
    if not 0 < self.weight < float('inf'):
      raise UserError(
        f'{where}.weight={self.weight} trains nothing; give a number above 0, '
        'or leave the term out'
      )
    if self.unit not in UNITS:
      raise UserError(
        f'{where}.unit={self.unit!r}{did_you_mean(self.unit, UNITS)}'
      )
    for name in ('start', 'ramp'):  # an epoch's length does not matter here
      steps_of(f'{getattr(self, name)} {self.unit}', 1, f'{where}.{name}')
    return self

  def start_step(self, steps_per_epoch: float | None) -> int:
    """The first step that counts."""
    return steps_of(f'{self.start} {self.unit}', steps_per_epoch, 'losses')

  def end_step(self, steps_per_epoch: float | None) -> int:
    """The step from which the weight is whole."""
    ramp = steps_of(f'{self.ramp} {self.unit}', steps_per_epoch, 'losses')
    return self.start_step(steps_per_epoch) + ramp

  def weight_at(self, steps_per_epoch: float | None):
    """step -> f32[]: zero before the start, whole when the ramp is over."""
    start = self.start_step(steps_per_epoch)
    ramp = self.end_step(steps_per_epoch) - start

    def at(step):
      if not ramp:
        return self.weight * (step >= start)
      return self.weight * jnp.clip((step - start + 1) / (ramp + 1), 0.0, 1.0)

    return at


@dataclasses.dataclass(frozen=True)
class DistillTerm(LossTerm):
  """`target`: "teacher", the latents of a frozen encoder (the config's
  `teacher` says which), or "self", those of the encoder as it is."""

  target: str = 'teacher'

  def check(self, where: str) -> LossTerm:
    if self.target not in DISTILL_TARGETS:
      near = did_you_mean(self.target, DISTILL_TARGETS)
      raise UserError(f'{where}.target={self.target!r}{near}')
    return super().check(where)


@dataclasses.dataclass(frozen=True)
class GanTerm(LossTerm):
  """`adaptive`: the weight is scaled so that, at the decoder's head, this
  loss's gradient is as long as that of the weighted image losses."""

  adaptive: bool = True


# Losses with more to say than a weight and a start.
TERMS = {'distill': DistillTerm, 'gan': GanTerm}


@dataclasses.dataclass(frozen=True)
class DiscriminatorSpec:
  """The second player.

  Attributes:
    name: "patch" or "dino" (`nn/discriminators.py`).
    fields: of that module.
    loss: "hinge", "non_saturating" or "vanilla", of both players.
    schedule: its learning rate, from its start to the run's end.
    optim: its own AdamW.
    start: a duration; before it the discriminator rests.
    updates: its updates in one step.
    augment: whether it sees images augmented at random (DiffAug).
    cutout: the share of each side that is cut out then; 0 for none.
    lecam: weight of LeCam's regulariser.
    r1: gamma of R1, the penalty on its gradient at real images.
  """

  name: str
  fields: Mapping = dataclasses.field(default_factory=dict, hash=False)
  loss: str = 'hinge'
  schedule: Schedule = Schedule(lr=2e-4)
  optim: Adam = Adam(b1=0.9, b2=0.95)
  start: Duration = 0
  updates: int = 1
  augment: bool = True
  cutout: float = 0.0
  lecam: float = 0.0
  r1: float = 0.0

  def __post_init__(self):
    choose(D_LOSSES, self.loss, 'discriminator.loss')
    if self.updates < 1:
      raise UserError(f'discriminator.updates={self.updates} must be above 0')
    if not (0 <= self.lecam < float('inf') and 0 <= self.r1 < float('inf')):
      raise UserError(
        f'discriminator.lecam={self.lecam} and discriminator.r1={self.r1} '
        'must be finite and must not be negative'
      )
    if not 0 <= self.cutout < 1:
      raise UserError(f'discriminator.cutout={self.cutout} must lie in [0, 1)')
