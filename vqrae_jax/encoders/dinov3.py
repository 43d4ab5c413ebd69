"""DINOv3 ViT encoders (arXiv 2508.10104), patch 16.

LayerNorm eps 1e-5, exact gelu (S+, H+, 7B: SwiGLU), LayerScale, a cls token and
four registers. No position table: queries and keys of patches are rotated by
coordinates that run from -1 to 1 on any grid (`ops/posemb.py`). Keys have no
bias; in the 7B queries and values have none either. Images are resized
bilinear; pixels are normalized by ImageNet's mean and std, those of "sat493m"
weights by the mean and std of their satellite images. No mask token, no heads,
no ConvNeXts. transformers' processor resizes floats; here resizing rounds to 8
bits, as Pillow does, for all families.

The numbers are those of the authors' repository (facebookresearch/dinov3 at
6876159, 2026-07-15) and agree with transformers' classes. The published
`config.json` has four registers; the default of transformers' config is none.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.errors import UserError, choose
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

_SMALL = dict(width=384, depth=12, num_heads=6, mlp_dim=1536)
# SwiGLU: two thirds of 6 x width, of 3 x width in the 7B.
_SIZES = {
  'vits16': _SMALL,
  'vits16plus': _SMALL | dict(act='swiglu'),
  'vitb16': naming.SIZES['base'],
  'vitl16': naming.SIZES['large'],
  'vith16plus': dict(
    width=1280, depth=32, num_heads=20, mlp_dim=5120, act='swiglu'
  ),
  'vit7b16': dict(
    width=4096,
    depth=40,
    num_heads=32,
    mlp_dim=8192,
    act='swiglu',
    qkv_bias=False,
  ),
}
_SATELLITE = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))


def _spec_fields(
  vit: dict, registers: int, pixels: dict = naming.IMAGENET_PIXELS
) -> dict:
  vit = vit | dict(posemb='rope2d', num_prefix_tokens=1 + registers)
  return dict(
    vit=vit | dict(num_registers=registers),
    pixel_norm=pixels,
    resize='bilinear',
  )


def _row(size: str, pixels: dict = naming.IMAGENET_PIXELS) -> dict:
  vit = dict(patch_size=16, grid=(14, 14), norm_eps=1e-5, layer_scale=1.0)
  return _spec_fields(vit | dict(qkv_bias='qv') | _SIZES[size], 4, pixels)


ROWS = {f'dinov3-{size}-pretrain-lvd1689m': _row(size) for size in _SIZES} | {
  f'dinov3-{size}-pretrain-sat493m': _row(size, _SATELLITE)
  for size in ('vitl16', 'vit7b16')
}

_LINEARS = naming.qkv_layers('attention.{1}_proj', 'attention.o_proj')
_LINEARS |= {
  'mlp.up_proj': 'mlp/fc1',
  'mlp.gate_proj': 'mlp/gate',
  'mlp.down_proj': 'mlp/fc2',
}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the hub's keys."""
  layer, theirs = 'layer.{i}.', 'embeddings.register_tokens'
  rows = (
    *naming.convolution('embeddings.patch_embeddings'),
    Rule('embeddings.cls_token', 'embed/prefix', 'batched'),
    Rule(theirs, 'embed/registers', 'batched')
    if spec.vit.num_registers
    else Ignore(theirs, 'there are none'),
    Ignore(r'embeddings\.mask_token', 'no patch is masked here'),
    *naming.blocks(layer, _LINEARS),
    Rule(f'{layer}layer_scale1.lambda1', f'{BLOCKS}scale1'),
    Rule(f'{layer}layer_scale2.lambda1', f'{BLOCKS}scale2'),
    *naming.final_norm(spec, 'norm'),
  )
  return Table(rows)


KEY_FORMATS = (
  naming.KeyFormat('DINOv3', r'layer\.\d+\.attention\.o_proj\.', table),
)

# Biases of q, k and v -> `ViTSpec.qkv_bias`.
_BIASES = {
  'True, False, True': 'qv',
  'True, True, True': True,
  'False, False, False': False,
}


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json`.

  Raises:
    UserError: a value that no published model has.
  """
  c = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
  c |= dict(intermediate_size=1536, layer_norm_eps=1e-5, layerscale_value=1.0)
  c |= dict(query_bias=True, key_bias=False, value_bias=True)
  c |= dict(use_gated_mlp=False, hidden_act='gelu', num_register_tokens=0)
  fixed = dict(proj_bias=True, mlp_bias=True, rope_theta=100.0)
  c |= fixed | config
  for key, want in fixed.items():
    if c[key] != want:
      raise UserError(f'{key}={c[key]!r} must be {want!r}')
  if c['use_gated_mlp']:
    act = choose({'silu': 'swiglu'}, str(c['hidden_act']), 'hidden_act')
    c['hidden_act'] = 'gelu'  # has no effect
  vit = naming.vit_fields(c) | naming.patch_grid(c, 224, 16)
  if c['use_gated_mlp']:
    vit['act'] = act
  biases = ', '.join(str(c[f'{name}_bias']) for name in naming.QKV_NAMES)
  vit['qkv_bias'] = choose(_BIASES, biases, 'query, key and value biases')
  vit['layer_scale'] = c['layerscale_value']
  return _spec_fields(vit, c['num_register_tokens'])
