"""Pixel losses, means over every value of the global batch.

The reconstruction is not clipped: a value outside [0, 1] is an error like any
other, and clipping it would cut its gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.losses.inputs import checked
from vqrae_jax.types import LossInputs


def l1(x: LossInputs) -> Float[Array, '']:
  """mean |reconstruction - target|, images in [0, 1].

  Raises:
    UserError: as `inputs.checked` does.
  """
  x = checked(x, 'l1')
  return jnp.mean(jnp.abs(x.reconstruction - x.targets))


def l2(x: LossInputs) -> Float[Array, '']:
  """mean (reconstruction - target)^2, images in [0, 1].

  Raises:
    UserError: as `inputs.checked` does.
  """
  x = checked(x, 'l2')
  return jnp.mean((x.reconstruction - x.targets) ** 2)
