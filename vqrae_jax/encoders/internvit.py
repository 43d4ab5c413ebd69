"""InternViT encoders (arXiv 2312.14238, 2412.05271), patch 14.

Exact gelu, LayerScale, a cls token with a position, pixels by ImageNet's mean
and std, positions resampled bicubic without antialias, no final norm. The
300M has LayerNorm and biases on q k v; the 6B has RMSNorm, normalises queries
and keys over its full width, and has no such biases. The first 6B releases
have 48 blocks; later ones drop the last three. No pixel shuffle, no
projector into a language model.
"""

import dataclasses

from vqrae_jax.specs import IMAGENET_NORM

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
