"""Inception-v3 (arXiv 1512.00567) as the Fréchet inception distance uses it.

The network that TensorFlow published on 2015-12-05, with its peculiarities:
mean pooling excludes the padding, the last block has max pooling, and images
are resized to 299 pixels by TensorFlow 1's bilinear resize, which samples at
the corners of pixels. Features are the 2048 means before the classifier, which
is omitted.

Names are those of pytorch-fid's file and torch-fidelity's, the same weights.
Inference only: batch norm uses the published statistics.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from vqrae_jax.specs import RunOptions

SIDE = 299
WIDTH = 2048
_EPS = 1e-3

Convolution = tuple[str, int, int | tuple[int, int]]  # name, channels, kernel
# A chain of convolutions, which may begin with "mean" or "max" pooling; those
# in a tuple read the same input, and their outputs are concatenated.
Branch = Sequence[str | Convolution | tuple[Convolution, Convolution]]


def _block_a(pooled: int) -> tuple[Branch, ...]:
  return (
    [('branch1x1', 64, 1)],
    [('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)],
    [
      ('branch3x3dbl_1', 64, 1),
      ('branch3x3dbl_2', 96, 3),
      ('branch3x3dbl_3', 96, 3),
    ],
    ['mean', ('branch_pool', pooled, 1)],
  )


def _block_c(width: int) -> tuple[Branch, ...]:
  row, column = (1, 7), (7, 1)
  return (
    [('branch1x1', 192, 1)],
    [
      ('branch7x7_1', width, 1),
      ('branch7x7_2', width, row),
      ('branch7x7_3', 192, column),
    ],
    [
      ('branch7x7dbl_1', width, 1),
      ('branch7x7dbl_2', width, column),
      ('branch7x7dbl_3', width, row),
      ('branch7x7dbl_4', width, column),
      ('branch7x7dbl_5', 192, row),
    ],
    ['mean', ('branch_pool', 192, 1)],
  )


def _block_e(pool: str) -> tuple[Branch, ...]:
  row, column = (1, 3), (3, 1)
  return (
    [('branch1x1', 320, 1)],
    [
      ('branch3x3_1', 384, 1),
      (('branch3x3_2a', 384, row), ('branch3x3_2b', 384, column)),
    ],
    [
      ('branch3x3dbl_1', 448, 1),
      ('branch3x3dbl_2', 384, 3),
      (('branch3x3dbl_3a', 384, row), ('branch3x3dbl_3b', 384, column)),
    ],
    [pool, ('branch_pool', 192, 1)],
  )


# Name: channels, kernel, stride, padding; `POOLED` ones read a pooled input.
STEM = {
  'Conv2d_1a_3x3': (32, 3, 2, 'VALID'),
  'Conv2d_2a_3x3': (32, 3, 1, 'VALID'),
  'Conv2d_2b_3x3': (64, 3, 1, 'SAME'),
  'Conv2d_3b_1x1': (80, 1, 1, 'SAME'),
  'Conv2d_4a_3x3': (192, 3, 1, 'VALID'),
}
POOLED = {'Conv2d_3b_1x1'}
# Name: (branches, their last step's stride).
BLOCKS: dict[str, tuple[tuple[Branch, ...], int]] = {
  'Mixed_5b': (_block_a(32), 1),
  'Mixed_5c': (_block_a(64), 1),
  'Mixed_5d': (_block_a(64), 1),
  'Mixed_6a': (
    (
      [('branch3x3', 384, 3)],
      [
        ('branch3x3dbl_1', 64, 1),
        ('branch3x3dbl_2', 96, 3),
        ('branch3x3dbl_3', 96, 3),
      ],
      ['max'],
    ),
    2,
  ),
  'Mixed_6b': (_block_c(128), 1),
  'Mixed_6c': (_block_c(160), 1),
  'Mixed_6d': (_block_c(160), 1),
  'Mixed_6e': (_block_c(192), 1),
  'Mixed_7a': (
    (
      [('branch3x3_1', 192, 1), ('branch3x3_2', 320, 3)],
      [
        ('branch7x7x3_1', 192, 1),
        ('branch7x7x3_2', 192, (1, 7)),
        ('branch7x7x3_3', 192, (7, 1)),
        ('branch7x7x3_4', 192, 3),
      ],
      ['max'],
    ),
    2,
  ),
  'Mixed_7b': (_block_e('mean'), 1),
  'Mixed_7c': (_block_e('max'), 1),
}


def _forked(step: Any) -> tuple[Convolution, ...]:
  """The convolutions of one step, which read the same input; () if it pools."""
  if isinstance(step, str):
    return ()
  return step if isinstance(step[0], tuple) else (step,)


def convolutions() -> Iterator[str]:
  """Names of all convolutions, "Mixed_5b/branch1x1"."""
  yield from STEM
  for block, (branches, _) in BLOCKS.items():
    for branch in branches:
      for step in branch:
        yield from (f'{block}/{name}' for name, *_ in _forked(step))


def resize(
  images: UInt8[Array, 'b h w 3'] | Float[Array, 'b h w 3'],
) -> Float[Array, 'b 299 299 3']:
  """TensorFlow 1's bilinear resize: output i reads the input at i * h / 299,
  without antialias."""
  x = images.astype(jnp.float32)
  for axis in (2, 1):
    n = x.shape[axis]
    at = np.arange(SIDE, dtype=np.float32) * np.float32(n / SIDE)
    low = at.astype(int)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
    left = jnp.take(x, low, axis)
    right = jnp.take(x, np.minimum(low + 1, n - 1), axis)
    x = left + (right - left) * share
  return x


class BasicConv(nn.Module):
  """Convolution without bias, batch norm, relu."""

  features: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ d']:
    x = nn.Conv(
      self.features,
      self.kernel,
      self.stride,
      self.padding,
      use_bias=False,
      kernel_init=nn.initializers.he_normal(),
      precision=RunOptions().precision,
      name='conv',
    )(x)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale, bias, mean, var = (
      self.param(name, init, (self.features,))
      for name, init in dict(
        scale=ones, bias=zeros, mean=zeros, var=ones
      ).items()
    )
    return jax.nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + _EPS)) + bias)


class Block(nn.Module):
  """Branches that read the same input, their outputs concatenated."""

  branches: tuple[Branch, ...]
  stride: int

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ d']:
    outputs = []
    for branch in self.branches:
      y = x
      for i, step in enumerate(branch):
        last = i == len(branch) - 1
        stride = self.stride if last else 1
        padding = 'SAME' if stride == 1 else 'VALID'
        if isinstance(step, str):
          pool = dict(
            mean=lambda *a: nn.avg_pool(*a, count_include_pad=False),
            max=nn.max_pool,
          )[step]
          y = pool(y, (3, 3), (stride, stride), padding)
          continue
        parts = [
          BasicConv(
            features,
            kernel if isinstance(kernel, tuple) else (kernel, kernel),
            stride,
            padding,
            name=name,
          )(y)
          for name, features, kernel in _forked(step)
        ]
        y = jnp.concatenate(parts, -1)
      outputs.append(y)
    return jnp.concatenate(outputs, -1)


class InceptionV3(nn.Module):
  """Images [b h w 3], values 0 to 255, of any size -> features f32[b 2048].

  Computes in f32 at the highest precision.
  """

  @nn.compact
  def __call__(
    self, images: UInt8[Array, 'b h w 3'] | Float[Array, 'b h w 3']
  ) -> Float[Array, 'b 2048']:
    x = (resize(images) - 128) / 128
    for name, (features, kernel, stride, padding) in STEM.items():
      if name in POOLED:
        x = nn.max_pool(x, (3, 3), (2, 2))
      x = BasicConv(features, (kernel, kernel), stride, padding, name=name)(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    for name, (branches, stride) in BLOCKS.items():
      x = Block(branches, stride, name=name)(x)
    return x.mean((1, 2))
