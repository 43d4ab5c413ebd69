"""Losses on latents, read from one forward pass.

The quantizer computes its own losses, where codes and latents are available in
f32 (`quantizers/base.py`); here they get their names. In arXiv 1711.00937
`commit` (latents to codes) has weight beta and `codebook` (codes to latents)
weight one. `distill` keeps the latents of an encoder in training from drifting.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.types import LatentInputs

EPS = 1e-12  # of squared norms: a token of zeros has a gradient too


def commit(x: LatentInputs) -> Float[Array, '']:
  """mean (latents - sg(codes))^2 in code space."""
  return x.out.quantizer.losses['commit']


def codebook(x: LatentInputs) -> Float[Array, '']:
  """mean (sg(latents) - codes)^2 in code space."""
  return x.out.quantizer.losses['codebook']


def entropy(x: LatentInputs) -> Float[Array, '']:
  """Mean entropy of a token's softmax over codes, minus gamma times the entropy
  of the tokens' mean, in nats (arXiv 2310.05737): favours confident choices and
  the use of all codes."""
  return x.out.quantizer.losses['entropy']


def diversity(x: LatentInputs) -> Float[Array, '']:
  """Negative entropy of the tokens' mean softmax over codes, in nats."""
  return x.out.quantizer.losses['diversity']


def orthogonal(x: LatentInputs) -> Float[Array, '']:
  """How far codes are from orthogonal (arXiv 2112.00384)."""
  return x.out.quantizer.losses['orthogonal']


def kl(x: LatentInputs) -> Float[Array, '']:
  """KL divergence of tokens' softmax over codes from uniform, nats (Gumbel)."""
  return x.out.quantizer.losses['kl']


def distill(x: LatentInputs) -> Float[Array, '']:
  """How far the latents, or the decoder's inputs, drifted; f32.

  With a teacher, mean (latents - teacher)^2, of each of `encoder.layers`: they
  stay those of a frozen encoder (arXiv 2511.23386). Without one ("self"),
  mean (z_q - sg(latents))^2, as in the PyTorch project: codes and the map
  from codes to latents follow the continuous latents. Here the gradient ends at
  the codes. Straight through to the encoder it would push tokens away from
  their codes, against `commit`: a small run with it fell from 22.2 to 15.7 dB
  and to a perplexity of 4 within 500 steps (2026-11). If latents are normalized
  for the quantizer, all of these are in the encoder's own space: z_q is
  denormalized before the decoder reads it.
  """
  if x.teacher is not None:
    encoded = x.out.encoded.astype(jnp.float32)
    return jnp.mean((encoded - x.teacher.astype(jnp.float32)) ** 2)
  latents = x.out.latents.astype(jnp.float32)
  out = x.out.quantizer
  # Out of training z_q has no gradient to the latents.
  z_q = out.z_q if out.quantized is None else out.quantized
  latents = jax.lax.stop_gradient(latents)
  return jnp.mean((z_q.astype(jnp.float32) - latents) ** 2)


def deep_features(x: LatentInputs) -> Float[Array, '']:
  """`feature_loss` of the feature decoder's prediction of the last block that
  is read, or of the latents."""
  return feature_loss(x, 'deep', -1)


def shallow_features(x: LatentInputs) -> Float[Array, '']:
  """`feature_loss` of the feature decoder's prediction of the first of
  `encoder.layers`."""
  return feature_loss(x, 'shallow', 0)


def feature_loss(x: LatentInputs, name: str, layer: int) -> Float[Array, '']:
  """Distance of the feature decoder's prediction from the encoder's output,
  which gets no gradient (IDEAL, arXiv 2606.11096): 1 - cosine plus the squared
  distance, both averaged over tokens, the latter also over channels; f32."""
  target = x.out.encoded
  target = target[..., layer, :] if target.ndim == 5 else target
  target = jax.lax.stop_gradient(target.astype(jnp.float32))
  found = x.out.predictions[name].astype(jnp.float32)
  norms = ((found**2).sum(-1) + EPS) * ((target**2).sum(-1) + EPS)
  cosine = (found * target).sum(-1) / jnp.sqrt(norms)
  return jnp.mean(1 - cosine) + jnp.mean((found - target) ** 2)
