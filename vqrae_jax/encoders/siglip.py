"""SigLIP vision encoders (arXiv 2303.15343), fixed input sizes.

LayerNorm eps 1e-6, tanh-gelu, biases everywhere, learned positions, no cls
token, pixels to [-1, 1]. The pooling head is not part of the encoder. Sizes
are those of the published `config.json` files; positions are resampled
bicubic without antialias, as the family's code does.
"""

_SIZES = {
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
}


def _row(size: str, patch: int, pixels: int) -> dict:
  vit = dict(
    **_SIZES[size],
    patch_size=patch,
    grid=(pixels // patch, pixels // patch),
    act='gelu_tanh',
  )
  return dict(vit=vit, pixel_norm=dict(mean=(0.5,) * 3, std=(0.5,) * 3))


ROWS = {
  f'siglip-{size}-patch16-{pixels}': _row(size, 16, pixels)
  for size, all_pixels in {
    'base': (224, 256, 384, 512),
    'large': (256, 384),
  }.items()
  for pixels in all_pixels
}
