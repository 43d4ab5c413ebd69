"""InternViT encoders (arXiv 2312.14238, 2412.05271), patch 14.

Exact gelu, LayerScale, a cls token with a position, pixels by ImageNet's mean
and std, positions resampled bicubic without antialias, no final norm. The
300M has LayerNorm and biases on q k v; the 6B has RMSNorm, normalises queries
and keys over its full width, and has no such biases. The first 6B releases
have 48 blocks; later ones drop the last three. No pixel shuffle, no
projector into a language model.

Files: the authors' own names, with q k v in one array, and those of the hub's
"-hf" models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.errors import choose
from vqrae_jax.specs import IMAGENET_NORM, EncoderSpec
from vqrae_jax.weights import Rule, Table, ignore

_PIXELS = dataclasses.asdict(IMAGENET_NORM)

_300M = dict(width=1024, depth=24, num_heads=16, mlp_dim=4096)
_6B = dict(
  width=3200,
  num_heads=25,
  mlp_dim=12800,
  norm='rms',
  qkv_bias=False,
  qk_norm=True,
)


def _row(pixels: int, **numbers) -> dict:
  vit = dict(
    **numbers,
    patch_size=14,
    grid=(pixels // 14, pixels // 14),
    norm_eps=1e-6,
    layer_scale=0.1,
    num_prefix_tokens=1,
    prefix_has_posemb=True,
  )
  return dict(vit=vit, pixel_norm=_PIXELS, final_norm=False)


ROWS = {
  'internvit-300m-448px': _row(448, **_300M),
  'internvit-300m-448px-v2_5': _row(448, **_300M),
  'internvit-6b-224px': _row(224, depth=48, **_6B),
  'internvit-6b-448px-v1-0': _row(448, depth=48, **_6B),
  'internvit-6b-448px-v1-2': _row(448, depth=45, **_6B),
  'internvit-6b-448px-v1-5': _row(448, depth=45, **_6B),
  'internvit-6b-448px-v2_5': _row(448, depth=45, **_6B),
}

_OTHERS = ignore(
  r'(language_model|mlp1|multi_modal_projector|lm_head)\..*',
  'the language model around the encoder',
)
_QKV = tuple(f'{BLOCKS}attention/{name}' for name in ('query', 'key', 'value'))


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The authors' names."""
  del spec, shapes
  layer = 'encoder.layers.{i}.'
  rows = [
    *naming.convolution('embeddings.patch_embedding'),
    *naming.cls_and_positions(
      'embeddings.class_embedding', 'embeddings.position_embedding'
    ),
    *naming.cut(f'{layer}attn.qkv', _QKV),
    *naming.dense(f'{layer}attn.proj', f'{BLOCKS}attention/out'),
  ]
  for q, ours in zip('qk', _QKV, strict=False):
    rows.append(
      Rule(f'{layer}attn.{q}_norm.weight', f'{ours}_norm/scale[{{i}}]')
    )
  for n in '12':
    rows += naming.dense(f'{layer}mlp.fc{n}', f'{BLOCKS}mlp/fc{n}')
    rows += naming.norm(f'{layer}norm{n}', f'{BLOCKS}norm{n}')
    rows.append(Rule(f'{layer}ls{n}', f'{BLOCKS}scale{n}[{{i}}]'))
  return Table((*rows, _OTHERS))


def hf_table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The names of the hub's "-hf" models."""
  del shapes
  layer = 'encoder.layer.{i}.'
  rows = [
    *naming.convolution('embeddings.patch_embeddings.projection'),
    *naming.cls_and_positions(
      'embeddings.cls_token', 'embeddings.position_embeddings'
    ),
    *naming.dense(
      f'{layer}attention.projection_layer', f'{BLOCKS}attention/out'
    ),
    ignore(r'embeddings\.mask_token', 'no patch is masked here'),
  ]
  for q, ours in zip('qkv', _QKV, strict=True):
    rows += naming.dense(f'{layer}attention.{q}_proj', ours)
    if q != 'v':
      scale = f'{ours}_norm/scale[{{i}}]'
      rows.append(Rule(f'{layer}attention.{q}_norm.weight', scale))
  for n, place in (('1', 'before'), ('2', 'after')):
    rows += naming.dense(f'{layer}mlp.fc{n}', f'{BLOCKS}mlp/fc{n}')
    rows += naming.norm(f'{layer}layernorm_{place}', f'{BLOCKS}norm{n}')
    rows.append(Rule(f'{layer}lambda_{n}', f'{BLOCKS}scale{n}[{{i}}]'))
  rows += naming.final_norm(spec, 'layernorm')
  return Table((*rows, _OTHERS))


NAMINGS = (
  naming.KeyFormat('InternViT', r'(^|\.)embeddings\.class_embedding$', table),
  naming.KeyFormat('InternViT ("-hf")', r'\d\.lambda_1$', hf_table),
)

_DEFAULTS = {
  'intern_vit_6b': dict(
    hidden_size=3200,
    num_hidden_layers=48,
    num_attention_heads=25,
    intermediate_size=12800,
    norm_type='rms_norm',
    qkv_bias=False,
    qk_normalization=True,
  ),
  'internvl_vision': dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    norm_type='layer_norm',
    attention_bias=False,
    use_qk_norm=False,
    use_mean_pooling=True,
  ),
}


def fields(config: Mapping[str, Any]) -> dict:
  """A spec's fields out of a `config.json` of either kind."""
  c = _DEFAULTS[config['model_type']] | dict(config)
  hf = config['model_type'] == 'internvl_vision'
  norms = {'layer_norm': 'layer', 'rms_norm': 'rms'}
  vit = dict(
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=c['intermediate_size'],
    norm=choose(norms, str(c['norm_type']), 'norm_type'),
    norm_eps=c.get('layer_norm_eps', 1e-6),
    act=naming.act(c, 'gelu'),
    qkv_bias=c['attention_bias' if hf else 'qkv_bias'],
    qk_norm=c['use_qk_norm' if hf else 'qk_normalization'],
    layer_scale=0.1,
    num_prefix_tokens=1,
    prefix_has_posemb=True,
    **naming.square(c, 448 if hf else 224, 14),
  )
  final = hf and not c['use_mean_pooling']
  return dict(vit=vit, pixel_norm=_PIXELS, final_norm=final)
