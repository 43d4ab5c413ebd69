"""Steps whose losses or gradients are no number: left out, then a stop.

In the step, `unless_spoilt` keeps the state as it was, to the last bit: what
one bad batch or one overflow in bf16 would spoil is not only the weights but
averages, codebooks and both optimizers. On the host such steps are counted; so
many in a row are no accident, and the run stops with the step and its losses.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError

# What a step is judged by: losses and the norms of every player.
_NORMS = ('grad_norm', 'update_norm')
_COUNTS = ('samples', 'skipped', 'nonfinite')


class NonFinite(UserError):
  """Losses or gradients that are no number; the run stops."""


def _judged(name: str) -> bool:
  return name.startswith('loss/') or name.rsplit('/', 1)[-1] in _NORMS


def unless_spoilt(
  before: Any, after: Any, metrics: Mapping[str, jax.Array]
) -> tuple[Any, jax.Array]:
  """(`after` if every judged metric is finite, else `before`; f32[] 1 if it
  was `before`, else 0).

  Args:
    before, after: states of equal structure.
    metrics: f32[] by name, of the step between the two.
  """
  judged = [x for name, x in metrics.items() if _judged(name)]
  sound = jnp.isfinite(jnp.stack(judged)).all()

  def chosen(old, new):
    return new if new is old else jnp.where(sound, new, old)

  spoilt = 1.0 - sound.astype(jnp.float32)
  return jax.tree.map(chosen, before, after), spoilt


def problem(step: int, metrics: Mapping[str, float]) -> str:
  """What of a step's figures is no number, in words; '' if all are."""
  bad = sorted(
    k for k, v in metrics.items() if _judged(k) and not np.isfinite(v)
  )
  if not bad:
    return ''
  values = ', '.join(
    f'{k}={v:.4g}' for k, v in sorted(metrics.items()) if k not in _COUNTS
  )
  return f'{", ".join(bad)} not finite at step {step} ({values})'


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
  """Raises `NonFinite` that names the step and the losses."""
  if words := problem(step, metrics):
    raise NonFinite(f'{words}; {REMEDY}')


REMEDY = 'lower the learning rate, lengthen the warm-up, or compute in float32'
