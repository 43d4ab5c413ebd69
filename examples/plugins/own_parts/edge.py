"""A loss on edges: L1 of the differences between neighbouring pixels."""

import jax.numpy as jnp

from vqrae_jax.types import LossInputs


def edge(x: LossInputs):
  """mean |d reconstruction - d target| along rows and along columns, in units
  of a pixel in [0, 1]."""
  wrong = x.reconstruction - x.targets
  return sum(jnp.abs(jnp.diff(wrong, axis=axis)).mean() for axis in (1, 2))
