"""The ViT decoder: a grid of quantized latents to pixels.

The layout of RAE's decoder (arXiv 2510.11690), after MAE's (2111.06377): a
linear embedding, a trainable cls token that is dropped at the end, fixed
sin-cos positions (or others of the spec), pre-norm blocks, a norm and one
linear head to patch*patch*3 values laid out (row, column, channel). No tanh at
the end: pixels are y * std + mean.
"""

from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.nn import vit
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import DecoderSpec, FeatureDecoderSpec

_COMMON = dict(
  patch_size=16,
  grid=(16, 16),
  norm_eps=1e-12,
  posemb='sincos2d',
  num_prefix_tokens=1,
)

# Published sizes, with parameters at 768 latent channels and patch 16.
DECODERS = {
  'B': dict(width=768, depth=12, num_heads=12, mlp_dim=3072, **_COMMON),
  'L': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096, **_COMMON),
  'XL': dict(width=1152, depth=28, num_heads=16, mlp_dim=4096, **_COMMON),
}


class Decoder(nn.Module):
  """z_q f[b gh gw d] -> (images f32[b gh*p gw*p 3] not clipped, features)."""

  spec: DecoderSpec

  @nn.compact
  def __call__(
    self, z_q: Float[Array, 'b gh gw d']
  ) -> tuple[Float[Array, 'b h w 3'], Float[Array, 'b n e']]:
    spec, s = self.spec, self.spec.vit
    b, gh, gw, _ = z_q.shape
    x = vit.PatchEmbed(s, name='embed')(z_q)
    x = vit.Transformer(s, name='transformer')(x, vit.rotation(s, (gh, gw)))
    features = vit.norm(s, 'norm')(x)
    x = vit.dense(s, s.patch_size**2 * 3, 'head')(features)
    x = x[:, s.num_prefix_tokens :].reshape(b, gh, gw, x.shape[-1])
    x = image_ops.unpatchify(x.astype('float32'), s.patch_size)
    x = image_ops.denormalize(x, spec.pixel_norm.mean, spec.pixel_norm.std)
    return x, features


class FeatureDecoder(nn.Module):
  """z_q f[b gh gw d] -> {"deep": f[b gh gw width], and with `spec.shallow`
  "shallow"}: predictions of the encoder's outputs, a linear head each (IDEAL,
  arXiv 2606.11096)."""

  spec: FeatureDecoderSpec
  width: int

  @nn.compact
  def __call__(self, z_q: Float[Array, 'b gh gw d']) -> dict[str, Array]:
    s = self.spec.vit
    x = vit.PatchEmbed(s, name='embed')(z_q)
    rotation = vit.rotation(s, z_q.shape[1:3])
    x = vit.Transformer(s, name='transformer')(x, rotation)
    x = vit.norm(s, 'norm')(x)
    x = x[:, s.num_prefix_tokens :].reshape(*z_q.shape[:3], s.width)
    return {
      name: vit.dense(s, self.width, f'{name}_head')(x)
      for name in ('deep', *['shallow'] * self.spec.shallow)
    }
