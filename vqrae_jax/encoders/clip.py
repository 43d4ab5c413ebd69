"""CLIP vision encoders of OpenAI (arXiv 2103.00020) and LAION (2212.07143).

LayerNorm eps 1e-5, quick gelu (OpenAI) or exact gelu (LAION), a cls token,
learned positions, also for the cls token, resampled bicubic without antialias,
a norm before the blocks ("pre_layrnorm" in the files) and so no bias in the
patch embedding. Pixels are normalized by the mean and std of OpenAI's data, in
LAION's L to [-1, 1]. No text tower, no projection into the joint space.

CLIP applies its final norm (`post_layernorm`) to the cls token only, the one
token that it was trained on; transformers' `last_hidden_state` is before it.
Here `output_norm="affine"` applies that norm to every patch, as in all other
families: this is how CLIP's patches are used as dense features (MaskCLIP,
2112.01071), and it gives latents a known scale. `"none"` gives transformers'
`last_hidden_state`.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

_OPENAI = dict(
  mean=(0.48145466, 0.4578275, 0.40821073),
  std=(0.26862954, 0.26130258, 0.27577711),
)
_HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
_H = dict(width=1280, depth=32, num_heads=16, mlp_dim=5120)
_BIG_G = dict(width=1664, depth=48, num_heads=16, mlp_dim=8192)


def _spec_fields(vit: dict, pixels: dict = _OPENAI) -> dict:
  vit = vit | naming.CLS_TOKEN | dict(embed_norm=True)
  return dict(vit=vit, pixel_norm=pixels)


def _row(
  size: dict,
  patch: int,
  pixels: int = 224,
  act: str = 'quick_gelu',
  norm: dict = _OPENAI,
) -> dict:
  grid = (pixels // patch, pixels // patch)
  vit = dict(patch_size=patch, grid=grid, norm_eps=1e-5, act=act)
  return _spec_fields(size | vit, norm)


_BASE, _LARGE = naming.SIZES['base'], naming.SIZES['large']
_REPOSITORIES = {
  'openai/clip-vit-base-patch32': _row(_BASE, 32),
  'openai/clip-vit-base-patch16': _row(_BASE, 16),
  'openai/clip-vit-large-patch14': _row(_LARGE, 14),
  'openai/clip-vit-large-patch14-336': _row(_LARGE, 14, 336),
  # Sizes and pixels: mlfoundations/open_clip's model_configs and pretrained.py.
  'laion/CLIP-ViT-L-14-laion2B-s32B-b82K': _row(
    _LARGE, 14, act='gelu', norm=_HALF
  ),
  'laion/CLIP-ViT-H-14-laion2B-s32B-b79K': _row(_H, 14, act='gelu'),
  'laion/CLIP-ViT-bigG-14-laion2B-39B-b160k': _row(_BIG_G, 14, act='gelu'),
}
# Row's name -> its repository.
HUBS = {hub.split('/')[1].lower(): hub for hub in _REPOSITORIES}
ROWS = dict(zip(HUBS, _REPOSITORIES.values(), strict=True))


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """The table of the hub's keys, with or without those of the text tower."""
  rows = (
    *naming.convolution('embeddings.patch_embedding'),
    Rule('embeddings.class_embedding', 'embed/prefix', 'token'),
    Rule(
      'embeddings.position_embedding.weight',
      ('embed/prefix_positions', 'embed/positions'),
      ('same', 'grid'),
    ),
    *naming.norm('pre_layrnorm', 'embed/norm'),
    *naming.blocks('encoder.layers.{i}.', naming.HF_CLIP, naming.HF_CLIP_NORMS),
    *naming.final_norm(spec, 'post_layernorm'),
    Ignore(r'(visual|text)_projection\..*', "CLIP's joint embedding space"),
    Ignore(r'classifier\..*', 'the classifier: latents are taken before it'),
    Ignore(r'text_model\..*|logit_scale', 'the text tower'),
    Ignore(r'embeddings\.position_ids', 'the numbers 0, 1, 2, …'),
  )
  return Table(rows)


KEY_FORMATS = (naming.KeyFormat('CLIP', r'(^|\.)pre_layrnorm\.', table),)


def fields(config: Mapping[str, Any]) -> dict:
  """An `EncoderSpec`'s fields from a `config.json`; the defaults are base's."""
  c = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
  c |= dict(intermediate_size=3072, layer_norm_eps=1e-5)
  c |= config
  size = naming.patch_grid(c, 224, 32)
  return _spec_fields(naming.vit_fields(c, 'quick_gelu') | size)
