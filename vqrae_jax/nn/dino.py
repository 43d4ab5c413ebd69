"""A discriminator on features of a frozen DINO ViT-S/8.

As in RAE (arXiv 2510.11690), after StyleGAN-T (2301.09515): patch tokens after
some of DINO's blocks (2104.14294), the taps, and on each tap a small head of
convolutions along the tokens with spectral norm. GELU is the tanh
approximation, as in RAE's code: taps differ by 2e-4 from DINO's. Only the heads
are trained. The backbone's leaves are the collection "backbone", an argument
like the others; `pretrained/networks.py` loads them.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from vqrae_jax.errors import UserError
from vqrae_jax.nn import vit
from vqrae_jax.nn.spectral import SpectralConv
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import IMAGENET_NORM, ViTSpec

DINO_S8 = ViTSpec(
  width=384,
  depth=12,
  mlp_dim=1536,
  num_heads=6,
  patch_size=8,
  grid=(28, 28),
  norm_eps=1e-6,
  act='gelu_tanh',
  num_prefix_tokens=1,
  prefix_has_posemb=True,
)
# Blocks, counted from 0, whose outputs are read; logits are in this order.
TAPS = (11, 2, 5, 8, 11)
HEAD = ('params', 'spectral')  # the collections that a head has leaves in


class Backbone(nn.Module):
  """images f32[b h w 3] in [0, 1] -> patch tokens f[t b n d] of each tap.

  Images are resized to the native grid's pixels, bilinear without antialias.
  """

  spec: ViTSpec
  taps: tuple[int, ...]

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w 3']
  ) -> Float[Array, 't b n d']:
    s = self.spec
    size = (s.grid[0] * s.patch_size, s.grid[1] * s.patch_size)
    x = image_ops.resize(images, size, 'bilinear', antialias=False)
    x = image_ops.normalize(x, IMAGENET_NORM.mean, IMAGENET_NORM.std)
    x = image_ops.patchify(x.astype(s.dtype), s.patch_size)
    x = vit.PatchEmbed(s, name='embed')(x)
    rotation = vit.rotation(s, s.grid)
    x = vit.Transformer(s, self.taps, name='transformer')(x, rotation)
    return x[:, :, s.num_prefix_tokens :]


class Head(nn.Module):
  """Tokens f[b n c] of one tap -> logits f32[b n]; computes in `dtype`."""

  kernel: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b n c']) -> Float[Array, 'b n']:
    def layer(x, kernel, name):
      y = SpectralConv(x.shape[-1], kernel, self.dtype, name=name)(x)
      # Normalizes over tokens, in f32, with a two-pass variance.
      y = nn.InstanceNorm(
        epsilon=1e-6,
        dtype=self.dtype,
        use_fast_variance=False,
        name=f'{name}_norm',
      )(y)
      return nn.leaky_relu(y, 0.2)

    x = layer(x, 1, 'enter')
    x = (x + layer(x, self.kernel, 'mix')) / math.sqrt(2)
    x = SpectralConv(1, 1, self.dtype, name='out')(x)[..., 0]
    return x.astype(jnp.float32)


class DinoDiscriminator(nn.Module):
  """images f32[b h w 3] in [0, 1] -> logits f32[b n], high for real.

  n = taps x patches, 3920 at the defaults, tap by tap. Collections: "params"
  (the heads, 7,386,245 at the defaults), "backbone" (frozen) and "spectral"
  (updated by `spectral.advance`, never by a call). It computes in the dtype of
  `vit`, norms and gains in f32.

  Attributes:
    vit: the frozen backbone; omitted fields are DINO ViT-S/8's.
    taps: blocks, counted from 0, whose outputs have a head each. Each at least
      0.
    kernel: of the heads' convolutions along tokens, an odd number. At least 1
      token.
  """

  vit: ViTSpec = DINO_S8
  taps: tuple[int, ...] = TAPS
  kernel: int = 9

  def __post_init__(self):
    depth, tokens = self.vit.depth, math.prod(self.vit.grid)
    if not self.taps or not all(0 <= t < depth for t in self.taps):
      raise UserError(
        f'discriminator.fields.taps={self.taps} must be blocks from 0 to '
        f'{depth - 1}'
      )
    if self.kernel % 2 == 0 or not 0 < self.kernel <= tokens:
      raise UserError(
        f'discriminator.fields.kernel={self.kernel} must be odd and at most '
        f'the {tokens} tokens of discriminator.fields.vit.grid'
      )
    super().__post_init__()

  @property
  def backbone(self) -> Backbone:
    """The module whose "params" are this one's collection "backbone"."""
    return Backbone(self.vit, self.taps, parent=None)

  @nn.compact
  def __call__(self, images: Shaped[Array, 'b h w 3']) -> Float[Array, 'b n']:
    image_ops.need_floats(images, "the discriminator's images")
    first = {}
    if self.is_initializing():
      first = self.backbone.init(self.make_rng('params'), images)['params']
    leaves = {
      name: self.variable('backbone', name, lambda n=name: first[n]).value
      for name in ('embed', 'transformer')
    }
    taps = self.backbone.apply({'params': leaves}, images)
    names = [f'head{i}' for i in range(len(taps))]
    options = dict(kernel=self.kernel, dtype=self.vit.dtype)
    if self.is_initializing():
      each = zip(names, taps, strict=True)
      logits = [Head(**options, name=name)(tap) for name, tap in each]
      return jnp.concatenate(logits, axis=1)
    head = Head(**options, parent=None)

    def one_by_one(heads, taps):
      return [head.apply(*pair) for pair in zip(heads, taps, strict=True)]

    def together(heads, taps):
      stacked = jax.tree.map(lambda *x: jnp.stack(x), *heads)
      return list(jax.vmap(head.apply)(stacked, taps))

    heads = [{c: self.variables[c][n] for c in HEAD} for n in names]
    # A TPU compiles each convolution separately: v5e, 16 images, bf16, 37 MiB
    # of code one by one and 9 together. CPUs have no fast kernel for that.
    logits = jax.lax.platform_dependent(
      heads, taps, tpu=together, default=one_by_one
    )
    return jnp.concatenate(logits, axis=1)
