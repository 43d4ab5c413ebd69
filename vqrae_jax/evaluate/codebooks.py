"""How a tokenizer's codes are used: codebook metrics over a set of images.

A token's margin is the distance to its second-best code minus the distance to
its own: how far it is from a different index. Margins are in units of the mean
distance of tokens to their codes. All metrics describe what the quantizer
compares: projected tokens and codes, scaled if it scales them.

Searches run in chunks: no array is [tokens, K] or [K, K]. The host keeps the
index, norm, distance and margin of every token, and `SAMPLE` tokens in full.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vqrae_jax import sharding
from vqrae_jax.data import sources
from vqrae_jax.evaluate import metrics
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.types import Tree

SAMPLE = 2000  # tokens of a stage that are kept, for a map of them
PICKED = 256  # tokens of a batch that may be among them
ALONE = 4  # images of a batch that are tokenized alone too
# Edges of the histogram of margins, in mean distances.
EDGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)
# Codes nearer to each other than this share of the mean distance from tokens to
# their codes.
NEAR = 0.1


@jax.jit
def to_earlier(table: Array) -> Array:
  """f32[k]: each code's distance to the nearest of lower index; infinite for
  the first, and where either is not finite."""
  k = table.shape[0]
  finite = jnp.isfinite(table).all(-1)
  table = jnp.where(finite[:, None], table, 0)
  table = table - table.sum(0) / jnp.maximum(finite.sum(), 1)
  half_norms = 0.5 * jnp.sum(table * table, axis=-1)

  def chunk(rows, number, counted):
    dots = jnp.einsum('nc,kc->nk', rows, table, precision='highest')
    others = finite & (jnp.arange(k) < number[:, None])
    nearest = jnp.argmin(jnp.where(others, half_norms - dots, jnp.inf), -1)
    found = jnp.linalg.norm(rows - table[nearest], axis=-1)
    known = jnp.take_along_axis(others, nearest[:, None], 1)[:, 0]
    return jnp.where(known & finite[number], found, jnp.inf)

  found = code_ops.by_chunk(chunk, k, table, jnp.arange(k))
  return code_ops.in_order(found, k)


@functools.partial(jax.jit, static_argnums=0)
def _measured(tokenizer, variables, images, picks) -> list[dict[str, Array]]:
  """Each search's figures [b, its tokens of an image]; "sample" f32[picks c]
  of tokens, drawn by picks f32[m] in [0, 1) times those that count."""
  found = []
  for search in tokenizer.apply(variables, images, method='search_codes'):
    indices = search.indices.reshape(len(images), -1)
    tokens = search.tokens.reshape(indices.size, -1)
    out = dict(
      indices=indices,
      norms=jnp.linalg.norm(tokens, axis=-1).reshape(indices.shape),
      sample=tokens[(picks * indices.shape[1]).astype(jnp.int32)],
    )
    if search.table is not None:
      own = search.table[indices.reshape(-1)]
      best = jnp.linalg.norm(tokens - own, axis=-1)
      _, margin = nearest_code(tokens, search.table, return_margin=True)
      out |= {
        name: x.reshape(indices.shape)
        for name, x in dict(best=best, margin=margin).items()
      }
    found.append(out)
  return found


@functools.partial(jax.jit, static_argnums=0)
def _indices(tokenizer, variables, images) -> list[Array]:
  """i32[b, its tokens of an image] of each search."""
  found = tokenizer.apply(variables, images, method='search_codes')
  return [x.indices.reshape(len(images), -1) for x in found]


@functools.partial(jax.jit, static_argnums=0)
def _tables(tokenizer, variables, images) -> list[Array | None]:
  found = tokenizer.apply(variables, images, method='search_codes')
  return [x.table for x in found]


@dataclasses.dataclass
class Stage:
  """The tokens that one search, or all of one table, gave an index.

  Attributes:
    name: of the search; "" if a token has one code.
    table: f32[k c], or None.
    rows: {name: f32[n] or i32[n]}: "indices", "norms", and with a table "best"
      and "margin".
    sample: f32[at most SAMPLE, c] of the tokens, uniformly.
    moved: {what changed: [tokens whose index moved, tokens]}.
  """

  name: str
  table: np.ndarray | None
  rows: dict[str, list[np.ndarray]]
  sample: np.ndarray
  moved: dict[str, np.ndarray]

  def column(self, name: str) -> np.ndarray | None:
    """One of `rows`, for all tokens."""
    parts = self.rows.get(name)
    return None if parts is None else np.concatenate(parts)


def merged(stages: list[Stage]) -> Stage:
  """Stages that share a table, merged into one."""
  first = stages[0]
  # Of each by the number of its tokens; a sample's first are a sample too.
  counts = [len(s.column('indices')) for s in stages]
  have = [len(s.sample) / n for s, n in zip(stages, counts, strict=True)]
  share = min(SAMPLE / sum(counts), *have)
  sample = np.concatenate([
    s.sample[: round(n * share)] for s, n in zip(stages, counts, strict=True)
  ])  # fmt: skip
  rows = {n: [x for s in stages for x in s.rows[n]] for n in first.rows}
  moved = {n: sum(s.moved[n] for s in stages) for n in first.moved}
  return Stage('all', first.table, rows, sample, moved)


def gather(
  tokenizer: Tokenizer,
  variables: Tree,
  batches: Iterable[tuple[np.ndarray, list[int]]],
  devices: Sequence[Any],
  progress: Callable[[int], Any] = lambda n: None,
) -> list[Stage]:
  """Runs a tokenizer over images; returns a `Stage` for each search.

  Indices are computed in f32 with the highest precision ("canonical"). They are
  compared with the indices in bf16, of single images (`ALONE` of a batch), and
  of batches sharded over all of `devices`, if there are several.

  Args:
    tokenizer, variables: what is examined.
    batches: those of `pipeline.eval_batches`.
    devices: of this host; the rows of a batch are a multiple of their number.
    progress: called with the images of each batch.
  """
  rng = np.random.default_rng(0)
  kinds = {
    dtype: tokenizer.with_run_options(dtype=dtype)
    for dtype in ('float32', 'bfloat16')
  }
  stages, keys = [], []
  mesh = sharding.make_mesh('dp', devices) if len(devices) > 1 else None
  if mesh is not None:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    copies = jax.device_put(variables, everywhere)

  for images, owners in batches:
    count = len(owners)
    picks = (rng.random(min(PICKED, 16 * count)) * count).astype(np.float32)
    with jax.default_matmul_precision('highest'):
      found = _measured(kinds['float32'], variables, images, picks)
      if not stages:
        tables = _tables(kinds['float32'], variables, images)
        names = [name for name, _ in tokenizer.quantizer.search_names]
        for name, table in zip(names, tables, strict=True):
          table = None if table is None else np.asarray(table)
          stages.append(Stage(name, table, {}, np.zeros(()), {}))
        keys = [np.zeros(0)] * len(stages)
    found = jax.device_get(found)
    own = [f['indices'] for f in found]
    for i, (stage, out) in enumerate(zip(stages, found, strict=True)):
      sample, fresh = out.pop('sample'), rng.random(len(picks))
      if len(keys[i]):
        sample = np.concatenate([stage.sample, sample])
        fresh = np.concatenate([keys[i], fresh])
      kept = np.argsort(fresh)[:SAMPLE]  # the least of random keys: uniform
      stage.sample, keys[i] = sample[kept], fresh[kept]
      for name, x in out.items():
        stage.rows.setdefault(name, []).append(x[:count].reshape(-1))

    def note(what, of, reference):
      for stage, a, b in zip(stages, of, reference, strict=True):
        row = np.array([(np.asarray(a) != b).sum(), b.size])
        stage.moved[what] = stage.moved.get(what, 0) + row

    some = sources.spread(count, ALONE)
    for dtype, module in kinds.items():
      exact = dtype == 'float32'
      with jax.default_matmul_precision('highest' if exact else None):
        if not exact:
          whole = jax.device_get(_indices(module, variables, images))
          note(dtype, [x[:count] for x in whole], [x[:count] for x in own])
        else:
          whole = own
        for i in some if len(images) > 1 else ():
          alone = _indices(module, variables, images[i : i + 1])
          note(f'batch size, {dtype}', alone, [x[i : i + 1] for x in whole])
        if mesh is not None:
          with jax.set_mesh(mesh):
            placed = jax.device_put(images, sharding.batch_sharding(mesh))
            spread = jax.device_get(_indices(module, copies, placed))
          rows = ([x[:count] for x in y] for y in (spread, whole))
          note(f'devices, {dtype}', *rows)
    progress(count)
  return stages


def _percentiles(x: np.ndarray) -> dict[str, float] | None:
  x = x[np.isfinite(x)]
  if not len(x):
    return None
  names = dict(min=0, p5=5, median=50, p95=95, max=100)
  return {
    n: float(v)
    for n, v in zip(names, np.percentile(x, [*names.values()]), strict=True)
  }


def figures(
  stage: Stage, codebook_size: int, part: Any = None
) -> dict[str, Any]:
  """A stage's figures, plain JSON values; None for what does not apply.

  Args:
    stage: what `gather` gave, or `merged`.
    codebook_size: K.
    part: an FSQ or LFQ quantizer, whose levels are counted by channel.
  """
  indices = stage.column('indices')
  indices = indices[indices >= 0]
  codes, counts = np.unique(indices, return_counts=True)
  n, k, entropy = (
    len(indices),
    codebook_size,
    abs(float(metrics.entropy(counts))),
  )
  out = dict(
    name=stage.name,
    tokens=n,
    codes=k,
    used=len(codes),
    usage=len(codes) / k,
    # For as many tokens, spread uniformly over all codes.
    unused=1 - len(codes) / k,
    unused_if_even=math.exp(n * math.log1p(-1 / k)) if k > 1 else 0.0,
    perplexity=math.exp(entropy),
    effective_bits=entropy / math.log(2),
    bits=math.log2(k),
    token_norm=_percentiles(stage.column('norms')),
    tokens_not_finite=int((~np.isfinite(stage.column('norms'))).sum()),
    moved={
      name: int(m) / max(int(t), 1) for name, (m, t) in stage.moved.items()
    },
    counts=np.sort(counts)[::-1].tolist(),
  )
  if part is not None:
    digits = np.asarray(part.digits(jnp.asarray(codes)))
    shares = [
      np.bincount(d, weights=counts, minlength=levels)[:levels] / max(n, 1)
      for d, levels in zip(digits.T, part.levels, strict=True)
    ]
    out['levels'] = [s.tolist() for s in shares]
    out['levels_used'] = [int((s > 0).sum()) for s in shares]
    out['effective_levels'] = [
      float(np.exp(metrics.entropy(s))) for s in shares
    ]
  if stage.table is None:
    return out
  table = stage.table
  finite = np.isfinite(table).all(-1)
  best = stage.column('best')
  mean = float(best.mean()) if np.isfinite(best).all() else None
  near = NEAR * (mean or 0.0)
  out |= dict(
    code_norm=_percentiles(np.linalg.norm(table, axis=-1)),
    codes_not_finite=int((~finite).sum()),
    near_duplicates=int((np.asarray(to_earlier(table)) <= near).sum()),
    distance=mean,
    relative_error=None,
    margins=None,
  )
  spread = float(stage.sample.var(0).sum())
  if mean is not None and spread > 0:
    out['relative_error'] = (
      float((best.astype(np.float64) ** 2).mean()) / spread
    )
  if mean and k > 1:
    margin = stage.column('margin') / mean
    shares = np.histogram(margin, EDGES)[0] / max(len(margin), 1)
    out['margins'] = dict(
      edges=list(EDGES[:-1]),
      shares=shares.tolist(),
      **(_percentiles(margin) or {}),  # of one finite code all are infinite
    )
  return out
