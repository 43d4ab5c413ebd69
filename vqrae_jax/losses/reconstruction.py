"""Pixel losses, means over every value of the global batch.

The reconstruction is not clipped: a value outside [0, 1] is an error like any
other, and clipping it would cut its gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError
from vqrae_jax.ops.images import need_floats
from vqrae_jax.types import LossInputs, Tree

# ----------------------------------------------------------------------------
# What an image loss was given: its types, shapes, range and weights.
#
# Values are looked at where there are any: outside `jit` and `grad`. Under a
# trace only types and shapes are known, and a wrong range passes: so does, in
# training, the reconstruction of a decoder, which is not clipped.

# Images, and what arithmetic may add to them.
_LOW, _HIGH = -0.01, 1.01


def checked(x: LossInputs, term: str) -> LossInputs:
  """`x` in f32, if both sides are images that an image loss takes.

  Raises:
    UserError: not floating point; not both [b h w 3]; or values that are at
      hand outside [-0.01, 1.01].
  """
  for name in ('targets', 'reconstruction'):
    check_images(getattr(x, name), f'{name} of the loss "{term}"')
  if x.targets.shape != x.reconstruction.shape:
    raise UserError(
      f'the loss "{term}" has targets {x.targets.shape} and a reconstruction '
      f'{x.reconstruction.shape}; give two of one shape'
    )
  return x.replace(
    reconstruction=jnp.asarray(x.reconstruction, jnp.float32),
    targets=jnp.asarray(x.targets, jnp.float32),
  )


def check_images(images: Any, what: str) -> None:
  """Floats [b h w 3] in [0, 1], as far as can be seen.

  Raises:
    UserError: `what` are something else.
  """
  need_floats(images, what)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise UserError(
      f'{what} must be [b h w 3], channels last; got {images.shape}'
    )
  if isinstance(images, jax.core.Tracer) or not images.size:
    return
  if not getattr(images, 'is_fully_addressable', True):  # on other hosts
    return
  values = np.asarray(images)
  low, high = float(values.min()), float(values.max())
  if low < _LOW or high > _HIGH:
    raise UserError(
      f'{what} lie in [{low:.4g}, {high:.4g}], images in [0, 1]; '
      f'{_way_out(low, high)}'
    )


def _way_out(low: float, high: float) -> str:
  if low >= -1.01 and high <= 1.01:
    return 'if they are in [-1, 1], give (x + 1) / 2; if not clipped, clip them'
  if low < -10:
    return 'has training diverged?'
  if high > 10:
    return 'divide by 255?'
  return 'undo the pixel normalisation, or clip them?'


def weights_of(x: LossInputs, term: str) -> Tree:
  """The frozen arrays of a term.

  Raises:
    UserError: the inputs have none for it.
  """
  found = (x.weights or {}).get(term)
  if found is None:
    raise UserError(
      f'the loss "{term}" needs the weights of its network and has none; give '
      f'LossInputs(weights={{"{term}": losses.networks.load("{term}")}})'
    )
  return found


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
