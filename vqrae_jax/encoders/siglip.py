"""SigLIP (arXiv 2303.15343) and SigLIP2 (2502.14786) vision encoders.

LayerNorm eps 1e-6, tanh-gelu, biases everywhere, learned positions, no cls
token, pixels scaled to [-1, 1]. The pooling head is not part of the encoder.
Sizes are those of the published `config.json` files; positions are resampled
bicubic without antialias, as the family's code does. The grid of a size that is
not a multiple of the patch is rounded down: 384 / 14 is 27.

SigLIP2 has the same architecture with other weights, and resizes images
bilinear. Its "naflex" encoders are for any aspect ratio and resample a table of
16 x 16 positions bilinear with antialias. Here NaFlex has its native grid and
the grids of the size rule, without packed sequences or padding masks.

Files: the hub's (patches are embedded by a convolution, in NaFlex by a linear
layer over row, column, channel) and big_vision's `.npz`, with separate or
stacked blocks.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table, by_heads

_SIZES = naming.SIZES | {
  'so400m': dict(width=1152, depth=27, num_heads=16, mlp_dim=4304)
}
_PIXELS = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
_NAFLEX = dict(
  resize='bilinear', posemb_resize='bilinear', posemb_antialias=True
)


def _row(size: str, patch: int, pixels: int, **fields) -> dict:
  vit = dict(
    **_SIZES[size],
    patch_size=patch,
    grid=(pixels // patch, pixels // patch),
    act='gelu_tanh',
  )
  return dict(vit=vit, pixel_norm=_PIXELS, **fields)


def _rows(family: str, sizes: Mapping, **fields) -> dict:
  return {
    f'{family}-{size}-patch{patch}-{pixels}': _row(
      size, patch, pixels, **fields
    )
    for (size, patch), sides in sizes.items()
    for pixels in sides
  }


_SIGLIP = {
  ('base', 16): (224, 256, 384, 512),
  ('large', 16): (256, 384),
  ('so400m', 14): (224, 384),
}
_SIGLIP2 = {
  ('base', 32): (256,),
  ('base', 16): (224, 256, 384, 512),
  ('large', 16): (256, 384, 512),
  ('so400m', 14): (224, 384),
  ('so400m', 16): (256, 384, 512),
}
ROWS = {
  **_rows('siglip', _SIGLIP),
  **_rows('siglip2', _SIGLIP2, resize='bilinear'),
  **{
    f'siglip2-{size}-patch16-naflex': _row(size, 16, 256, **_NAFLEX)
    for size in ('base', 'so400m')
  },
}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the hub's keys; a patch embedding of two axes is NaFlex's."""
  embed = 'embeddings.patch_embedding'
  ndim = {len(s) for k, s in shapes.items() if k.endswith(f'{embed}.weight')}
  layout = 'linear' if ndim == {2} else 'conv_patch'
  rows = (
    *naming.dense(embed, 'embed/linear', transform=layout),
    Rule('embeddings.position_embedding.weight', 'embed/positions', 'grid'),
    *naming.blocks('encoder.layers.{i}.', naming.HF_CLIP, naming.HF_CLIP_NORMS),
    *naming.final_norm(spec, 'post_layernorm'),
    Ignore(r'head\..*', 'the pooling head: latents are taken before it'),
    Ignore(r'classifier\..*', 'the classifier: latents are taken before it'),
    Ignore(r'text_model\..*|logit_(scale|bias)', 'the text tower'),
    Ignore(r'embeddings\.position_ids', 'the numbers 0, 1, 2, …'),
  )
  return Table(rows)


def _big_vision_block(theirs: str, heads: int) -> list[Rule]:
  split, joined = by_heads(heads, -1), by_heads(heads, -2)
  rows = []
  for name in ('query', 'key', 'value', 'out'):
    layouts = (joined, 'same') if name == 'out' else (split, split)
    for leaf, layout in zip(('kernel', 'bias'), layouts, strict=True):
      key = f'{theirs}MultiHeadDotProductAttention_0/{name}/{leaf}'
      rows.append(Rule(key, f'{BLOCKS}attention/{name}/{leaf}', layout))
  for n in (0, 1):
    layers = {f'MlpBlock_0/Dense_{n}': 'mlp/fc', f'LayerNorm_{n}': 'norm'}
    for layer, ours in layers.items():
      rows += [
        Rule(f'{theirs}{layer}/{leaf}', f'{BLOCKS}{ours}{n + 1}/{leaf}')
        for leaf in ('kernel', 'scale', 'bias')
      ]
  return rows


def big_vision_table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of big_vision's ViT, with or without the prefix "params/img/"."""
  stacked = any('/encoderblock/' in key for key in shapes)
  block = 'Transformer/encoderblock' + ('/' if stacked else '_{i}/')
  rows = [
    Rule('embedding/kernel', 'embed/linear/kernel', 'flax patch'),
    Rule('embedding/bias', 'embed/linear/bias'),
    Rule('pos_embedding', 'embed/positions', 'batched grid'),
    *_big_vision_block(block, spec.vit.num_heads),
    Rule('Transformer/encoder_norm/scale', 'norm/scale'),
    Rule('Transformer/encoder_norm/bias', 'norm/bias'),
    Ignore('(MAPHead_0|head)/.*', 'the pooling head: latents are before it'),
    Ignore('txt/.*|t|b', 'the text tower'),
  ]
  if why := naming.norm_unused(spec):
    rows.append(Ignore('Transformer/encoder_norm/.*', why))
  return Table(tuple(rows), ('params/', 'opt/target/', 'img/'))


KEY_FORMATS = (
  naming.KeyFormat('SigLIP', r'(^|\.)embeddings\.position_embedding\.', table),
  naming.KeyFormat(
    'SigLIP of big_vision', r'Transformer/encoder_norm/', big_vision_table
  ),
)


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json`; the defaults are base's."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(intermediate_size=3072, layer_norm_eps=1e-6)
  c |= config
  if c['model_type'].startswith('siglip2'):
    patch = naming.square_side(c.get('patch_size', 16))
    n = round(c.get('num_patches', 256) ** 0.5)
    size, resampling = dict(patch_size=patch, grid=(n, n)), _NAFLEX
  else:
    size, resampling = naming.patch_grid(c, 224, 16), {}
  vit = naming.vit_fields(c, 'gelu_pytorch_tanh') | size
  return dict(vit=vit, pixel_norm=_PIXELS, **resampling)
