"""VGG16's convolutions (arXiv 1409.1556): features at five depths.

Thirteen 3x3 convolutions in five groups, each followed by a relu, with 2x2 max
pooling between groups. The outputs of the five groups are those that LPIPS
reads. The classifier and the pooling before it are omitted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.specs import RunOptions

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each group
MIN_SIDE = 16  # pixels: four poolings leave one


def _as_product(
  x: Float[Array, 'b h w c'],
  kernel: Float[Array, '3 3 c d'],
  *_,
  precision: Any,
  **__,
) -> Float[Array, 'b h w d']:
  """A 3x3 convolution, padded by one, as one product with nine shifts.

  For grids smaller than the kernel (images of 32 pixels end at 2 x 2), on which
  XLA's CPU convolution runs at 1 GFLOP/s, a fiftieth of this.
  """
  h, w = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  x = jnp.concatenate(shifts, axis=-1)
  kernel = kernel.reshape(-1, kernel.shape[-1])
  return jnp.matmul(x, kernel, precision=precision)


class VGG16(nn.Module):
  """f[b h w 3] -> five features f[b h/2^k w/2^k width], k = 0 … 4.

  They follow relus 1_2, 2_2, 3_3, 4_3 and 5_3. Pooling drops the last row
  of an odd side. The range of the images depends on the weights. Computes in
  `run.dtype`; in f32 at the highest precision.
  """

  widths: tuple[int, ...] = WIDTHS
  run: RunOptions = RunOptions()

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w 3']
  ) -> tuple[Float[Array, 'b _ _ _'], ...]:
    def convolutions(self, x, group):
      small = min(x.shape[1:3]) < 3
      options = dict(
        features=self.widths[group - 1],
        kernel_size=(3, 3),
        padding=1,
        dtype=self.run.dtype,
        kernel_init=nn.initializers.he_normal(),
        precision=self.run.precision,
        conv_general_dilated=_as_product if small else None,
      )
      names = [f'conv{group}_{n + 1}' for n in range(CONVOLUTIONS[group - 1])]
      if self.is_initializing():
        for name in names:
          x = jax.nn.relu(nn.Conv(**options, name=name)(x))
        return x
      conv = nn.Conv(**options, parent=None)

      def one(x, leaves):
        return jax.nn.relu(conv.apply({'params': leaves}, x)), None

      def one_by_one(x, leaves):
        for each in leaves:
          x, _ = one(x, each)
        return x

      def scanned(x, leaves):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
        return jax.lax.scan(one, x, stacked)[0]

      leaves = [self.variables['params'][name] for name in names]
      if x.shape[-1] != options['features']:
        x, _ = one(x, leaves.pop(0))
      # A TPU compiles each convolution separately, so those of one shape run in
      # a loop, for which CPUs have no fast kernel.
      return jax.lax.platform_dependent(
        x, leaves, tpu=scanned, default=one_by_one
      )

    if self.run.remat:
      convolutions = nn.remat(convolutions, static_argnums=2)
    features = []
    for group in range(1, len(self.widths) + 1):
      if group > 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
      x = convolutions(self, x, group)
      features.append(x)
    return tuple(features)
