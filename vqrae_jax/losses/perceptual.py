"""Losses that compare two images by a network's features or logits.

LPIPS (arXiv 1801.03924, version 0.1 on VGG16) and the distance of a
ConvNeXt-S's logits (arXiv 2201.03545), as in TA-TiTok (arXiv 2501.07730).
There the mix "lpips-convnext_s-1.0-0.1" is a mean,
(lpips + 0.1 convnext) / 1.1, so with its weight of 1.1 it is
`losses=dict(lpips=1.0, convnext=0.1)` here; 1.1 times the sum would be
`dict(lpips=1.1, convnext=0.11)`.

The networks' arrays come with the inputs (`pretrained/networks.py` makes them);
they and the targets get no gradient. Networks run as the inputs say, by default
in f32 at the highest precision; what follows them is f32 always.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.errors import UserError
from vqrae_jax.losses.reconstruction import checked, weights_of
from vqrae_jax.nn.convnext import ConvNeXt
from vqrae_jax.nn.vgg import MIN_SIDE, VGG16
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import IMAGENET_NORM, RunOptions
from vqrae_jax.types import LossInputs, Tree

# LPIPS's normalization of images in [-1, 1] before VGG16.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_SIDE = 224
# Under the root: beside it, as first published, the slope at features that
# are all zero is infinite. Values change by 1e-10 / 2|x|^2, relative.
_EPS = 1e-10


def _unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Each position's features at length one; zeros stay zeros."""
  square = jnp.sum(x * x, -1, keepdims=True)
  return x * jax.lax.rsqrt(square + _EPS)


def _features(
  images: Float[Array, 'b h w 3'], weights: Tree, run: RunOptions
) -> list[Float[Array, 'b _ _ _']]:
  widths = tuple(len(weights['heads'][f'tap{n}']) for n in range(1, 6))
  x = image_ops.normalize(2 * images - 1, _SHIFT, _SCALE)
  features = VGG16(widths, run).apply({'params': weights['net']}, x)
  return [_unit(f.astype(jnp.float32)) for f in features]


def lpips(x: LossInputs) -> Float[Array, '']:
  """LPIPS, the weighted squared distance of VGG16's features, as a mean over
  images: `lpips_distances`."""
  return lpips_distances(x).mean()


def lpips_distances(x: LossInputs) -> Float[Array, 'b']:
  """LPIPS: the weighted squared distance of two images' features.

  At each of five depths of VGG16 both images' features are scaled to length
  one a position; squared differences are weighted per channel (`heads`), summed
  over channels and averaged over positions; depths are summed.

  Args:
    x: images in [0, 1] of 16 pixels a side at least; `weights["lpips"]`.

  Raises:
    UserError: other images, or no weights.
  """
  x = checked(x, 'lpips')
  weights = weights_of(x, 'lpips')
  size = x.targets.shape[1:3]
  if min(size) < MIN_SIDE:
    raise UserError(
      f'the loss "lpips" needs images of {MIN_SIDE} pixels a side; got {size}'
    )
  weights, targets = jax.lax.stop_gradient((weights, x.targets))
  run = x.run or RunOptions()
  recon = _features(x.reconstruction, weights, run)
  target = _features(targets, weights, run)
  total = jnp.zeros(len(targets), jnp.float32)
  for n, (a, b) in enumerate(zip(recon, target, strict=True), 1):
    head = jnp.asarray(weights['heads'][f'tap{n}'], jnp.float32)
    distance = jnp.einsum(
      'bhwc,c->bhw', (a - b) ** 2, head, precision='highest'
    )
    total += distance.mean((1, 2))
  return total


def _logits(
  images: Float[Array, 'b h w 3'], net: Tree, run: RunOptions
) -> Float[Array, 'b classes']:
  blocks = [net[f'blocks{n}']['scale'].shape for n in range(1, 5)]
  depths, widths = map(tuple, zip(*blocks, strict=True))
  model = ConvNeXt(depths, widths, len(net['head']['bias']), run)
  x = image_ops.resize(images, (_SIDE, _SIDE), 'bilinear', antialias=True)
  x = image_ops.normalize(x, IMAGENET_NORM.mean, IMAGENET_NORM.std)
  x = model.apply({'params': net}, x)
  return x.astype(jnp.float32)


def convnext(x: LossInputs) -> Float[Array, '']:
  """mean (logits of the reconstruction - of the target)^2 of a ConvNeXt-S.

  Images are resized to 224 pixels a side, bilinear with antialias.

  Args:
    x: images in [0, 1]; `weights["convnext"]`.

  Raises:
    UserError: images out of range, or no weights.
  """
  x = checked(x, 'convnext')
  weights = weights_of(x, 'convnext')
  weights, targets = jax.lax.stop_gradient((weights, x.targets))
  run = x.run or RunOptions()
  recon = _logits(x.reconstruction, weights['net'], run)
  return jnp.mean((recon - _logits(targets, weights['net'], run)) ** 2)
