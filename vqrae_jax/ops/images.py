"""Images as arrays: value range, pixel norm, resizing, patches.

Resizing is two small matrix products whose weights are computed on the host,
so a grid of positions and a batch of photographs share one rule. The kernels
are those of PIL and torch: bicubic has a=-0.5 with antialias (both) and
a=-0.75 without (torch); pixel centres lie at half integers.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError, choose


def to_unit(images: ArrayLike) -> Float[Array, '... h w 3']:
  """uint8 images / 255, float images as they are, as f32 in [0, 1].

  Raises:
    UserError: any other integer type, or not three channels last.
  """
  if images.ndim < 3 or images.shape[-1] != 3:
    raise UserError(
      f'images must be [b h w 3], channels last; got shape {images.shape}'
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
  """Raises UserError if `images`, called `what`, are of an integer type."""
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
  borders; without, samples beyond a border repeat it, as torch does.
  """
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
  h, w = images.shape[-3:-1]
  x = images.astype(jnp.float32)
  if h != size[0]:
    rows = resize_matrix(h, size[0], method, antialias).astype(np.float32)
    x = jnp.einsum(
      '...hwc,ih->...iwc', x, rows, precision=jax.lax.Precision.HIGHEST
    )
  if w != size[1]:
    cols = resize_matrix(w, size[1], method, antialias).astype(np.float32)
    x = jnp.einsum(
      '...hwc,jw->...hjc', x, cols, precision=jax.lax.Precision.HIGHEST
    )
  return x


def patchify(
  images: Float[Array, 'b h w c'], patch: int
) -> Float[Array, 'b gh gw p']:
  """[b h w c] to [b h/p w/p p*p*c], each patch laid (row, column, channel)."""
  b, h, w, c = images.shape
  gh, gw = h // patch, w // patch
  x = images.reshape(b, gh, patch, gw, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh, gw, patch * patch * c)


def unpatchify(
  patches: Float[Array, 'b gh gw p'], patch: int
) -> Float[Array, 'b h w c']:
  """The inverse of `patchify`."""
  b, gh, gw, p = patches.shape
  c = p // (patch * patch)
  x = patches.reshape(b, gh, gw, patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * patch, gw * patch, c)
