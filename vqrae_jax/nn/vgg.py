"""VGG16's convolutions (arXiv 1409.1556): features at five depths.

Thirteen 3x3 convolutions in five groups, each followed by a relu, a 2x2 max
pooling between groups. Out comes the end of each group, which is what LPIPS
reads. The classifier, and the pooling before it, are not here.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each group
MIN_SIDE = 16  # pixels: four poolings leave one

_HIGHEST = jax.lax.Precision.HIGHEST


class VGG16(nn.Module):
  """f32[b h w 3] -> five features f32[b h/2^k w/2^k width], k = 0 … 4.

  They lie behind the relus 1_2, 2_2, 3_3, 4_3 and 5_3. A side that 2 does not
  divide loses its last row to the pooling. What range the images have, the
  weights say.
  """

  widths: tuple[int, ...] = WIDTHS

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w 3']
  ) -> tuple[Float[Array, 'b _ _ _'], ...]:
    features = []
    for group, width in enumerate(self.widths, 1):
      if group > 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for n in range(1, CONVOLUTIONS[group - 1] + 1):
        x = nn.Conv(
          width,
          (3, 3),
          padding=1,
          kernel_init=nn.initializers.he_normal(),
          precision=_HIGHEST,
          name=f'conv{group}_{n}',
        )(x)
        x = jax.nn.relu(x)
      features.append(x)
    return tuple(features)
