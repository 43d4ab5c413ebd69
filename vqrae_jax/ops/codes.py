"""Codes and indices: lookup, gradients, entropies, digits, usage.

All arithmetic is f32 and every product requests the highest precision: by
default an f32 dot is TF32 on GPU and bf16 passes on TPU, and either chooses
different codes. An array [tokens, K] holds one chunk of tokens only.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

BATCH_AXES = ('data', 'fsdp')  # mesh axes that shard a batch of tokens
SCORES_PER_CHUNK = 2**24  # f32 scores at once on a device: 64 MiB


def straight_through(
  surrogate: Float[Array, '*s'], codes: Float[Array, '*s']
) -> Float[Array, '*s']:
  """Exactly the values of `codes`, with the gradient of `surrogate`.

  `z + sg(q - z)` rounds (in bf16, 21 % of values differ); here the added term
  is exactly zero.
  """
  sg = jax.lax.stop_gradient
  return sg(codes) + (surrogate - sg(surrogate))


def unit_rms(x: Float[Array, '*s c']) -> Float[Array, '*s c']:
  """x scaled to mean square 1 over channels; zeros stay zeros."""
  rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
  # A program with a gradient would multiply by the root's inverse instead, and
  # round otherwise than one without.
  return x / jax.lax.optimization_barrier(rms)


def unit(x: Float[Array, '*s c']) -> Float[Array, '*s c']:
  """x scaled to norm 1 over channels; zeros stay zeros."""
  return unit_rms(x) * x.shape[-1] ** -0.5


def rotate(
  z: Float[Array, '*s c'], codes: Float[Array, '*s c']
) -> Float[Array, '*s c']:
  """z times the scaled rotation that takes it to its code (arXiv 2410.06424).

  The rotation is in the plane of the two. It and the scale |code| / |z| are
  treated as constants: the gradient to z is rotated back and scaled, and the
  codes get none.
  """
  sg = jax.lax.stop_gradient

  def dot(a, b):
    return jnp.sum(a * b, axis=-1, keepdims=True)

  u, v = unit(sg(z)), unit(sg(codes))
  middle = unit(u + v)
  scale = jnp.sqrt(dot(sg(codes), sg(codes)) / (dot(sg(z), sg(z)) + 1e-12))
  return scale * (z - 2 * dot(z, middle) * middle + 2 * dot(z, u) * v)


def lookup(
  codes: Float[Array, 'k c'], indices: Int[Array, '*s']
) -> Float[Array, '*s c']:
  """codes[indices], [... c] of the codes' dtype; -1 is the last code.

  Under an ambient mesh each device looks up its own share of the tokens in the
  gathered table, and the gradient is a reduce-scatter of the table's rows.
  """
  flat = indices.reshape(math.prod(indices.shape))
  rows = functools.partial(_rows, len(codes))
  if (split := _split(flat.shape[0], len(codes))) is not None:
    axes, axis = split

    def local(flat, codes):
      if axis:
        codes = jax.lax.all_gather(codes, axis, tiled=True)
      return _rows(codes.shape[0], flat, codes)

    rows = jax.shard_map(
      local,
      in_specs=(PartitionSpec(axes), PartitionSpec(axis)),
      out_specs=PartitionSpec(axes),
      check_vma=False,
    )
  found = rows(flat, codes)
  return found.reshape(*indices.shape, codes.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(size: int, indices: Array, codes: Array) -> Array:
  return codes[indices]


def _rows_gradient(size, indices, dy):
  counted = jnp.where(indices < 0, indices + size, indices)  # -1 is the last
  return None, sum_by_code(dy, counted, size).astype(dy.dtype)


_rows.defvjp(
  lambda size, indices, codes: (codes[indices], indices), _rows_gradient
)


def auto_axes() -> set[str]:
  """The ambient mesh's axes, without those of a caller's own shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
  return {name for name, kind in kinds if kind == AxisType.Auto}


def batch_axes() -> tuple[str, ...]:
  """The ambient mesh's axes that shard tokens, those of one device excepted."""
  shape, auto = jax.sharding.get_abstract_mesh().shape, auto_axes()
  return tuple(a for a in BATCH_AXES if a in auto and shape[a] > 1)


def table_axis(rows: int) -> str | None:
  """The axis of `batch_axes` that shards a table of `rows`, if any does."""
  size = jax.sharding.get_abstract_mesh().shape.get('fsdp')
  return 'fsdp' if 'fsdp' in batch_axes() and rows % size == 0 else None


def _split(n: Any, rows: int) -> tuple[tuple[str, ...], str | None] | None:
  """(`batch_axes`, `table_axis`) for n tokens and a table; None where no axis
  shards the tokens."""
  mesh, axes = jax.sharding.get_abstract_mesh(), batch_axes()
  shards = math.prod(mesh.shape[a] for a in axes)
  if shards == 1 or not isinstance(n, int) or n % shards:
    return None
  return axes, table_axis(rows)


def by_chunk(fn: Callable, size: int, *tokens: Array) -> Any:
  """Applies fn(arrays [n …], counted bool[n]) to chunks and stacks its results.

  A chunk has at most `SCORES_PER_CHUNK` scores a device at `size` scores a
  token (one token at least); the gradient recomputes it. Chunk i of m holds
  tokens i, i + m, …, so that each device keeps its own. The last are padded
  with tokens that are not `counted`.

  Args:
    fn: of a chunk of each of `tokens`, and of `counted`.
    size: scores of one token.
    *tokens: [n …] each.

  Returns:
    fn's results with a first axis of chunks; `in_order` undoes it for those
    that have an entry per token.
  """
  n, shape = tokens[0].shape[0], jax.sharding.get_abstract_mesh().shape
  shards = math.prod(shape[a] for a in batch_axes())
  most = max(SCORES_PER_CHUNK // size, 1) * shards
  m = -(-n // most)
  if isinstance(n, int):
    m = max(m, 1)
    most = -(-n // (m * shards)) * shards  # equal parts
  total = m * most

  def split(x):
    x = jnp.pad(x, [(0, total - n)] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(x.reshape(most, m, *x.shape[1:]), 1, 0)

  parts = *map(split, tokens), split(jnp.ones(n, bool))
  return jax.lax.map(jax.checkpoint(lambda part: fn(*part)), parts)


def in_order(stacked: Array, n: Any) -> Array:
  """[chunks, tokens of one, …] of `by_chunk` -> [n …]; n may be symbolic."""
  flat = jnp.moveaxis(stacked, 0, 1)
  return flat.reshape(-1, *stacked.shape[2:])[:n]


def entropies(
  scores: Callable[[Array], Array], size: int, tokens: Float[Array, 'n c']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(mean of the tokens' entropies, entropy of the tokens' mean) of
  softmax(scores), in nats.

  Args:
    scores: f32[m c] -> f32[m k], row by row.
    size: k.
    tokens: f32[n c].
  """

  def sums(tokens, counted):
    log_p = jax.nn.log_softmax(scores(tokens))
    p = jnp.exp(log_p)
    own = -jnp.sum(p * log_p, axis=-1)
    own = jnp.where(counted, own, 0)
    return jnp.sum(own), jnp.sum(jnp.where(counted[:, None], p, 0), axis=0)

  own, p = by_chunk(sums, size, tokens)
  n = tokens.shape[0]
  mean = p.sum(0) / n
  # Where p underflows in f32, the slope is that at 1e-20.
  spread = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)))
  return own.sum() / n, spread


def code_entropies(
  z: Float[Array, '*s c'], codes: Float[Array, 'k c'], temperature: float
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """`entropies` of tokens' softmax(-distance^2 / temperature) over codes."""
  # Centring keeps the distances and makes the scores smaller, so more exact.
  center = jax.lax.stop_gradient(codes.mean(0))
  codes = codes - center
  squares = jnp.sum(codes * codes, axis=-1)

  def scores(tokens):
    dots = jnp.einsum('nc,kc->nk', tokens - center, codes, precision='highest')
    return (2 * dots - squares) / temperature

  flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
  return entropies(scores, codes.shape[0], flat)


def orthogonality(codes: Float[Array, 'k c']) -> Float[Array, '']:
  """|C C^T|^2 / k^2 - 1/k of unit rows C: 0 where all are orthogonal
  (arXiv 2112.00384, eq. 2)."""
  rows, k = unit(codes), codes.shape[0]
  # Of the same norm as C C^T, and c x c instead of k x k.
  gram = jnp.einsum('kc,kd->cd', rows, rows, precision='highest')
  return jnp.sum(gram * gram) / k**2 - 1 / k


def radix_strides(levels: Sequence[int], last_is_least: bool) -> np.ndarray:
  """i32[len(levels)]: what one step of each digit adds to the index.

  The least significant digit is the last one or else the first.
  """
  order = levels[::-1] if last_is_least else levels
  values = np.cumprod([1, *order[:-1]]).astype(np.int32)
  return values[::-1] if last_is_least else values


def digits_to_index(
  digits: Int[Array, '*s c'], strides: np.ndarray
) -> Int[Array, '*s']:
  """Mixed-radix digits i32[... c] to i32[...]."""
  return jnp.sum(digits * strides, axis=-1, dtype=jnp.int32)


def index_to_digits(
  indices: Int[Array, '*s'], strides: np.ndarray, levels: Sequence[int]
) -> Int[Array, '*s c']:
  """The inverse of `digits_to_index`."""
  radix = np.asarray(levels, np.int32)
  return (indices[..., None] // strides) % radix


def count_codes(indices: Int[Array, '*s'], size: int) -> Int[Array, ' k']:
  """How often each of `size` codes occurs; other indices are dropped."""
  flat = indices.reshape(math.prod(indices.shape))
  flat = jnp.where(flat < 0, size, flat)
  return jnp.zeros(size, jnp.int32).at[flat].add(1, mode='drop')


def sum_by_code(
  z: Float[Array, '*s c'], indices: Int[Array, '*s'], size: int
) -> Float[Array, 'k c']:
  """f32[k c]: the sum of each code's tokens; other indices are dropped.

  Under an ambient mesh each device sums its own tokens.
  """
  flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1]).astype(jnp.float32)
  index = indices.reshape(math.prod(indices.shape))
  if not flat.size:
    return jnp.zeros((size, z.shape[-1]))
  split = _split(flat.shape[0], size)
  if split is None:
    return _sums(flat, index, size)
  axes, rows = split

  def local(flat, index):
    sums = _sums(flat, index, size)
    if rows:
      sums = jax.lax.psum_scatter(sums, rows, tiled=True)
    return jax.lax.psum(sums, [a for a in axes if a != rows])

  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(axes), PartitionSpec(axes)),
    out_specs=PartitionSpec(rows),
    check_vma=False,
  )(flat, index)


def _sums(flat: Array, index: Array, size: int) -> Array:
  """f32[k c] of tokens f32[n c] and their codes i32[n], on one device."""

  def sorted_sums(flat, index):
    """Sorts tokens by code; each then adds the sums of the one, two, four …
    after it of the same code, so that a code's first token has the total.

    For GPUs, where XLA adds by atomics: in no fixed order, and slowly in a
    train step (H200, 12,544 tokens of 1536 channels: 61 of its 273 ms; alone .2
    ms, and this 1.6 ms).
    """
    order = jnp.argsort(index)
    flat, index = flat[order], index[order]
    at, n = jnp.arange(len(flat)), len(flat)

    def take_up(doubled, flat):
      after = at + (1 << doubled)
      same = index.at[after].get(mode='fill', fill_value=-1) == index
      more = flat.at[after].get(mode='fill', fill_value=0)
      return flat + jnp.where(same[:, None], more, 0)

    flat = jax.lax.fori_loop(0, (n - 1).bit_length(), take_up, flat)
    first = jnp.searchsorted(index, jnp.arange(size))
    occurs = index.at[first].get(mode='fill', fill_value=-1) == jnp.arange(size)
    sums = flat.at[first].get(mode='fill', fill_value=0)
    return jnp.where(occurs[:, None], sums, 0)

  return jax.lax.platform_dependent(
    flat,
    index,
    cuda=sorted_sums,
    default=functools.partial(jax.ops.segment_sum, num_segments=size),
  )


def usage(counts: Int[Array, '*q k']) -> Float[Array, ' *q']:
  """The share of codes that occur, in [0, 1], over the last axis."""
  return jnp.mean(counts > 0, axis=-1, dtype=jnp.float32)


def perplexity(counts: Int[Array, '*q k']) -> Float[Array, ' *q']:
  """exp of the entropy of the code histogram, in [1, k]; 1 if it is empty."""
  counts = counts.astype(jnp.float32)
  total = jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
  p = counts / total
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0.0), axis=-1)
  return jnp.exp(entropy)
