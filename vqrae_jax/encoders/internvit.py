"""InternViT encoders (arXiv 2312.14238, 2412.05271), patch 14.

Exact gelu, LayerScale, a cls token with a position, pixels normalized by
ImageNet's mean and std, positions resampled bicubic without antialias, no final
norm (an "-hf" config without mean pooling has one). The 300M has LayerNorm and
biases on q, k and v; the 6B has RMSNorm, normalizes queries and keys over its
full width, and has no such biases. The first 6B releases have 48 blocks; later
ones drop the last three. No pixel shuffle, no projector into a language model.

Files have the authors' own keys, with q, k and v in one array, or those of the
hub's "-hf" models.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.errors import choose
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

_6B = dict(width=3200, num_heads=25, mlp_dim=12800)
_6B |= dict(norm='rms', qkv_bias=False, qk_norm=True)


def _spec_fields(vit: dict, final_norm: bool = False) -> dict:
  return dict(
    vit=vit | naming.CLS_TOKEN | dict(layer_scale=0.1),
    pixel_norm=naming.IMAGENET_PIXELS,
    final_norm=final_norm,
  )


def _row(pixels: int, **fields) -> dict:
  grid = (pixels // 14, pixels // 14)
  return _spec_fields(fields | dict(patch_size=14, grid=grid, norm_eps=1e-6))


ROWS = {
  'internvit-300m-448px': _row(448, **naming.SIZES['large']),
  'internvit-300m-448px-v2_5': _row(448, **naming.SIZES['large']),
  'internvit-6b-224px': _row(224, depth=48, **_6B),
  'internvit-6b-448px-v1-0': _row(448, depth=48, **_6B),
  'internvit-6b-448px-v1-2': _row(448, depth=45, **_6B),
  'internvit-6b-448px-v1-5': _row(448, depth=45, **_6B),
  'internvit-6b-448px-v2_5': _row(448, depth=45, **_6B),
}

_OTHERS = Ignore(
  r'(language_model|mlp1|multi_modal_projector|lm_head)\..*',
  'the language model around the encoder',
)


def _rows(
  layer: str, linears: dict, norms: dict, scale: str, qk_norm: str
) -> list:
  """Rules of the blocks; `scale` and `qk_norm` are parts of the file's keys."""
  rows = naming.blocks(layer, linears | naming.fc_layers(), norms)
  for n in '12':
    rows.append(Rule(f'{layer}{scale}{n}', f'{BLOCKS}scale{n}'))
  for q, ours in zip('qk', naming.QKV, strict=False):
    norm = f'{layer}{qk_norm}.{q}_norm.weight'
    rows.append(Rule(norm, f'{ours}_norm/scale'))
  return rows


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the authors' keys."""
  layer = 'encoder.layers.{i}.'
  rows = (
    *naming.convolution('embeddings.patch_embedding'),
    Rule('embeddings.class_embedding', 'embed/prefix', 'batched'),
    naming.positions('embeddings.position_embedding'),
    *naming.dense(f'{layer}attn.qkv', *naming.QKV),
    *_rows(layer, {'attn.proj': 'attention/out'}, naming.NORMS, 'ls', 'attn'),
    _OTHERS,
  )
  return Table(rows)


def hf_table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the keys of the hub's "-hf" models."""
  layer = 'encoder.layer.{i}.'
  linears = naming.qkv_layers(
    'attention.{1}_proj', 'attention.projection_layer'
  )
  rows = (
    *naming.hf_embeddings(),
    Ignore(r'embeddings\.mask_token', 'no patch is masked here'),
    *_rows(layer, linears, naming.HF_NORMS, 'lambda_', 'attention'),
    *naming.final_norm(spec, 'layernorm'),
    _OTHERS,
  )
  return Table(rows)


KEY_FORMATS = (
  naming.KeyFormat('InternViT', r'(^|\.)embeddings\.class_embedding$', table),
  naming.KeyFormat('InternViT ("-hf")', r'\d\.lambda_1$', hf_table),
)


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json` of either format."""
  hf = config['model_type'] == 'internvl_vision'
  if hf:
    c = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    c |= dict(intermediate_size=4096, norm_type='layer_norm')
    c |= dict(attention_bias=False, use_qk_norm=False, use_mean_pooling=True)
  else:
    c = dict(hidden_size=3200, num_hidden_layers=48, num_attention_heads=25)
    c |= dict(intermediate_size=12800, norm_type='rms_norm')
    c |= dict(qkv_bias=False, qk_normalization=True)
  c = dict(layer_norm_eps=1e-6) | c | config
  norms = {'layer_norm': 'layer', 'rms_norm': 'rms'}
  vit = naming.vit_fields(
    c, qkv_bias='attention_bias' if hf else 'qkv_bias'
  ) | naming.patch_grid(c, 448 if hf else 224, 14)
  vit['norm'] = choose(norms, str(c['norm_type']), 'norm_type')
  vit['qk_norm'] = c['use_qk_norm' if hf else 'qk_normalization']
  return _spec_fields(vit, final_norm=hf and not c['use_mean_pooling'])
