"""ViT-MAE encoders (arXiv 2111.06377), without the masking and the decoder.

LayerNorm eps 1e-12 (that of the published `config.json` files), exact gelu, a
cls token with a position, pixels normalized by ImageNet's mean and std, 224
pixels, images resized bilinear as its processor does. The published weights
contain the sin-cos table, so it is a leaf here too, which is resampled bicubic
without antialias for other sizes.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Table

_HUGE = dict(width=1280, depth=32, num_heads=16, mlp_dim=5120)


def _spec_fields(vit: dict) -> dict:
  return dict(
    vit=vit | naming.CLS_TOKEN,
    pixel_norm=naming.IMAGENET_PIXELS,
    resize='bilinear',
  )


def _row(size: dict, patch: int) -> dict:
  grid = (224 // patch, 224 // patch)
  return _spec_fields(size | dict(patch_size=patch, grid=grid, norm_eps=1e-12))


ROWS = {
  'vit-mae-base': _row(naming.SIZES['base'], 16),
  'vit-mae-large': _row(naming.SIZES['large'], 16),
  'vit-mae-huge': _row(_HUGE, 14),
}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the hub's keys, of the encoder or the pre-training model."""
  rows = (
    *naming.hf_embeddings(),
    *naming.hf_vit('encoder.layer.{i}.'),
    *naming.final_norm(spec, 'layernorm'),
    Ignore(r'decoder\..*', "the pre-training's decoder"),
  )
  return Table(rows)


KEY_FORMATS = (
  naming.KeyFormat('ViT-MAE', r'\d\.intermediate\.dense\.', table),
)


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json`."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(intermediate_size=3072, layer_norm_eps=1e-12)
  c |= config
  return _spec_fields(naming.vit_fields(c) | naming.patch_grid(c, 224, 16))
