"""Photographs resized bit for bit as PIL resizes them, on any device.

The published processors of the encoders resize 8-bit images with PIL, which
works in whole numbers: weights of 22 fractional bits, a pass over the columns
and one over the rows, each rounded to 8 bits and clipped where bicubic
overshoots. Here the weights are cut into three digits of 8 bits, so that each
product of matrices is a sum of whole numbers below 2^24: exact in f32 in any
order, even from bf16 inputs. Latents then do not depend on how a device adds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.ops import images as image_ops

_BITS = 22  # of PIL's weights
_DIGIT = 8
_PLACES = (16, 8, 0)
HIGHEST = jax.lax.Precision.HIGHEST


@functools.lru_cache(maxsize=64)
def _digits(size: int, new_size: int, method: str) -> np.ndarray:
  """f32[3 new_size size]: PIL's whole-number weights, by digits.

  The first digit bears the sign, the others lie in [0, 255].
  """
  weights = image_ops.resize_matrix(size, new_size, method, True)
  scaled = weights * 2**_BITS
  whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
  low = 2**_DIGIT - 1
  first, *others = (whole >> place for place in _PLACES)
  digits = np.stack([first, *(digit & low for digit in others)])
  return digits.astype(np.float32)


def _round(sums: Float[Array, '3 ...']) -> Float[Array, '...']:
  """Three sums of digits as 8-bit values, rounded and clipped."""
  whole = sums.astype(jnp.int32)
  total = jnp.int32(1 << (_BITS - 1))
  for digit, place in zip(whole, _PLACES, strict=True):
    total = total + (digit << place)
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)


def _rows_first(h: int, w: int, size: tuple[int, int]) -> bool:
  """Whether PIL begins with the rows: where they shrink far more than columns.

  As Pillow 13 does (its pull request 9549; the rule is inferred from results);
  earlier ones always begin with the columns.
  """
  return h > size[0] and h - size[0] > 2 * (w - size[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def resize(
  images: Float[Array, '... h w c'], size: tuple[int, int], method: str
) -> Float[Array, '... i j c']:
  """Images in [0, 1] as PIL resizes them in 8 bits; in [0, 1] again.

  Values are rounded to 8 bits first: the identity for what was uint8. At equal
  sizes nothing is touched. Exact while an output pixel is made of at most 258
  input pixels a side. Gradients are those of the resampling without rounding.

  Args:
    images: in [0, 1], antialiased as `method` says.
    size: (h, w) of the result.
    method: "bicubic" or "bilinear".
  """
  h, w = images.shape[-3:-1]
  if (h, w) == tuple(size):
    return images.astype(jnp.float32)
  x = jnp.clip(jnp.round(images.astype(jnp.float32) * 255.0), 0.0, 255.0)

  def columns(x):
    if w == size[1]:
      return x
    digits = _digits(w, size[1], method)
    return _round(
      jnp.einsum('...hwc,njw->n...hjc', x, digits, precision=HIGHEST)
    )

  def rows(x):
    if h == size[0]:
      return x
    digits = _digits(h, size[0], method)
    return _round(
      jnp.einsum('...hwc,nih->n...iwc', x, digits, precision=HIGHEST)
    )

  x = columns(rows(x)) if _rows_first(h, w, size) else rows(columns(x))
  return x / 255.0


@resize.defjvp
def _resize_jvp(size, method, primals, tangents):
  (images,), (tangent,) = primals, tangents
  return resize(images, size, method), image_ops.resize(tangent, size, method)
