"""ViT-MAE encoders (arXiv 2111.06377), without the masking and the decoder.

LayerNorm eps 1e-12 (that of the published `config.json` files), exact gelu, a
cls token with a position, pixels by ImageNet's mean and std, 224 pixels,
images resized bilinear as its processor does. The published weights carry the
sin-cos table as a leaf, so it is one here, and other sizes resample it bicubic
without antialias.
"""

import dataclasses

from vqrae_jax.specs import IMAGENET_NORM

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
