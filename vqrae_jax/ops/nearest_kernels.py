"""Pallas kernels for `ops/nearest.py`: they compute the scores of all rounded
tokens and codes, and write none to memory.

Each returns what `nearest.grouped` returns: codes are in groups, and a token
keeps the least score of each group, and whether the second of a group might be
the least of all. No search uses them yet (`nearest.SEARCHES`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array

TOKENS = 256  # of a grid step on TPU
CODES = 512  # of a grid step on TPU; code k is in group k mod CODES


def _padded(x: Array, rows: int, fill: float = 0.0) -> Array:
  """x with its first axis a multiple of `rows`."""
  missing = [(0, -len(x) % rows)] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, missing, constant_values=fill)


def _inputs(z, a, b, codes, tokens, codes_a_step):
  """(z, a, b, rows, half norms, norms, lost), padded to full grid steps; padded
  codes are infinitely far."""
  columns = (_padded(x[:, None], tokens) for x in (a, b))
  fills = ((codes.half_norms, jnp.inf), (codes.norms, 0.0), (codes.lost, 0.0))
  lines = (_padded(x, codes_a_step, fill)[None] for x, fill in fills)
  return _padded(z, tokens), *columns, _padded(codes.rows, codes_a_step), *lines


def _blocks(tokens: int, codes: int, width: int) -> list[pl.BlockSpec]:
  """Block specs of `_inputs`, for a grid of blocks of tokens and of codes."""
  column = pl.BlockSpec((tokens, 1), lambda i, j: (i, 0))
  line = pl.BlockSpec((1, codes), lambda i, j: (0, j))
  z = pl.BlockSpec((tokens, width), lambda i, j: (i, 0))
  rows = pl.BlockSpec((codes, width), lambda i, j: (j, 0))
  return [z, column, column, rows, line, line, line]


def _tpu_step(z, a, b, rows, half, norms, lost, least, at, upper, second, most):
  """One block of tokens and one of codes; outputs are per block of tokens."""
  step, steps = pl.program_id(1), pl.num_programs(1)

  @pl.when(step == 0)
  def _():
    for ref in (least, second, most):
      ref[...] = jnp.full(ref.shape, jnp.inf, ref.dtype)
    at[...] = jnp.zeros(at.shape, at.dtype)

  dots = jax.lax.dot_general(
    z[...], rows[...], (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  off = a[...] * norms[...] + b[...] * lost[...]
  scores = half[...] - dots
  low = scores - off
  nearer = low < least[...]
  second[...] = jnp.minimum(second[...], jnp.where(nearer, least[...], low))
  number = step * low.shape[1] + jax.lax.broadcasted_iota(
    jnp.int32, low.shape, 1
  )
  at[...] = jnp.where(nearer, number, at[...])
  least[...] = jnp.where(nearer, low, least[...])
  most[...] = jnp.minimum(most[...], scores + off)

  @pl.when(step == steps - 1)
  def _():
    highest = jnp.min(most[...], axis=1, keepdims=True)
    hidden = jnp.min(second[...], axis=1, keepdims=True) <= highest
    highest = jnp.where(hidden, jnp.inf, highest)
    upper[...] = jnp.broadcast_to(highest, upper.shape)


def tpu_groups(
  z: Array,
  a: Array,
  b: Array,
  codes: Any,
  *,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """`nearest.grouped` on TPU, with CODES groups."""
  n, c = z.shape
  given = _inputs(z, a, b, codes, TOKENS, CODES)
  total, k = given[0].shape[0], given[3].shape[0]
  groups = pl.BlockSpec((TOKENS, CODES), lambda i, j: (i, 0))
  least, at, upper = pl.pallas_call(
    _tpu_step,
    grid=(total // TOKENS, k // CODES),
    in_specs=_blocks(TOKENS, CODES, c),
    out_specs=[
      groups,
      groups,
      pl.BlockSpec((TOKENS, 128), lambda i, j: (i, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((total, CODES), jnp.float32),
      jax.ShapeDtypeStruct((total, CODES), jnp.int32),
      jax.ShapeDtypeStruct((total, 128), jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((TOKENS, CODES), jnp.float32)] * 2,
    interpret=interpret,
  )(*given)
  return least[:n], at[:n], upper[:n, 0]


GPU_TOKENS, GPU_CODES, GPU_GROUP, GPU_DEPTH = 128, 128, 32, 64


def _gpu_step(z, a, b, rows, half, norms, lost, least, at, upper, second):
  """One block of tokens and one of codes, in groups of GPU_GROUP neighbours."""

  def add(i, dots):
    part = pl.ds(i * GPU_DEPTH, GPU_DEPTH)
    return dots + jnp.dot(
      z[:, part], rows[:, part].T, preferred_element_type=jnp.float32
    )

  shape = GPU_TOKENS, GPU_CODES
  dots = jax.lax.fori_loop(
    0, z.shape[1] // GPU_DEPTH, add, jnp.zeros(shape, jnp.float32)
  )
  off = a[...] * norms[...] + b[...] * lost[...]
  scores = half[...] - dots
  groups = (scores - off).reshape(GPU_TOKENS, GPU_CODES // GPU_GROUP, GPU_GROUP)
  best = jnp.min(groups, axis=2)
  place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, 2)
  first = jnp.min(
    jnp.where(groups == best[:, :, None], place, GPU_GROUP), axis=2
  )
  others = jnp.where(place == first[:, :, None], jnp.inf, groups)
  start = pl.program_id(1) * GPU_CODES
  group = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
  least[...] = best
  at[...] = start + group * GPU_GROUP + first
  upper[...] = jnp.min(scores + off, axis=1, keepdims=True)
  second[...] = jnp.min(jnp.min(others, axis=2), axis=1, keepdims=True)


def gpu_groups(
  z: Array,
  a: Array,
  b: Array,
  codes: Any,
  *,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """`nearest.grouped` on GPU, with groups of GPU_GROUP neighbouring codes."""
  n, c = z.shape
  z, a, b, rows, *lines = _inputs(z, a, b, codes, GPU_TOKENS, GPU_CODES)
  z, rows = (jnp.pad(x, ((0, 0), (0, -c % GPU_DEPTH))) for x in (z, rows))
  total, k, width = len(z), len(rows), z.shape[1]
  grid = total // GPU_TOKENS, k // GPU_CODES
  parts = GPU_CODES // GPU_GROUP
  groups = pl.BlockSpec((GPU_TOKENS, parts), lambda i, j: (i, j))
  one = pl.BlockSpec((GPU_TOKENS, 1), lambda i, j: (i, j))
  least, at, upper, second = pl.pallas_call(
    _gpu_step,
    grid=grid,
    in_specs=_blocks(GPU_TOKENS, GPU_CODES, width),
    out_specs=[groups, groups, one, one],
    out_shape=[
      jax.ShapeDtypeStruct((total, k // GPU_GROUP), jnp.float32),
      jax.ShapeDtypeStruct((total, k // GPU_GROUP), jnp.int32),
      jax.ShapeDtypeStruct((total, k // GPU_CODES), jnp.float32),
      jax.ShapeDtypeStruct((total, k // GPU_CODES), jnp.float32),
    ],
    interpret=interpret,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
  )(z, a, b, rows, *lines)
  upper = upper[:n].min(1)
  hidden = second[:n].min(1) <= upper
  return least[:n], at[:n], jnp.where(hidden, jnp.inf, upper)
