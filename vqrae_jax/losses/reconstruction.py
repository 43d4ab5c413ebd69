"""Pixel losses, means over every value of the global batch; input checks.

The reconstruction is not clipped: a value outside [0, 1] is an error like any
other, and clipping it would cut its gradient. Values are checked where they are
at hand, outside `jit` and `grad`; under a trace only types and shapes are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError
from vqrae_jax.ops import images as image_ops
from vqrae_jax.types import LossInputs, Tree


def checked(x: LossInputs, term: str) -> LossInputs:
  """`x` in f32, after checking that both sides are images for an image loss.

  Raises:
    UserError: not floating point; not both [b h w 3]; or concrete values
      outside [-0.01, 1.01].
  """
  for name in ('targets', 'reconstruction'):
    images, what = getattr(x, name), f'{name} of the loss "{term}"'
    image_ops.need_floats(images, what)
    if images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(
        f'{what} must be [b h w 3], channels last; got {images.shape}'
      )
    image_ops.check_range(images, what)
  if x.targets.shape != x.reconstruction.shape:
    raise UserError(
      f'the loss "{term}" has targets {x.targets.shape} and a reconstruction '
      f'{x.reconstruction.shape}; give two of one shape'
    )
  return x.replace(
    reconstruction=jnp.asarray(x.reconstruction, jnp.float32),
    targets=jnp.asarray(x.targets, jnp.float32),
  )


def weights_of(x: LossInputs, term: str) -> Tree:
  """The frozen arrays of a term.

  Raises:
    UserError: the inputs have none for it.
  """
  found = (x.weights or {}).get(term)
  if found is None:
    raise UserError(
      f'the loss "{term}" needs the weights of its network and has none; give '
      f'LossInputs(weights={{"{term}": pretrained.networks.load("{term}")}})'
    )
  return found


def l1(x: LossInputs) -> Float[Array, '']:
  """mean |reconstruction - target|, images in [0, 1].

  Raises:
    UserError: as `checked` does.
  """
  x = checked(x, 'l1')
  return jnp.mean(jnp.abs(x.reconstruction - x.targets))


def l2(x: LossInputs) -> Float[Array, '']:
  """mean (reconstruction - target)^2, images in [0, 1].

  Raises:
    UserError: as `checked` does.
  """
  x = checked(x, 'l2')
  return jnp.mean((x.reconstruction - x.targets) ** 2)
