"""What tells of an adversarial game that has gone wrong, while it runs.

The usual ways: the discriminator separates everything and nothing more is
learnt from it; its logits run away; the decoder's adversarial gradient all but
vanishes, so that the balance lies at its bound. Each is judged by means over
the steps between two rows of the log, said once, and again only after it had
stopped.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqrae_jax.losses import adversarial

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
