"""Images as arrays: value range, pixel norm, resizing, patches.

Resizing is two small matrix products whose weights are computed on the host,
so a grid of positions and a batch of images share one rule. The kernels are
those of PIL and torch: bicubic has a=-0.5 with antialias (both) and a=-0.75
without (torch); pixel centres lie at half integers.

`resize_exact` reproduces PIL's 8-bit arithmetic bit for bit on any device: the
published processors of the encoders resize 8-bit images with it. PIL works in
integers: weights of 22 fractional bits, a pass over the columns and one over
the rows, each rounded to 8 bits and clipped where bicubic overshoots. Here the
weights are split into three digits of 8 bits, so that each matrix product is a
sum of integers below 2^24: exact in f32 in any order, even from bf16 inputs. So
latents do not depend on a device's order of summation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError, choose

LOW, HIGH = -0.01, 1.01  # [0, 1] with a margin for rounding


def value_range(x: ArrayLike) -> tuple[Any, Any] | None:
  """(min, max), both NaN if any value is; None if there are no concrete values:
  under a trace, in an empty array, or in one that is partly on other hosts.

  NumPy arrays are reduced on the host, others on their devices.
  """
  if isinstance(x, np.ndarray):
    return (x.min(), x.max()) if x.size else None
  if isinstance(x, jax.core.Tracer) or not x.size or not x.is_fully_addressable:
    return None
  with jax.ensure_compile_time_eval():  # concrete inside a trace, too
    low, high = np.asarray(_min_and_max(x))
  return low, high


@jax.jit
def _min_and_max(x: Array) -> Array:
  return jnp.stack([x.min(), x.max()])


def check_range(images: ArrayLike, what: str) -> None:
  """Raises a UserError if concrete values leave [-0.01, 1.01] or are NaN."""
  low, high = map(float, value_range(images) or (0, 1))
  if not (low >= LOW and high <= HIGH):
    raise UserError(
      f'{what} have values in [{low:.4g}, {high:.4g}]; give images in '
      '[0, 1]: divide [0, 255] by 255, map [-1, 1] by (x + 1) / 2, undo a '
      'pixel normalization, or clip'
    )


def to_unit(images: ArrayLike) -> Float[Array, '... h w 3']:
  """uint8 images / 255, float images unchanged, as f32; no range is checked.

  Raises:
    UserError: any other integer type, or a last axis that is not 3 channels.
  """
  if images.ndim < 3 or images.shape[-1] != 3:
    grey = images.shape[-1:] == (1,)
    raise UserError(
      f'images must be [b h w 3], channels last; got shape {images.shape}'
      + ('; repeat the channel of grey images 3 times' if grey else '')
    )
  if images.dtype == jnp.uint8:
    return jnp.asarray(images, jnp.float32) / 255.0
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images of type {images.dtype} have no known range; give uint8 in '
      '[0, 255] or float in [0, 1]'
    )
  return jnp.asarray(images, jnp.float32)


def need_floats(images: ArrayLike, what: str) -> None:
  """Raises a UserError if `images`, called `what`, are not floating point."""
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'{what} are of type {images.dtype}; give floats in [0, 1]: divide '
      'uint8 by 255'
    )


def normalize(
  images: Float[Array, '... 3'], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, '... 3']:
  """(x - mean) / std per channel."""
  return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(
    std, images.dtype
  )


def denormalize(
  images: Float[Array, '... 3'], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, '... 3']:
  """x * std + mean per channel."""
  return images * jnp.asarray(std, images.dtype) + jnp.asarray(
    mean, images.dtype
  )


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic kernel, support 2 (Keys 1981)."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _linear(x: np.ndarray, a: float) -> np.ndarray:
  del a
  return np.maximum(1 - np.abs(x), 0.0)


_KERNELS = {'bicubic': (_cubic, 2), 'bilinear': (_linear, 1)}


@functools.lru_cache(maxsize=256)
def resize_matrix(
  size: int, new_size: int, method: str, antialias: bool
) -> np.ndarray:
  """f64[new_size size]: the weights that resample a line of `size` samples.

  With antialias the kernel widens with the scale and is renormalised at the
  borders; without, samples beyond a border repeat it, as torch does. "area" is
  the mean of the samples that a new one touches (adaptive average pooling),
  whatever `antialias`.

  Raises:
    UserError: a method other than "bicubic", "bilinear" and "area".
  """
  if method == 'area':
    index, sample = np.arange(new_size)[:, None], np.arange(size)
    first = index * size // new_size
    touched = (first <= sample) & (sample < -(-(index + 1) * size // new_size))
    return touched / touched.sum(1, keepdims=True)
  kernel, support = choose(_KERNELS, method, 'resize method')
  scale = size / new_size
  centers = (np.arange(new_size) + 0.5) * scale
  a = -0.5 if antialias else -0.75
  if antialias:
    stretch = max(scale, 1.0)
    offsets = np.arange(size)[None] + 0.5 - centers[:, None]
    weights = kernel(offsets / stretch, a)
    return weights / weights.sum(1, keepdims=True)
  weights = np.zeros((new_size, size))
  base = np.floor(centers - 0.5).astype(int)
  for tap in range(1 - support, support + 1):
    position = base + tap
    value = kernel(position + 0.5 - centers, a)
    np.add.at(
      weights,
      (np.arange(new_size), np.clip(position, 0, size - 1)),
      value,
    )
  return weights


def resize(
  images: Float[Array, '... h w c'],
  size: tuple[int, int],
  method: str = 'bicubic',
  antialias: bool = True,
) -> Float[Array, '... i j c']:
  """Resamples [... h w c] to `size` in f32; the identity at equal sizes."""
  x = images.astype(jnp.float32)
  for axis, products in (-3, '...hwc,ih->...iwc'), (-2, '...hwc,jw->...hjc'):
    old, new = x.shape[axis], size[axis + 3]
    if old != new:
      weights = resize_matrix(old, new, method, antialias).astype(np.float32)
      x = jnp.einsum(products, x, weights, precision='highest')
  return x


def patchify(
  images: Float[Array, 'b h w c'], patch: int
) -> Float[Array, 'b gh gw p']:
  """[b h w c] to [b h/p w/p p*p*c], each patch as (row, column, channel)."""
  b, h, w, c = images.shape
  gh, gw = h // patch, w // patch
  # Columns and channels as one axis: a TPU pads the last one to 128.
  x = images.reshape(b, gh, patch, gw, patch * c).swapaxes(2, 3)
  return x.reshape(b, gh, gw, patch * patch * c)


def unpatchify(
  patches: Float[Array, 'b gh gw p'], patch: int
) -> Float[Array, 'b h w c']:
  """The inverse of `patchify`."""
  b, gh, gw, p = patches.shape
  c = p // (patch * patch)
  x = patches.reshape(b, gh, gw, patch, patch * c).swapaxes(2, 3)
  return x.reshape(b, gh * patch, gw * patch, c)


_BITS = 22  # of PIL's weights
_DIGIT = 8
_SHIFTS = (16, 8, 0)


@functools.lru_cache(maxsize=64)
def _digits(size: int, new_size: int, method: str) -> np.ndarray:
  """f32[3 new_size size]: PIL's integer weights, by digits.

  The first digit carries the sign, the others lie in [0, 255].
  """
  weights = resize_matrix(size, new_size, method, True)
  scaled = weights * 2**_BITS
  integers = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
  low = 2**_DIGIT - 1
  first, *others = (integers >> shift for shift in _SHIFTS)
  digits = np.stack([first, *(digit & low for digit in others)])
  return digits.astype(np.float32)


def _round(sums: Float[Array, '3 ...']) -> Float[Array, '...']:
  """Three sums of digits as 8-bit values, rounded and clipped."""
  integers = sums.astype(jnp.int32)
  total = jnp.int32(1 << (_BITS - 1))
  for digit, shift in zip(integers, _SHIFTS, strict=True):
    total = total + (digit << shift)
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)


def _rows_first(h: int, w: int, size: tuple[int, int]) -> bool:
  """Whether PIL resizes rows first: if they shrink far more than columns.

  As Pillow 13 does (its pull request 9549; the rule is inferred from results);
  earlier ones always resize columns first.
  """
  return h > size[0] and h - size[0] > 2 * (w - size[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def resize_exact(
  images: Float[Array, '... h w c'], size: tuple[int, int], method: str
) -> Float[Array, '... i j c']:
  """Images in [0, 1] resized as PIL does in 8 bits; f32 in [0, 1].

  Values are first rounded to 8 bits and clipped, which keeps those of uint8
  images; at equal sizes they are unchanged. Exact while an output pixel covers
  at most 258 input pixels a side. Gradients are those of the resampling without
  rounding.

  Args:
    images: in [0, 1].
    size: (h, w) of the result.
    method: "bicubic" or "bilinear", with antialias.
  """
  h, w = images.shape[-3:-1]
  if (h, w) == tuple(size):
    return images.astype(jnp.float32)
  x = jnp.clip(jnp.round(images.astype(jnp.float32) * 255.0), 0.0, 255.0)
  columns = w, size[1], '...hwc,njw->n...hjc'
  rows = h, size[0], '...hwc,nih->n...iwc'
  order = (rows, columns) if _rows_first(h, w, size) else (columns, rows)
  for old, new, products in order:
    if old != new:
      digits = _digits(old, new, method)
      x = _round(jnp.einsum(products, x, digits, precision='highest'))
  return x / 255.0


@resize_exact.defjvp
def _resize_jvp(size, method, primals, tangents):
  (images,), (tangent,) = primals, tangents
  return resize_exact(images, size, method), resize(tangent, size, method)
