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

DEPTHS = (3, 3, 27, 3)
WIDTHS = (96, 192, 384, 768)
CLASSES = 1000

_HIGHEST = jax.lax.Precision.HIGHEST


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(1e-6, use_fast_variance=False, name=name)


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, precision=_HIGHEST, name=name)


def _down(features: int, factor: int, name: str) -> nn.Conv:
  """Each square of `factor` pixels to one."""
  side = (factor, factor)
  return nn.Conv(
    features, side, side, padding='VALID', precision=_HIGHEST, name=name
  )


class Block(nn.Module):
  """x + scale * fc2(gelu(fc1(norm(depthwise(x))))); a body for `nn.scan`."""

  width: int

  @nn.compact
  def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
    y = nn.Conv(
      self.width,
      (7, 7),
      padding=3,
      feature_group_count=self.width,
      precision=_HIGHEST,
      name='depthwise',
    )(x)
    y = _dense(4 * self.width, 'fc1')(_norm('norm')(y))
    y = _dense(self.width, 'fc2')(jax.nn.gelu(y, approximate=False))
    # Training starts at 1e-6, at which a random network would be linear.
    init = nn.initializers.constant(0.1)
    return x + self.param('scale', init, (self.width,)) * y, None


class ConvNeXt(nn.Module):
  """f32[b h w 3], normalized as ImageNet, -> logits f32[b classes].

  Attributes:
    depths: blocks of each level.
    widths: channels of each level.
    classes: number of logits.
  """

  depths: tuple[int, ...] = DEPTHS
  widths: tuple[int, ...] = WIDTHS
  classes: int = CLASSES

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w 3']) -> Float[Array, 'b classes']:
    x = _down(self.widths[0], 4, 'embed')(x)
    x = _norm('norm1')(x)
    levels = zip(self.depths, self.widths, strict=True)
    for level, (depth, width) in enumerate(levels, 1):
      if level > 1:
        x = _norm(f'norm{level}')(x)
        x = _down(width, 2, f'down{level}')(x)
      stack = nn.scan(
        Block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=depth,
      )
      x = stack(width, name=f'blocks{level}')(x, None)[0]
    x = _norm('norm')(x.mean((1, 2)))
    return _dense(self.classes, 'head')(x)
