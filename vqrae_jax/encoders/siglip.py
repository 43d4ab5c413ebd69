"""SigLIP vision encoders (arXiv 2303.15343), fixed input sizes.

LayerNorm eps 1e-6, tanh-gelu, biases everywhere, learned positions, no cls
token, pixels to [-1, 1]. The pooling head is not part of the encoder. Sizes
are those of the published `config.json` files; positions are resampled
bicubic without antialias, as the family's code does. A size that is no
multiple of the patch floors its grid: 384 / 14 is 27.

Files: the hub's (convolution, or NaFlex's linear layer over patches laid row,
column, channel) and big_vision's `.npz`, blocks apart or stacked.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import Rule, Table, by_heads, ignore

_SIZES = {
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  'so400m': dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
}


def row(size: str, patch: int, pixels: int, **fields) -> dict:
  """One encoder's spec fields; SigLIP2 has the same towers."""
  vit = dict(
    **_SIZES[size],
    patch_size=patch,
    grid=(pixels // patch, pixels // patch),
    act='gelu_tanh',
  )
  norm = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
  return dict(vit=vit, pixel_norm=norm, **fields)


_PUBLISHED = {
  ('base', 16): (224, 256, 384, 512),
  ('large', 16): (256, 384),
  ('so400m', 14): (224, 384),
}

ROWS = {
  f'siglip-{size}-patch{patch}-{pixels}': row(size, patch, pixels)
  for (size, patch), sides in _PUBLISHED.items()
  for pixels in sides
}


_LAYER = 'encoder.layers.{i}.'
_DENSE = {
  'self_attn.q_proj': 'attention/query',
  'self_attn.k_proj': 'attention/key',
  'self_attn.v_proj': 'attention/value',
  'self_attn.out_proj': 'attention/out',
  'mlp.fc1': 'mlp/fc1',
  'mlp.fc2': 'mlp/fc2',
}
_PATCH = 'embeddings.patch_embedding'


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The hub's names; a patch embedding of two axes is NaFlex's."""
  flat = any(
    k.endswith(f'{_PATCH}.weight') and len(s) == 2 for k, s in shapes.items()
  )
  embed = naming.dense(_PATCH, 'embed/linear')
  rows = [*(embed if flat else naming.convolution(_PATCH))]
  rows.append(
    Rule('embeddings.position_embedding.weight', 'embed/positions', 'grid')
  )
  for theirs, ours in _DENSE.items():
    rows += naming.dense(_LAYER + theirs, BLOCKS + ours)
  for n in '12':
    rows += naming.norm(f'{_LAYER}layer_norm{n}', f'{BLOCKS}norm{n}')
  rows += naming.final_norm(spec, 'post_layernorm')
  rows += [
    ignore(r'head\..*', 'the pooling head: latents are taken before it'),
    ignore(r'text_model\..*|logit_(scale|bias)', 'the text tower'),
    ignore(r'embeddings\.position_ids', 'a list of numbers, 0, 1, 2, …'),
  ]
  return Table(tuple(rows))


def _big_vision_block(theirs: str, row: str, heads: int) -> list[Rule]:
  attention = f'{theirs}MultiHeadDotProductAttention_0/'
  rows = []
  for name in ('query', 'key', 'value', 'out'):
    last = name != 'out'
    ours = f'{BLOCKS}attention/{name}'
    split = by_heads(heads, -1 if last else -2)
    bias = split if last else 'same'
    rows += [
      Rule(f'{attention}{name}/kernel', f'{ours}/kernel{row}', split),
      Rule(f'{attention}{name}/bias', f'{ours}/bias{row}', bias),
    ]
  for n in (0, 1):
    layer, ours = f'{theirs}MlpBlock_0/Dense_{n}', f'{BLOCKS}mlp/fc{n + 1}'
    rows += [Rule(f'{layer}/{w}', f'{ours}/{w}{row}') for w in _DENSE_LEAVES]
    layer, ours = f'{theirs}LayerNorm_{n}', f'{BLOCKS}norm{n + 1}'
    rows += [Rule(f'{layer}/{w}', f'{ours}/{w}{row}') for w in _NORM_LEAVES]
  return rows


_DENSE_LEAVES, _NORM_LEAVES = ('kernel', 'bias'), ('scale', 'bias')


def big_vision_table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The names of big_vision's ViT, under "params/img/" or bare."""
  stacked = any('/encoderblock/' in key for key in shapes)
  block = 'Transformer/encoderblock' + ('/' if stacked else '_{i}/')
  rows = [
    Rule('embedding/kernel', 'embed/linear/kernel', 'flax patch'),
    Rule('embedding/bias', 'embed/linear/bias'),
    Rule('pos_embedding', 'embed/positions', 'batched grid'),
    *_big_vision_block(block, '' if stacked else '[{i}]', spec.vit.num_heads),
  ]
  last = 'Transformer/encoder_norm'
  if why := naming.NORMS[spec.output_norm]:
    rows.append(ignore(f'{last}/.*', why))
  else:
    rows += [Rule(f'{last}/{w}', f'norm/{w}') for w in _NORM_LEAVES]
  rows += [
    ignore('(MAPHead_0|head)/.*', 'the pooling head: latents are before it'),
    ignore('txt/.*|t|b', 'the text tower'),
  ]
  return Table(tuple(rows), ('params/', 'opt/target/', 'img/'))


NAMINGS = (
  naming.KeyFormat('SigLIP', r'(^|\.)embeddings\.position_embedding\.', table),
  naming.KeyFormat(
    'SigLIP of big_vision', r'Transformer/encoder_norm/', big_vision_table
  ),
)

_DEFAULTS = dict(
  hidden_size=768,
  num_hidden_layers=12,
  intermediate_size=3072,
  num_attention_heads=12,
  layer_norm_eps=1e-6,
)


def fields(config: Mapping[str, Any]) -> dict:
  """A spec's fields out of a `config.json`; what it leaves out is base's."""
  c = _DEFAULTS | dict(config)
  if c['model_type'].startswith('siglip2'):
    patch, n = naming.side(c.get('patch_size', 16)), c.get('num_patches', 256)
    where = dict(patch_size=patch, grid=(round(n**0.5),) * 2)
    how = dict(
      resize='bilinear', posemb_resize='bilinear', posemb_antialias=True
    )
  else:
    where, how = naming.square(c, 224, 16), {}
  vit = dict(
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=c['intermediate_size'],
    norm_eps=c['layer_norm_eps'],
    act=naming.act(c, 'gelu_pytorch_tanh'),
    **where,
  )
  return dict(vit=vit, pixel_norm=dict(mean=(0.5,) * 3, std=(0.5,) * 3), **how)
