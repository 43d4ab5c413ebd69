"""A vision encoder: images in [0, 1] to a grid of continuous latents.

Every family is this module with a different spec (`encoders/`). It does not
resize images to the model's size (the tokenizer does, by its size rule), pool
or project. With `spec.layers` it returns the outputs of several blocks, which
`Fusion` turns into latents: means over blocks as in RAEv2 (arXiv 2605.18324),
cross-attention as in IDEAL (2606.11096). Encoders of other packages subclass
`EncoderModule`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from vqrae_jax.errors import UserError
from vqrae_jax.nn import vit
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import (
  DTYPES,
  REMATS,
  RESIZES,
  TORCH_BICUBIC,
  EncoderSpec,
  PixelNorm,
  one_of,
)

FUSION_HEADS = 8  # of the cross-attention, as IDEAL has it


class Encoder(nn.Module):
  """f[b h w 3] in [0, 1] -> f[b h//p w//p d], or f[b h//p w//p t d] for the t
  blocks in `spec.layers`.

  If h or w is not a multiple of the patch p, the remainder is cropped at the
  bottom and right.
  Prefix tokens are dropped from the output.
  """

  spec: EncoderSpec

  @nn.compact
  def __call__(
    self, images: Shaped[ArrayLike, 'b h w 3']
  ) -> Float[Array, 'b gh gw *d']:
    spec, s = self.spec, self.spec.computed
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
    norms = {
      # A LayerNorm in every family.
      'plain': vit.norm(
        dataclasses.replace(s, norm='layer'), 'plain_norm', affine=False
      ),
      'none': lambda x: x,
    }
    norms['affine'] = vit.norm(s, 'norm') if spec.final_norm else norms['none']

    def output(x, norm):
      x = norms[norm](x)
      return x[:, s.num_prefix_tokens :].reshape(b, gh, gw, s.width)

    rotation = vit.rotation(s, (gh, gw))
    if spec.layers is None:
      x = vit.Transformer(s, name='transformer')(x, rotation)
      return output(x, spec.output_norm)
    blocks = vit.Transformer(s, spec.layers, name='transformer')
    outputs = map(output, blocks(x, rotation), spec.norms)
    return jnp.stack([*outputs], axis=3)


class Fusion(nn.Module):
  """Outputs of blocks f[b gh gw t d] -> latents f[b gh gw c]; only "attention"
  has parameters.

  "attention": x = deep + MHA(q=norm(deep), k=v=norm(the others)), then
  x + mlp(norm(x)), with twice as many hidden channels; IDEAL's dropout is
  omitted.
  """

  spec: EncoderSpec

  @nn.compact
  def __call__(
    self, layers: Float[Array, 'b gh gw t d']
  ) -> Float[Array, 'b gh gw c']:
    spec = self.spec
    *grid, t, d = layers.shape
    deep = layers[..., -1, :]
    if spec.fuse == 'concat':
      return layers.reshape(*grid, t * d)
    if spec.fuse == 'mean':
      x = layers.mean(-2, dtype=jnp.float32)
      if spec.add_final_mean:
        x = x + deep.mean((1, 2), keepdims=True, dtype=jnp.float32)
      return x.astype(layers.dtype)
    s = dataclasses.replace(
      spec.vit,
      norm='layer',
      num_heads=FUSION_HEADS,
      mlp_dim=2 * d,
      act='gelu',
      qkv_bias=True,
      qk_norm=False,
    )
    x = deep.reshape(grid[0], -1, d)
    others = layers[..., :-1, :].reshape(grid[0], -1, d)
    x = x + vit.Attention(s, name='attention')(
      vit.norm(s, 'norm_queries')(x),
      context=vit.norm(s, 'norm_keys')(others),
    )
    x = x + vit.Mlp(s, name='mlp')(vit.norm(s, 'norm_mlp')(x))
    return x.reshape(deep.shape)


class EncoderModule(nn.Module):
  """An encoder of another package: encoder=dict(name="package.module:Class").

  A tokenizer requires of a subclass:

  - `patch_size`, the side of a token in pixels, and `latent_dim`, the channels
    of the latents: each a field or a property.
  - `__call__(images)`: f32[b h w 3] in [0, 1], where h and w are any multiples
    of the patch (including one patch) -> f[b h/patch w/patch latent_dim] in
    `dtype`. It normalises pixels itself. Its only variables are "params".

  Its dataclass fields are the keys of the config's section and are recorded in
  `config.json`. They may be numbers, strings, booleans, None and tuples of
  them, each with a type and a default. To add a field to a published encoder,
  make a new class, unless the field changes nothing at its default.

  Attributes:
    pixel_norm: mean and std of pixels; the decoder's too, unless it has its
      own.
    resize: how the tokenizer brings images to the encoder's size
      (`EncoderSpec`).
    dtype: what it computes in, set by `model.dtype`. `dtype`, `scan` and
      `remat` are not part of `config.json`; a module uses those that apply to
      it.
    scan: whether equal blocks run as a loop over one block.
    remat: whether the gradient recomputes blocks.
  """

  pixel_norm: PixelNorm = PixelNorm()
  resize: str = 'bicubic'
  dtype: str = 'float32'
  scan: bool = True
  remat: bool | str = False

  def __post_init__(self):
    one_of('encoder.resize', self.resize, (*RESIZES, TORCH_BICUBIC))
    one_of('model.dtype', self.dtype, DTYPES)
    one_of('model.remat', self.remat, REMATS)
    super().__post_init__()


def check_encoder(module: EncoderModule, where: str) -> None:
  """Checks that another package's module does what `EncoderModule` requires;
  shapes only.

  Raises:
    UserError: names what is missing, or what it returns instead.
  """
  fields = {f.name for f in dataclasses.fields(module)}
  for name in ('patch_size', 'latent_dim'):
    # `getattr` of an absent attribute would call a linen module's `setup`.
    has = name in fields or hasattr(type(module), name)
    value = getattr(module, name) if has else None
    if type(value) is not int or value < 1:
      raise UserError(
        f'{where}: {type(module).__name__}.{name} must be an integer above 0, '
        f'not {value!r}'
      )
  p = module.patch_size
  for gh, gw in ((1, 1), (2, 3)):
    images = jax.ShapeDtypeStruct((2, gh * p, gw * p, 3), jnp.float32)
    out, variables = jax.eval_shape(
      module.init_with_output, jax.random.key(0), images
    )
    shape = (2, gh, gw, module.latent_dim)
    if getattr(out, 'shape', None) != shape or out.dtype != module.dtype:
      raise UserError(
        f'{where}: {type(module).__name__} returns {_shown(out)} for images '
        f'{list(images.shape)}; it must return {module.dtype}{list(shape)}'
      )
    if others := variables.keys() - {'params'}:
      raise UserError(
        f'{where}: {type(module).__name__} has variables in the collection '
        f'"{min(others)}"; an encoder has "params" alone'
      )


def _shown(out: object) -> str:
  shape = getattr(out, 'shape', None)
  return type(out).__name__ if shape is None else f'{out.dtype}{list(shape)}'
