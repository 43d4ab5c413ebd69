"""DINOv2 (arXiv 2304.07193), without and with registers (2309.16588).

LayerNorm eps 1e-6, exact gelu (giant: SwiGLU), LayerScale, a cls token,
pixels by ImageNet's mean and std. Positions are learned for 518 pixels, a
grid of 37 x 37, and resampled bicubic: with antialias where there are
registers, without where there are none. The cls token has a position, the
four registers have none. No mask token, no heads.

Of a published SwiGLU's `weights_in` the first half is the gate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.specs import IMAGENET_NORM, EncoderSpec
from vqrae_jax.weights import Rule, Table, ignore

_PIXELS = dataclasses.asdict(IMAGENET_NORM)

_SIZES = {
  'small': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  # SwiGLU: two thirds of 4 x width, rounded up to a multiple of 8.
  'giant': dict(width=1536, depth=40, num_heads=24, mlp_dim=4096, act='swiglu'),
}


def _row(size: str, registers: int) -> dict:
  vit = dict(
    **_SIZES[size],
    patch_size=14,
    grid=(37, 37),
    layer_scale=1.0,
    num_prefix_tokens=1 + registers,
    prefix_has_posemb=True,
    num_registers=registers,
  )
  return dict(vit=vit, pixel_norm=_PIXELS, posemb_antialias=bool(registers))


ROWS = {f'dinov2-{size}': _row(size, 0) for size in _SIZES} | {
  f'dinov2-with-registers-{size}': _row(size, 4) for size in _SIZES
}

_LAYER = 'encoder.layer.{i}.'
_DENSE = {
  'attention.attention.query': 'attention/query',
  'attention.attention.key': 'attention/key',
  'attention.attention.value': 'attention/value',
  'attention.output.dense': 'attention/out',
}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The hub's names."""
  del shapes
  rows = [
    *naming.convolution('embeddings.patch_embeddings.projection'),
    *naming.cls_and_positions(
      'embeddings.cls_token', 'embeddings.position_embeddings'
    ),
    Rule('embeddings.register_tokens', 'embed/registers', 'batched'),
    ignore(r'embeddings\.mask_token', 'no patch is masked here'),
  ]
  for theirs, ours in _DENSE.items():
    rows += naming.dense(_LAYER + theirs, BLOCKS + ours)
  mlp, ours = f'{_LAYER}mlp.', f'{BLOCKS}mlp/'
  if spec.vit.act == 'swiglu':
    rows += naming.cut(f'{mlp}weights_in', (f'{ours}gate', f'{ours}fc1'))
    rows += naming.dense(f'{mlp}weights_out', f'{ours}fc2')
  else:
    rows += naming.dense(f'{mlp}fc1', f'{ours}fc1')
    rows += naming.dense(f'{mlp}fc2', f'{ours}fc2')
  for n in '12':
    scale = f'{_LAYER}layer_scale{n}.lambda1'
    rows.append(Rule(scale, f'{BLOCKS}scale{n}[{{i}}]'))
    rows += naming.norm(f'{_LAYER}norm{n}', f'{BLOCKS}norm{n}')
  rows += naming.final_norm(spec, 'layernorm')
  rows.append(ignore(r'classifier\..*', 'a head: latents are taken before it'))
  return Table(tuple(rows))


NAMINGS = (naming.KeyFormat('DINOv2', r'\.layer_scale1\.lambda1$', table),)


def fields(config: Mapping[str, Any]) -> dict:
  """A spec's fields out of a `config.json`."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(mlp_ratio=4, layer_norm_eps=1e-6, layerscale_value=1.0)
  c |= dict(use_swiglu_ffn=False, qkv_bias=True, num_register_tokens=4)
  c |= config
  registers = 0
  if c['model_type'] == 'dinov2_with_registers':
    registers = c['num_register_tokens']
  hidden = int(c['hidden_size'] * c['mlp_ratio'])
  if c['use_swiglu_ffn']:
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
  vit = dict(
    width=c['hidden_size'],
    depth=c['num_hidden_layers'],
    num_heads=c['num_attention_heads'],
    mlp_dim=hidden,
    norm_eps=c['layer_norm_eps'],
    act='swiglu' if c['use_swiglu_ffn'] else naming.act(c, 'gelu'),
    qkv_bias=c['qkv_bias'],
    layer_scale=c['layerscale_value'],
    num_prefix_tokens=1 + registers,
    prefix_has_posemb=True,
    num_registers=registers,
    **naming.square(c, 224, 14),
  )
  antialias = c['model_type'] == 'dinov2_with_registers'
  return dict(vit=vit, pixel_norm=_PIXELS, posemb_antialias=antialias)
