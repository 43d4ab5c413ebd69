"""A vision encoder: images in [0, 1] to a grid of continuous latents.

Every family is this module with another spec (`encoders/`). It does not resize
images to the model's size (the tokenizer does, by its size rule), pool or
project.
"""

import dataclasses

from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from vqrae_jax.errors import UserError
from vqrae_jax.nn import vit
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import EncoderSpec


class Encoder(nn.Module):
  """f[b h w 3] in [0, 1] -> latents f[b h//p w//p d].

  A remainder of h or w modulo the patch p is cropped at the bottom and right.
  Prefix tokens are dropped from the output.
  """

  spec: EncoderSpec

  @nn.compact
  def __call__(
    self, images: Shaped[ArrayLike, 'b h w 3']
  ) -> Float[Array, 'b gh gw d']:
    spec, s = self.spec, self.spec.vit
    images = image_ops.to_unit(images)
    b, h, w, _ = images.shape
    gh, gw = h // s.patch_size, w // s.patch_size
    if not (gh and gw):
      raise UserError(
        f'an image of {h}x{w} is smaller than a patch of {s.patch_size} pixels'
      )
    x = images[:, : gh * s.patch_size, : gw * s.patch_size]
    x = image_ops.normalize(x, spec.pixel_norm.mean, spec.pixel_norm.std)
    x = image_ops.patchify(x, s.patch_size)
    x = vit.PatchEmbed(
      s, spec.posemb_resize, spec.posemb_antialias, name='embed'
    )(x)
    x = vit.Transformer(s, name='transformer')(x, vit.rotation(s, (gh, gw)))
    if spec.output_norm == 'plain':  # a LayerNorm in every family
      layer = dataclasses.replace(s, norm='layer')
      x = vit.norm(layer, 'norm', affine=False)(x)
    elif spec.output_norm == 'affine' and spec.final_norm:
      x = vit.norm(s, 'norm')(x)
    return x[:, s.num_prefix_tokens :].reshape(b, gh, gw, s.width)
