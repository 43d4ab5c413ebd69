"""SigLIP2 vision encoders (arXiv 2502.14786): SigLIP's towers, other weights.

Images are resized bilinear. The fixed sizes are read by SigLIP's own code, so
their positions are resampled bicubic without antialias; the "naflex" ones,
made for any aspect ratio from a table of 16 x 16, bilinear with it. NaFlex
here is its native grid and what the size rule makes of an image, without its
packing of sequences and padding masks.
"""

from vqrae_jax.encoders import siglip

_PUBLISHED = {
  ('base', 32): (256,),
  ('base', 16): (224, 256, 384, 512),
  ('large', 16): (256, 384, 512),
  ('so400m', 14): (224, 384),
  ('so400m', 16): (256, 384, 512),
}

ROWS = {
  f'siglip2-{size}-patch{patch}-{pixels}': siglip.row(
    size, patch, pixels, resize='bilinear'
  )
  for (size, patch), sides in _PUBLISHED.items()
  for pixels in sides
} | {
  f'siglip2-{size}-patch16-naflex': siglip.row(
    size,
    16,
    256,
    resize='bilinear',
    posemb_resize='bilinear',
    posemb_antialias=True,
  )
  for size in ('base', 'so400m')
}
