"""Losses on latents, read from one forward pass.

The quantizer computes its own, where codes and latents are at hand in f32
(`quantizers/base.py`); here they get their names. beta weighs `commit`
(latents to codes), one weighs `codebook` (codes to latents), as in
arXiv 1711.00937.
"""

from jaxtyping import Array, Float

from vqrae_jax.types import TokenizerOutput


def commit(out: TokenizerOutput) -> Float[Array, '']:
  """mean (latents - sg(codes))^2 in code space."""
  return out.quantizer.losses['commit']


def codebook(out: TokenizerOutput) -> Float[Array, '']:
  """mean (sg(latents) - codes)^2 in code space."""
  return out.quantizer.losses['codebook']
