"""ViT-MAE encoders (arXiv 2111.06377), without the masking and the decoder.

LayerNorm eps 1e-12 (that of the published `config.json` files), exact gelu, a
cls token with a position, pixels by ImageNet's mean and std, 224 pixels,
images resized bilinear as its processor does. The published weights carry the
sin-cos table as a leaf, so it is one here, and other sizes resample it bicubic
without antialias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.specs import IMAGENET_NORM, EncoderSpec
from vqrae_jax.weights import Table, ignore

_PIXELS = dataclasses.asdict(IMAGENET_NORM)

_SIZES = {
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072, patch_size=16),
  'large': dict(
    width=1024, depth=24, num_heads=16, mlp_dim=4096, patch_size=16
  ),
  'huge': dict(width=1280, depth=32, num_heads=16, mlp_dim=5120, patch_size=14),
}


def _row(size: str) -> dict:
  numbers = _SIZES[size]
  side = 224 // numbers['patch_size']
  vit = dict(
    **numbers,
    grid=(side, side),
    norm_eps=1e-12,
    num_prefix_tokens=1,
    prefix_has_posemb=True,
  )
  return dict(vit=vit, pixel_norm=_PIXELS, resize='bilinear')


ROWS = {f'vit-mae-{size}': _row(size) for size in _SIZES}

_LAYER = 'encoder.layer.{i}.'
_DENSE = {
  'attention.attention.query': 'attention/query',
  'attention.attention.key': 'attention/key',
  'attention.attention.value': 'attention/value',
  'attention.output.dense': 'attention/out',
  'intermediate.dense': 'mlp/fc1',
  'output.dense': 'mlp/fc2',
}
_NORMS = {'layernorm_before': 'norm1', 'layernorm_after': 'norm2'}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The hub's names, of the encoder alone or of the pre-training model."""
  del shapes
  rows = [
    *naming.convolution('embeddings.patch_embeddings.projection'),
    *naming.cls_and_positions(
      'embeddings.cls_token', 'embeddings.position_embeddings'
    ),
  ]
  for theirs, ours in _DENSE.items():
    rows += naming.dense(_LAYER + theirs, BLOCKS + ours)
  for theirs, ours in _NORMS.items():
    rows += naming.norm(_LAYER + theirs, BLOCKS + ours)
  rows += naming.final_norm(spec, 'layernorm')
  rows.append(ignore(r'decoder\..*', "the pre-training's decoder"))
  return Table(tuple(rows))


NAMINGS = (naming.KeyFormat('ViT-MAE', r'\d\.intermediate\.dense\.', table),)


def fields(config: Mapping[str, Any]) -> dict:
  """A spec's fields out of a `config.json`."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(intermediate_size=3072, layer_norm_eps=1e-12, qkv_bias=True)
  c |= config
  vit = dict(
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=c['intermediate_size'],
    norm_eps=c['layer_norm_eps'],
    act=naming.act(c, 'gelu'),
    qkv_bias=c['qkv_bias'],
    num_prefix_tokens=1,
    prefix_has_posemb=True,
    **naming.square(c, 224, 16),
  )
  return dict(vit=vit, pixel_norm=_PIXELS, resize='bilinear')
