"""The ConvNeXt classifier (arXiv 2201.03545), by default its small size.

Four levels, each at half the resolution of the one before; a block is a 7x7
depthwise convolution, LayerNorm, two dense layers with gelu and LayerScale.
The blocks of a level are stacked [depth, ...]. Inference only: no stochastic
depth.
"""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.specs import RunOptions

DEPTHS = (3, 3, 27, 3)
WIDTHS = (96, 192, 384, 768)
CLASSES = 1000


def _norm(run: RunOptions, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(1e-6, dtype=run.dtype, use_fast_variance=False, name=name)


def _dense(run: RunOptions, features: int, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=run.dtype, precision=run.precision, name=name)


def _down(run: RunOptions, features: int, factor: int, name: str) -> nn.Conv:
  """A convolution that turns each square of `factor` pixels a side into one."""
  side = (factor, factor)
  return nn.Conv(
    features,
    side,
    side,
    padding='VALID',
    dtype=run.dtype,
    precision=run.precision,
    name=name,
  )


class Block(nn.Module):
  """x + scale * fc2(gelu(fc1(norm(depthwise(x))))); a body for `nn.scan`."""

  width: int
  run: RunOptions = RunOptions()

  @nn.compact
  def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
    y = nn.Conv(
      self.width,
      (7, 7),
      padding=3,
      feature_group_count=self.width,
      dtype=self.run.dtype,
      precision=self.run.precision,
      name='depthwise',
    )(x)
    y = _norm(self.run, 'norm')(y)
    y = _dense(self.run, 4 * self.width, 'fc1')(y)
    y = jax.nn.gelu(y, approximate=False)
    y = _dense(self.run, self.width, 'fc2')(y)
    # Published training starts at 1e-6, where a random network would be linear.
    init = nn.initializers.constant(0.1)
    scale = self.param('scale', init, (self.width,))
    return x + scale.astype(y.dtype) * y, None


class ConvNeXt(nn.Module):
  """Images f[b h w 3], normalized as for ImageNet -> logits f[b classes].

  Computes in `run.dtype`; in f32 at the highest precision.

  Attributes:
    depths: blocks of each level.
    widths: channels of each level.
    classes: number of logits.
    run: its dtype, and whether the gradient recomputes blocks.
  """

  depths: tuple[int, ...] = DEPTHS
  widths: tuple[int, ...] = WIDTHS
  classes: int = CLASSES
  run: RunOptions = RunOptions()

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w 3']) -> Float[Array, 'b classes']:
    run, block = self.run, Block
    if run.remat:
      block = nn.remat(Block, prevent_cse=False)
    x = _down(run, self.widths[0], 4, 'embed')(x)
    x = _norm(run, 'norm1')(x)
    levels = zip(self.depths, self.widths, strict=True)
    for level, (depth, width) in enumerate(levels, 1):
      if level > 1:
        x = _norm(run, f'norm{level}')(x)
        x = _down(run, width, 2, f'down{level}')(x)
      stack = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=depth,
      )
      x = stack(width, run, name=f'blocks{level}')(x, None)[0]
    x = _norm(run, 'norm')(x.mean((1, 2)))
    return _dense(run, self.classes, 'head')(x)
