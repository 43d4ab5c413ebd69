"""The pure functions of the public door: they jit, vmap, shard and export.

Each takes the tokenizer (static) and its variables. `encode_to_indices` reads
only the encoder's and quantizer's variables, `decode_from_indices` only the
quantizer's and decoder's. `precision="canonical"` computes everything in f32
with the highest matmul precision, for indices that must not move.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vqrae_jax import losses as loss_terms
from vqrae_jax.errors import UserError, choose
from vqrae_jax.losses.reconstruction import check_images
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import images as image_ops
from vqrae_jax.types import LossInputs, TokenizerOutput, Tree

PRECISIONS = ('default', 'canonical')


def _apply(tokenizer, variables, x, method=None, *, precision, **kwargs):
  choose({p: p for p in PRECISIONS}, precision, 'precision')
  context = contextlib.nullcontext()
  if precision == 'canonical':
    tokenizer = tokenizer.with_run_options(dtype='float32')
    context = jax.default_matmul_precision('highest')
  with context:
    return tokenizer.apply(variables, x, method=method, **kwargs)


def _array(x: Any) -> Any:
  """x, which must be an array of jax or numpy, traced or not."""
  if not hasattr(x, 'ndim'):
    raise UserError(f'an array is needed here, not a {type(x).__name__}')
  return x


def _batched(images: Any) -> Any:
  images = _array(images)
  if images.ndim != 4:
    raise UserError(
      f'images must be [b h w 3]; got shape {images.shape}'
      + ('; add a batch axis: images[None]' if images.ndim == 3 else '')
    )
  return images


def encode_to_indices(
  tokenizer: Tokenizer,
  variables: Tree,
  images: Any,
  *,
  precision: str = 'default',
) -> Array:
  """Images to tokens.

  Args:
    tokenizer: from `build_tokenizer` or `load_tokenizer`.
    variables: its variables; those of the encoder and quantizer suffice.
    images: f[b h w 3] in [0, 1] or uint8; h, w multiples of the decoder patch.
    precision: "default" (the tokenizer's dtype) or "canonical" (f32 highest).

  Returns:
    i32[b gh gw] in [0, K); the last axes are `tokenizer.index_shape(h, w)`.

  Raises:
    UserError: a wrong shape, size, type, or a continuous tokenizer.
  """
  return _apply(
    tokenizer,
    variables,
    _batched(images),
    'encode_to_indices',
    precision=precision,
  )


def decode_from_indices(
  tokenizer: Tokenizer,
  variables: Tree,
  indices: Any,
  *,
  precision: str = 'default',
) -> Array:
  """Tokens to images: exactly what `reconstruct` paints from them.

  Args:
    tokenizer: from `build_tokenizer` or `load_tokenizer`.
    variables: its variables; those of the quantizer and decoder suffice.
    indices: integers [b gh gw] in [0, K).
    precision: "default" or "canonical".

  Returns:
    f32[b h w 3], clipped to [0, 1].

  Raises:
    UserError: indices that are no integers or have another shape.
  """
  indices = _array(indices)
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise UserError(f'indices must be integers, got {indices.dtype}')
  want = 3 + (tokenizer.quantizer.codes_per_token > 1)
  if indices.ndim != want:
    raise UserError(
      f'indices must have {want} axes [b gh gw…], got shape {indices.shape}'
    )
  images = _apply(
    tokenizer, variables, indices, 'decode_from_indices', precision=precision
  )
  return jnp.clip(images, 0.0, 1.0)


def encode(
  tokenizer: Tokenizer,
  variables: Tree,
  images: Any,
  *,
  precision: str = 'default',
) -> Array:
  """Images f[b h w 3] in [0, 1] to continuous latents f[b gh gw d]."""
  return _apply(
    tokenizer, variables, _batched(images), 'encode', precision=precision
  )


def reconstruct(
  tokenizer: Tokenizer,
  variables: Tree,
  images: Any,
  losses: bool = False,
  *,
  precision: str = 'default',
) -> TokenizerOutput:
  """One pass through encoder, quantizer and decoder.

  Args:
    tokenizer: from `build_tokenizer` or `load_tokenizer`.
    variables: all of its variables.
    images: f[b h w 3] in [0, 1] or uint8.
    losses: also give {name: f32[]} of the losses that need no network of
      their own (l1, l2, and the quantizer's), unweighted. Static under jit.
    precision: "default" or "canonical".

  Returns:
    A `TokenizerOutput`; its `images` f32[b h w 3] are not clipped.
  """
  images = _batched(images)
  out = _apply(tokenizer, variables, images, precision=precision)
  if not losses:
    return out
  targets = image_ops.to_unit(images)
  check_images(targets, 'images')
  terms = _pixel_losses(out.images, targets)
  return out.replace(losses=terms | out.quantizer.losses)


@jax.jit  # traced: a decoder's output is not clipped, and that is no error
def _pixel_losses(painted: Array, targets: Array) -> dict[str, Array]:
  seen = LossInputs(painted, targets)
  return {name: term(seen) for name, term in loss_terms.IMAGE_TERMS.items()}


def codebook_usage(counts: Array) -> Array:
  """The share of codes used: counts i32[... k] -> f32[...] in [0, 1]."""
  return code_ops.usage(counts)
