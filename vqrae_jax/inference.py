"""The pure functions of the public API: they jit, vmap, shard and export.

Each takes the tokenizer (static) and its variables. `encode_to_indices` reads
only the encoder's and quantizer's variables, `decode_from_indices` only the
quantizer's and decoder's. `precision="canonical"` computes everything in f32
with the highest matmul precision, for indices that must not move.

Values are checked where they are at hand. Under a trace (jit, vmap, grad, on
other hosts) they are not: images outside [0, 1] are resized and tokenized as
they are, clipped only if the size rule resizes them; NaN gives some index in
[0, K); indices outside [0, K) give some code, the nearest valid index of a
table (a negative one counts from its end), FSQ's digits modulo the levels.
Meshes have Auto axes. An empty batch gives an empty answer.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from vqrae_jax import losses as loss_terms
from vqrae_jax.errors import UserError, choose
from vqrae_jax.models.tokenizer import Tokenizer, variable_shapes
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import images as image_ops
from vqrae_jax.ops import trees
from vqrae_jax.types import LossInputs, TokenizerOutput, Tree

PRECISIONS = ('default', 'canonical')


_ENCODER = ('encoder', 'fusion')
_DECODER = ('latents', 'quantizer', 'feature_decoder', 'decoder')
# {method: the parts of the tokenizer that it reads}.
_PARTS = {
  'encode': _ENCODER,
  'encode_to_indices': (*_ENCODER, *_DECODER[:2]),
  'decode_from_indices': _DECODER,
  '__call__': (*_ENCODER, *_DECODER),
}


def _check_variables(tokenizer: Any, variables: Any, method: str) -> None:
  """Checks that every leaf that `method` reads is there, in its shape."""
  if not isinstance(tokenizer, Tokenizer) or not isinstance(variables, Mapping):
    raise UserError(
      'the arguments are (tokenizer, variables, array); got '
      f'({type(tokenizer).__name__}, {type(variables).__name__}, …)'
    )
  have = trees.flatten(variables)
  wanted = {
    name: leaf
    for name, leaf in variable_shapes(tokenizer).items()
    if name.split('/')[1] in _PARTS[method]
  }
  # SimVQ reads the baked table or computes it from the basis.
  tables = {n for n in wanted if n.endswith(('/codes', '/basis'))}
  tables = {n for n in tables if n.startswith('codebook/quantizer/')}
  # Gumbel's and a VQ's with gradients are baked too, from the parameter.
  trained = {n for n in tables if n.replace('codebook', 'params', 1) in have}
  for name in (tables if tables & have.keys() else trained) - have.keys():
    wanted.pop(name, None)
  found = {name: have[name] for name in wanted if name in have}
  trees.check_same(wanted, found, 'variables')


def _check_images(images: Any) -> None:
  if images.ndim != 4:
    raise UserError(
      f'images must be [b h w 3]; got shape {images.shape}; images[None] adds '
      'a batch axis, stack([images] * 3, -1) a channel axis to grey images'
    )
  if jnp.issubdtype(images.dtype, jnp.floating):
    image_ops.check_range(images, 'images')


def _check_indices(indices: Any, tokenizer: Tokenizer) -> None:
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise UserError(f'indices must be integers, got {indices.dtype}')
  axes = tokenizer.quantizer.index_axes
  if indices.ndim != 1 + len(axes):
    raise UserError(
      f'indices must have {1 + len(axes)} axes [b {" ".join(axes)}], got shape '
      f'{indices.shape}'
    )
  size, found = tokenizer.codebook_size, image_ops.value_range(indices)
  least = tokenizer.quantizer.lowest_index
  if size and found and not (found[0] >= least and found[1] < size):
    left_out = ', and -1 for one that is left out' if least else ''
    raise UserError(
      f'indices have values in [{found[0]}, {found[1]}]; this tokenizer has '
      f'codes 0 to {size - 1}{left_out} (codebook_size={size})'
    )


def _apply(tokenizer, variables, x, method, precision):
  choose({p: p for p in PRECISIONS}, precision, 'precision')
  _check_variables(tokenizer, variables, method)
  if not hasattr(x, 'ndim'):
    raise UserError(f'expected an array, got a {type(x).__name__}')
  for leaf in (x, *jax.tree.leaves(variables)):
    if AxisType.Explicit in (jax.typeof(leaf).sharding.mesh.axis_types or ()):
      raise UserError(
        'arrays lie on a mesh with Explicit axes; make it with '
        'jax.make_mesh(…, axis_types=(jax.sharding.AxisType.Auto,) * n)'
      )
  if method == 'decode_from_indices':
    _check_indices(x, tokenizer)
    x = jnp.asarray(x, jnp.int32)  # NumPy's own division rounds otherwise
  else:
    _check_images(x)
  context = contextlib.nullcontext()
  if precision == 'canonical':
    tokenizer = tokenizer.with_run_options(dtype='float32')
    context = jax.default_matmul_precision('highest')
  with context:
    return tokenizer.apply(variables, x, method=method)


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
    i32[b gh gw] in [0, K), K = `tokenizer.codebook_size`, the vocabulary size;
    the last axes are `tokenizer.index_shape(h, w)`: also [gh gw q] or [n].

  Raises:
    UserError: a wrong shape, size or type; concrete values that are NaN or
      outside [-.01, 1.01]; another tokenizer's variables; a continuous
      tokenizer.
  """
  return _apply(tokenizer, variables, images, 'encode_to_indices', precision)


def decode_from_indices(
  tokenizer: Tokenizer,
  variables: Tree,
  indices: Any,
  *,
  precision: str = 'default',
) -> Array:
  """Tokens to images: exactly what `reconstruct` decodes them to.

  Args:
    tokenizer: from `build_tokenizer` or `load_tokenizer`.
    variables: its variables; those of the quantizer and decoder suffice.
    indices: integers [b gh gw] in [0, K), K = `tokenizer.codebook_size`, in
      the shape that `encode_to_indices` returns. With a residual or a
      multi-scale quantizer, -1 skips a stage.
    precision: "default" or "canonical".

  Returns:
    f32[b h w 3], clipped to [0, 1].

  Raises:
    UserError: not integers, another shape, or concrete values outside [0, K).
  """
  images = _apply(
    tokenizer, variables, indices, 'decode_from_indices', precision
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
  return _apply(tokenizer, variables, images, 'encode', precision)


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
    losses: whether to also return {name: f32[]}, unweighted, of the losses
      that need no network of their own (l1, l2 and the quantizer's). Static
      under jit.
    precision: "default" or "canonical".

  Returns:
    A `TokenizerOutput`; its `images` f32[b h w 3] are not clipped.
  """
  out = _apply(tokenizer, variables, images, '__call__', precision)
  if not losses:
    return out
  targets = image_ops.to_unit(images)
  terms = _pixel_losses(out.images, targets)
  return out.replace(losses=terms | out.quantizer.losses)


@jax.jit  # traced: a decoder's output is not clipped, and that is no error
def _pixel_losses(recon: Array, targets: Array) -> dict[str, Array]:
  inputs = LossInputs(recon, targets)
  return {name: term(inputs) for name, term in loss_terms.IMAGE_TERMS.items()}


def codebook_usage(counts: Array) -> Array:
  """The share of codes used: counts i32[... k] -> f32[...] in [0, 1]."""
  return code_ops.usage(counts)
