"""Losses on latents, read from one forward pass.

The quantizer computes its own, where codes and latents are at hand in f32
(`quantizers/base.py`); here they get their names. beta weighs `commit`
(latents to codes), one weighs `codebook` (codes to latents), as in
arXiv 1711.00937. `distill` keeps the encoder's meaning while it moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.types import LatentInputs


def commit(x: LatentInputs) -> Float[Array, '']:
  """mean (latents - sg(codes))^2 in code space."""
  return x.out.quantizer.losses['commit']


def codebook(x: LatentInputs) -> Float[Array, '']:
  """mean (sg(latents) - codes)^2 in code space."""
  return x.out.quantizer.losses['codebook']


def distill(x: LatentInputs) -> Float[Array, '']:
  """How far the latents, or what the decoder reads, drifted; f32.

  With a teacher, mean (latents - teacher)^2: the continuous latents stay
  those of a frozen encoder (arXiv 2511.23386). Without one ("self"),
  mean (z_q - sg(latents))^2, as the PyTorch project has it: codes and the way
  back from them follow the continuous latents. Here the gradient ends at the
  codes. Straight through to the encoder it would push tokens away from their
  codes, against `commit`: a small run with it fell from 22.2 to 15.7 dB and to
  a perplexity of 4 within 500 steps (2026-11). Where latents are normalised
  for the quantizer, all of these are in the encoder's own space: z_q is brought
  back before the decoder reads it, and so before it is compared.
  """
  latents = x.out.latents.astype(jnp.float32)
  if x.teacher is not None:
    return jnp.mean((latents - x.teacher.astype(jnp.float32)) ** 2)
  found = x.out.quantizer
  # Out of training z_q has no gradient to the latents.
  z_q = found.z_q if found.quantized is None else found.quantized
  latents = jax.lax.stop_gradient(latents)
  return jnp.mean((z_q.astype(jnp.float32) - latents) ** 2)
