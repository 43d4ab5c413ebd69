"""A small ConvNeXt encoder (arXiv 2201.03545), random at the start.

The first level has patches of 4 pixels; each further one halves the resolution,
so that 3 levels make tokens of 16 pixels. It reads no published weights.
"""

import jax
from flax import linen as nn

from vqrae_jax.errors import UserError
from vqrae_jax.models.encoder import EncoderModule
from vqrae_jax.ops import images as image_ops


def norm(dtype: str, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
  """x + scale * dense(gelu(dense(norm(depthwise convolution)))), 7x7."""

  width: int
  dtype: str

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(
      self.width,
      (7, 7),
      feature_group_count=self.width,
      dtype=self.dtype,
      name='depthwise',
    )(x)
    y = norm(self.dtype, 'norm')(y)
    y = nn.Dense(4 * self.width, dtype=self.dtype, name='fc1')(y)
    y = jax.nn.gelu(y, approximate=False)
    y = nn.Dense(self.width, dtype=self.dtype, name='fc2')(y)
    init = nn.initializers.constant(0.1)
    return x + self.param('scale', init, (self.width,)).astype(y.dtype) * y


class ConvNeXt(EncoderModule):
  """f[b h w 3] in [0, 1] -> f[b h/p w/p d], p = 2^(levels + 1).

  Attributes:
    depths: blocks of each level.
    widths: channels of each level; the last are those of the latents.
  """

  depths: tuple[int, ...] = (1, 1, 2)
  widths: tuple[int, ...] = (48, 96, 192)

  def __post_init__(self):
    if len(self.depths) != len(self.widths) or not self.depths:
      raise UserError(
        f'encoder.depths={self.depths} and encoder.widths={self.widths} must '
        'have a number for each level'
      )
    super().__post_init__()

  @property
  def patch_size(self) -> int:
    return 2 ** (len(self.depths) + 1)

  @property
  def latent_dim(self) -> int:
    return self.widths[-1]

  @nn.compact
  def __call__(self, images):
    mean, std = self.pixel_norm.mean, self.pixel_norm.std
    x = image_ops.normalize(images, mean, std).astype(self.dtype)
    block = nn.remat(Block) if self.remat else Block
    levels = zip(self.depths, self.widths, strict=True)
    for level, (depth, width) in enumerate(levels):
      side = 2 if level else 4
      x = nn.Conv(
        width,
        (side, side),
        (side, side),
        padding='VALID',
        dtype=self.dtype,
        name=f'down{level}',
      )(x)
      x = norm(self.dtype, f'norm{level}')(x)
      for i in range(depth):
        x = block(width, self.dtype, name=f'level{level}_block{i}')(x)
    return norm(self.dtype, 'norm')(x)
