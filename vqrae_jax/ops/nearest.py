"""The nearest code of each token.

Distances are compared as |c|^2 / 2 - z.c, without |z|^2, which does not change
the argmin and costs digits. Both sides are centred on the codebook's mean,
which cancels a direction they share, and scaled by one power of two, so that
squares stay in f32's range. By default an f32 dot is TF32 on a GPU and bf16
passes on a TPU, and either chooses other codes: products request the highest
precision or, on a GPU, six bf16 products of equal error. `shortlist` uses bf16
products only to choose which codes are compared in f32.

An array [tokens, K] holds one chunk of tokens only, and tokens are not copied.
Under an ambient mesh each device searches for its own tokens; the shards of a
codebook are passed around its devices and never gathered.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vqrae_jax.ops import codes as code_ops

# As on a TPU: six products of bf16 parts, with the error of f32 products; on a
# GPU faster for wide codes (`on_cuda`).
SIX_BF16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
GROUPS = 512  # of codes; `shortlist` keeps the best of each
LISTED = 8  # codes of a token that `shortlist` compares in f32
UNLISTED = 64  # tokens at once that `shortlist` searches again, in f32
SYMBOLIC = 1024  # tokens of a chunk at most, if their number is symbolic
ROUNDING = 2.0**-23


class Codes(NamedTuple):
  """Rows of a codebook, prepared for the comparison with tokens.

  Attributes:
    rows: f32[k c], scaled and centred.
    half_norms: f32[k], half their squares.
    numbers: i32[k], their indices.
  """

  rows: Array
  half_norms: Array
  numbers: Array


class Rounded(NamedTuple):
  """Codes for products in bf16.

  Attributes:
    rows: bf16[k c].
    half_norms, norms: f32[k], of the codes before they were rounded.
    lost: f32[k], the norms of their rounding errors.
  """

  rows: Array
  half_norms: Array
  norms: Array
  lost: Array


class Found(NamedTuple):
  """The best codes found so far for tokens [n]; a score is half the squared
  distance minus half the token's square.

  Attributes:
    score: f32[n], the best code's.
    index: i32[n], the best code's number.
    distance, second, second_distance: f32[n], or None: the distance to the best
      code, the score of the second best, and the distance to it.
  """

  score: Array
  index: Array
  distance: Array | None = None
  second: Array | None = None
  second_distance: Array | None = None


def nearest_code(
  z: Float[Array, '*s c'],
  codebook: Float[Array, 'k c'],
  *,
  distance: str = 'l2',
  return_margin: bool = False,
) -> Int[Array, '*s'] | tuple[Int[Array, '*s'], Float[Array, '*s']]:
  """The index of the code nearest to each token.

  In float64 its squared distance is within 2^-21 (|z| + |c|)^2 of the least, if
  nonzero values are normal numbers and differ by less than a factor of 1e32. Of
  equal rows the lowest index is chosen; a row that is not finite only if all
  are. No gradient passes.

  Args:
    z: f[... c] tokens, compared in f32.
    codebook: f[k c].
    distance: "l2", or "cosine": of z and codes scaled to norm one.
    return_margin: also return how much nearer it is than the second best.

  Returns:
    i32[...] in [0, k); with `return_margin` also f32[...] >= 0, the distance
    (not squared) to the second best code minus that to the best, infinite if
    there is one code.

  Raises:
    ValueError: another `distance`, or shapes that do not match.
  """
  if distance not in ('l2', 'cosine'):
    raise ValueError(f'distance={distance!r} must be "l2" or "cosine"')
  if (
    codebook.ndim != 2
    or codebook.shape[:1] == (0,)
    or (z.shape[-1:] != codebook.shape[1:])
  ):
    raise ValueError(
      f'tokens and codebook of shapes {z.shape}, {codebook.shape} must be '
      '[... c] and [k c], with at least one code'
    )
  z, codebook = (
    jax.lax.stop_gradient(x).astype(jnp.float32) for x in (z, codebook)
  )
  if distance == 'cosine':
    z, codebook = _directions(z), _directions(codebook)
  shape = z.shape[:-1]
  flat = z.reshape(math.prod(shape), z.shape[-1])
  found = _searched(flat, codebook, return_margin)
  index = found.index.reshape(shape)
  if not return_margin:
    return index
  margin = jnp.maximum(found.second_distance - found.distance, 0)
  return index, margin.reshape(shape)


def _directions(x: Array) -> Array:
  """Rows scaled to norm one, from any magnitude; zeros stay zeros."""
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
  # A power of two rounds nothing, and its inverse is a normal number too.
  exponent = jnp.clip(-jnp.frexp(largest)[1], -126, 126)
  x = x * jnp.ldexp(jnp.float32(1), exponent)
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.where(norm > 0, norm, 1)


def _searched(z: Array, codebook: Array, margins: bool) -> Found:
  """The search for tokens f32[n c], split over the ambient mesh."""
  mesh, axes = jax.sharding.get_abstract_mesh(), code_ops.batch_axes()
  n, shards = z.shape[0], math.prod(mesh.shape[a] for a in axes)
  if shards == 1 or not isinstance(n, int):
    return _round(z, codebook, margins, None)
  ring = code_ops.table_axis(len(codebook))
  z = jnp.pad(z, ((0, -n % shards), (0, 0)))
  found = jax.shard_map(
    lambda z, codebook: _round(z, codebook, margins, ring),
    in_specs=(PartitionSpec(axes), PartitionSpec(ring)),
    out_specs=PartitionSpec(axes),
    check_vma=False,
  )(z, codebook)
  return jax.tree.map(lambda x: x[:n], found)


def _round(z: Array, rows: Array, margins: bool, ring: str | None) -> Found:
  """The search for a device's own tokens among all codes, shard after shard.

  Args:
    z: f32[n c].
    rows: f32[r c].
    margins: also find the second best.
    ring: the mesh axis that shards the codes, or None: `rows` are all.
  """
  own, size = 0, 1
  if ring:
    own, size = jax.lax.axis_index(ring), jax.lax.axis_size(ring)
  # Scaled values have squares in f32's range, from the largest down to 1e-30 of
  # it. A power of two rounds nothing.
  largest = jnp.maximum(_largest(rows), _largest(z))
  if ring:
    largest = jax.lax.pmax(largest, ring)
  exponent = jnp.clip(50 - jnp.frexp(largest)[1], -100, 100)
  scale = jnp.ldexp(jnp.float32(1), exponent)
  rows = rows * scale
  center, shortest = rows.mean(0), jnp.linalg.norm(rows, axis=-1).min()
  if ring:
    center = jax.lax.pmean(center, ring)
    shortest = jax.lax.pmin(shortest, ring)
  # A mean dominated by long codes would cost short ones their digits.
  center = jnp.where(jnp.linalg.norm(center) <= 2 * shortest, center, 0)
  rows = rows - center
  half_norms = 0.5 * jnp.sum(rows * rows, axis=-1)
  finite = jnp.isfinite(half_norms)
  half_norms = jnp.where(finite, half_norms, jnp.inf)
  rows = jnp.where(finite[:, None], rows, 0)
  numbers = own * len(rows) + jnp.arange(len(rows), dtype=jnp.int32)
  codes = Codes(rows, half_norms, numbers)

  def search(codes):
    branches = {
      platform: functools.partial(_chunks, searcher, margins)
      for platform, searcher in SEARCHES.items()
    }
    return jax.lax.platform_dependent(z, scale, center, codes, **branches)

  if not ring:
    found = search(codes)
  else:
    nothing = jax.tree.map(
      lambda x: (
        jnp.full(x.shape, jnp.inf, x.dtype)
        if x.dtype == jnp.float32
        else jnp.zeros(x.shape, x.dtype)
      ),
      jax.eval_shape(search, codes),
    )

    def visit(_, state):
      codes, found = state
      # Sent while these rows are searched.
      following = jax.lax.ppermute(
        codes, ring, [(i, (i + 1) % size) for i in range(size)]
      )
      return following, _better(found, search(codes))

    _, found = jax.lax.fori_loop(0, size, visit, (codes, nothing))
  if not margins:
    return found
  return found._replace(
    distance=found.distance / scale,
    second_distance=found.second_distance / scale,
  )


def _largest(x: Array) -> Array:
  """f32[]: the largest absolute value of rows that are finite."""
  # Two reductions of x itself: no array of its size is made.
  rows = jnp.maximum(x.max(-1, initial=0), -x.min(-1, initial=0))
  return jnp.max(rows, initial=0, where=jnp.isfinite(rows))


def _better(a: Found, b: Found) -> Found:
  """The best of the results for two sets of codes, token by token."""
  first = (b.score < a.score) | ((b.score == a.score) & (b.index < a.index))

  def either(first, x, y):
    return None if x is None else jnp.where(first, y, x)

  best = Found(*(either(first, x, y) for x, y in zip(a, b, strict=True)))
  if a.second is None:
    return best
  # The second best is the other set's best, or the same set's second.
  other = Found(*(either(first, y, x) for x, y in zip(a, b, strict=True)))
  behind = other.score < best.second
  return best._replace(
    second=jnp.where(behind, other.score, best.second),
    second_distance=jnp.where(behind, other.distance, best.second_distance),
  )


def _chunks(searcher, margins, z, scale, center, codes) -> Found:
  """Searches unscaled tokens f32[n c], a chunk at a time."""
  n = z.shape[0]
  search = searcher(codes, margins)
  chunk = max(code_ops.SCORES_PER_CHUNK // len(codes.rows), 1)
  if isinstance(n, int) and n <= chunk:
    return search(z * scale - center)
  if not isinstance(n, int):  # few tokens take as long as a full chunk
    chunk = min(chunk, SYMBOLIC)
  m = -(-n // chunk)
  if isinstance(n, int):
    chunk = -(-n // m)  # equal parts
  # Gathered by row: padding would copy all tokens. The last chunk repeats the
  # last token.
  offsets = jnp.arange(chunk)

  def part(i):
    tokens = jnp.take(z, i * chunk + offsets, axis=0, mode='clip')
    return search(tokens * scale - center)

  found = jax.lax.map(part, jnp.arange(m))
  return jax.tree.map(lambda x: x.reshape(m * chunk)[:n], found)


def direct(
  codes: Codes,
  *,
  precision: jax.lax.PrecisionLike = 'highest',
  margins: bool = False,
) -> Callable[[Array], Found]:
  """A search for tokens f32[n c] that computes every score in f32."""

  def least(scores):
    at = jnp.argmin(scores, axis=-1)
    return at, jnp.take_along_axis(scores, at[:, None], 1)[:, 0]

  def search(tokens):
    dots = jnp.einsum('nc,kc->nk', tokens, codes.rows, precision=precision)
    scores = codes.half_norms - dots
    best, score = least(scores)
    found = Found(score, codes.numbers[best])
    if not margins:
      return found

    def length(at):  # of the difference: a score has lost digits
      return jnp.linalg.norm(tokens - codes.rows[at], axis=-1)

    others = jnp.arange(len(codes.rows)) != best[:, None]
    second, score = least(jnp.where(others, scores, jnp.inf))
    return found._replace(
      distance=length(best),
      second=score,
      second_distance=jnp.where(score < jnp.inf, length(second), jnp.inf),
    )

  return search


def grouped(
  z: Array, a: Array, b: Array, codes: Rounded
) -> tuple[Array, Array, Array]:
  """Scores of rounded tokens by group; code k is in group k mod `GROUPS`.

  Args:
    z: bf16[n c].
    a, b: f32[n]; a token's score is off by at most a |code| + b lost.
    codes: a multiple of `GROUPS`, or fewer.

  Returns:
    (f32[n g], i32[n g], f32[n]): a lower bound of the scores of each group, the
    code that has it, and an upper bound of the least score of all, infinite if
    the second code of a group may be below it.
  """
  dots = jnp.einsum(
    'nc,kc->nk', z, codes.rows, preferred_element_type=jnp.float32
  )
  off = a[:, None] * codes.norms + b[:, None] * codes.lost
  scores = codes.half_norms - dots
  shape = len(z), -1, min(GROUPS, len(codes.rows))

  def nearer(x, y):
    (low, at, second, high), (low2, at2, second2, high2) = x, y
    second = jnp.minimum(second, jnp.minimum(second2, jnp.maximum(low, low2)))
    first = (low < low2) | ((low == low2) & (at < at2))
    return (
      jnp.minimum(low, low2),
      jnp.where(first, at, at2),
      second,
      jnp.minimum(high, high2),
    )

  at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  infinite = jnp.full_like(scores, jnp.inf)
  # One reduction: with several, inputs would be read several times.
  least, at, second, high = jax.lax.reduce(
    [x.reshape(shape) for x in (scores - off, at, infinite, scores + off)],
    [jnp.float32(jnp.inf), jnp.int32(2**31 - 1), *[jnp.float32(jnp.inf)] * 2],
    nearer,
    (1,),
  )
  high = high.min(-1)
  return least, at, jnp.where(second.min(-1) <= high, jnp.inf, high)


def _rounded(x: Array) -> Array:
  """x rounded to bf16, as f32. A GPU's compiler removes casts that cancel."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def shortlist(
  codes: Codes,
  *,
  precision: jax.lax.PrecisionLike = 'highest',
  groups: Callable = grouped,
) -> Callable[[Array], Found]:
  """A search for tokens f32[n c] by scores in bf16; codes that may be nearest
  are compared again, in f32.

  The error of a score of rounded tokens and codes is bounded by the measured
  rounding errors of both and the error of f32 sums. If the groups with scores
  within that bound of the least are more than `LISTED`, `direct` searches for
  the token. No search uses this yet (`SEARCHES`).

  Args:
    codes: more than `LISTED`.
    precision: of `direct`.
    groups: a function that computes the scores: `grouped`, or a kernel.
  """
  norm = functools.partial(jnp.linalg.norm, axis=-1)
  missing = -len(codes.rows) % min(GROUPS, len(codes.rows))
  exact = jnp.pad(codes.rows, ((0, missing), (0, 0)))
  kept = _rounded(exact)
  rounded = Rounded(
    kept.astype(jnp.bfloat16),
    jnp.pad(codes.half_norms, (0, missing), constant_values=jnp.inf),
    norm(exact),
    norm(exact - kept),
  )
  again = direct(codes, precision=precision)
  sums = exact.shape[-1] * ROUNDING  # what sums in f32 lose, at most

  def search(tokens):
    kept = _rounded(tokens)
    a = norm(tokens - kept) + sums * norm(tokens)
    z = kept.astype(jnp.bfloat16)
    least, at, upper = groups(z, a, norm(kept), rounded)
    values, places = jax.lax.top_k(-least, LISTED + 1)
    known = -values[:, -1] > upper
    listed = jnp.take_along_axis(at, places[:, :LISTED], 1)
    dots = jnp.sum(codes.rows[listed] * tokens[:, None], axis=-1)
    scores = codes.half_norms[listed] - dots
    score = scores.min(-1)
    ties = jnp.where(scores == score[:, None], codes.numbers[listed], 2**31 - 1)

    def more(state):
      known, found = state
      (which,) = jnp.nonzero(~known, size=UNLISTED, fill_value=len(tokens))
      some = again(tokens.at[which].get(mode='clip'))
      found = jax.tree.map(
        lambda x, y: x.at[which].set(y, mode='drop'), found, some
      )
      return known.at[which].set(True, mode='drop'), found

    state = known, Found(score, ties.min(-1))
    return jax.lax.while_loop(lambda s: ~s[0].all(), more, state)[1]

  return search


def on_cuda(codes: Codes, margins: bool) -> Callable:
  """`direct`, by six bf16 products for wide codes: on an H200 1.3 to 1.8 times
  as fast; narrow ones would take up to four times as long
  (docs/quantizers.md)."""
  wide = codes.rows.shape[1] >= 512
  precision = SIX_BF16 if wide else 'highest'
  return direct(codes, precision=precision, margins=margins)


# The search of each platform. `shortlist` with the kernels of `nearest_kernels`
# was faster on a GPU (docs/quantizers.md) but is not used: when it was timed,
# the compiler had removed the casts that its bound was measured from, and the
# corrected version, which it compiles as written, has not run on a device.
SEARCHES = dict(
  cuda=on_cuda, default=lambda codes, margins: direct(codes, margins=margins)
)
