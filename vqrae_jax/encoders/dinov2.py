"""DINOv2 (arXiv 2304.07193), without and with registers (2309.16588).

LayerNorm eps 1e-6, exact gelu (giant: SwiGLU), LayerScale, a cls token,
pixels by ImageNet's mean and std. Positions are learned for 518 pixels, a
grid of 37 x 37, and resampled bicubic: with antialias where there are
registers, without where there are none. The cls token has a position, the
four registers have none. No mask token, no heads.
"""

import dataclasses

from vqrae_jax.specs import IMAGENET_NORM

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
