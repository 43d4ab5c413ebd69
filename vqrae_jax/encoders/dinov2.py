"""DINOv2 (arXiv 2304.07193), without and with registers (2309.16588).

LayerNorm eps 1e-6, exact gelu (giant: SwiGLU), LayerScale, a cls token,
pixels normalized by ImageNet's mean and std. Positions are learned for 518
pixels, a grid of 37 x 37, and resampled bicubic, with antialias only in the
models with registers. The cls token has a position, the four registers have
none. No mask token, no heads.

In published files the first half of SwiGLU's `weights_in` is the gate.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

_SIZES = {
  'small': dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
  **naming.SIZES,
  # SwiGLU: two thirds of 4 x width, rounded up to a multiple of 8.
  'giant': dict(width=1536, depth=40, num_heads=24, mlp_dim=4096, act='swiglu'),
}


def _spec_fields(vit: dict, with_registers: bool, registers: int) -> dict:
  vit = vit | naming.CLS_TOKEN
  vit |= dict(num_prefix_tokens=1 + registers, num_registers=registers)
  return dict(
    vit=vit,
    pixel_norm=naming.IMAGENET_PIXELS,
    posemb_antialias=with_registers,
  )


def _row(size: str, registers: int) -> dict:
  vit = dict(patch_size=14, grid=(37, 37), layer_scale=1.0)
  return _spec_fields(_SIZES[size] | vit, bool(registers), registers)


ROWS = {f'dinov2-{size}': _row(size, 0) for size in _SIZES} | {
  f'dinov2-with-registers-{size}': _row(size, 4) for size in _SIZES
}


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the hub's keys."""
  layer = 'encoder.layer.{i}.'
  linears, gated = naming.fc_layers(), []
  if spec.vit.act == 'swiglu':
    ours = f'{BLOCKS}mlp/gate', f'{BLOCKS}mlp/fc1'
    linears = {'mlp.weights_out': 'mlp/fc2'}
    gated = naming.dense(f'{layer}mlp.weights_in', *ours)
  rows = (
    *naming.hf_embeddings(),
    Rule('embeddings.register_tokens', 'embed/registers', 'batched'),
    Ignore(r'embeddings\.mask_token', 'no patch is masked here'),
    *naming.blocks(layer, naming.HF_ATTENTION | linears),
    *gated,
    Rule(f'{layer}layer_scale1.lambda1', f'{BLOCKS}scale1'),
    Rule(f'{layer}layer_scale2.lambda1', f'{BLOCKS}scale2'),
    *naming.final_norm(spec, 'layernorm'),
    Ignore(r'classifier\..*', 'a head: latents are taken before it'),
  )
  return Table(rows)


KEY_FORMATS = (
  naming.KeyFormat(
    'DINOv2', r'encoder\.layer\.\d+\.layer_scale1\.lambda1$', table
  ),
)


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json`."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(mlp_ratio=4, layer_norm_eps=1e-6, layerscale_value=1.0)
  c |= dict(use_swiglu_ffn=False, num_register_tokens=4)
  c |= config
  c['intermediate_size'] = int(c['hidden_size'] * c['mlp_ratio'])
  if c['use_swiglu_ffn']:
    c['hidden_act'] = 'gelu'  # has no effect
    two_thirds = int(c['intermediate_size'] * 2 / 3)
    c['intermediate_size'] = (two_thirds + 7) // 8 * 8
  vit = naming.vit_fields(c) | naming.patch_grid(c, 224, 14)
  vit['layer_scale'] = c['layerscale_value']
  if c['use_swiglu_ffn']:
    vit['act'] = 'swiglu'
  with_registers = c['model_type'] == 'dinov2_with_registers'
  registers = c['num_register_tokens'] if with_registers else 0
  return _spec_fields(vit, with_registers, registers)
