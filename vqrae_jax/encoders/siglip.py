"""SigLIP vision encoders (arXiv 2303.15343), fixed input sizes.

LayerNorm eps 1e-6, tanh-gelu, biases everywhere, learned positions, no cls
token, pixels to [-1, 1]. The pooling head is not part of the encoder. Sizes
are those of the published `config.json` files; positions are resampled
bicubic without antialias, as the family's code does. A size that is no
multiple of the patch floors its grid: 384 / 14 is 27.
"""

_SIZES = {
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  'so400m': dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
}


def row(size: str, patch: int, pixels: int, **fields) -> dict:
  """One encoder's spec fields; SigLIP2 has the same towers."""
  vit = dict(
    **_SIZES[size],
    patch_size=patch,
    grid=(pixels // patch, pixels // patch),
    act='gelu_tanh',
  )
  norm = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
  return dict(vit=vit, pixel_norm=norm, **fields)


_PUBLISHED = {
  ('base', 16): (224, 256, 384, 512),
  ('large', 16): (256, 384),
  ('so400m', 14): (224, 384),
}

ROWS = {
  f'siglip-{size}-patch{patch}-{pixels}': row(size, patch, pixels)
  for (size, patch), sides in _PUBLISHED.items()
  for pixels in sides
}
