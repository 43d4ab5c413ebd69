"""Residual quantization (arXiv 2107.03312, 2203.01941): each stage quantizes
the residual of the stages before it; a token's code is the sum over stages.

One quantizer chooses the codes of each stage: "vq", "simvq" (l2, unscaled
tokens), "fsq" or "lfq". Rounding needs a finer grid at each stage: FSQ's stage
i has steps of L^-i, after latents are softly bounded to the L/2 that its L
levels cover (arXiv 2107.03312's scheme with FSQ as its quantizer). The index of
a token is then a number in base L, one digit per stage. The codes of LFQ's
stage i are +-2^-i, and latents are not bounded. The softmax of their entropy is
taken over tokens and codes in units of the stage's step.

Dropout (arXiv 2107.03312; with a probability as in 2306.06546): a sample keeps
its first n stages, n uniform in 1 … stages. The others have the index -1 and
add nothing, so that fewer stages can be decoded too.

Gradients pass through the (bounded) latent once. If each stage had its own
straight-through estimator, as in vector-quantize-pytorch, the gradient would be
too large by a factor of the number of stages.
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.quantizers import base, nested
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.lfq import LFQ


class Residual(nested.Nested):
  """`stages` codes per token, whose sum approximates the token.

  Indices are i32[... stages], -1 where a stage is dropped. Losses are means
  over stages, with zeros for dropped ones.

  The codes cannot be recovered from their sum: `codes_to_indices` takes the
  separate codes from `indices_to_stage_codes`. It recovers every index in
  [0, K) if the rows of a table differ, but not a dropped stage, whose code is
  zeros.

  Attributes:
    stages: q, how many codes a token has. At least 1.
    shared: whether one table serves all stages and learns from all of them.
    dropout: the probability that a sample of a training batch loses stages. In
      [0, 1].
  """

  allowed = ('vq', 'simvq', 'fsq', 'lfq')
  positive = ('stages',)
  lowest_index = -1

  stages: int = 8
  shared: bool = False
  dropout: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.dropout <= 1:
      raise UserError(f'quantizer.dropout={self.dropout} must lie in [0, 1]')
    nested.check_residual(self.quantizer)
    if self.shared:
      nested.check_shared_start(self.quantizer)
    for field, right in (('convention', 'centered'), ('bound', 'clip')):
      have = nested.value_of(self.quantizer, field, right)
      if have != right:
        raise UserError(
          f'quantizer.quantizer.{field}={have!r}: stages of FSQ round the '
          f'residual of a bounded latent; set it to {right!r}'
        )
    if not isinstance(self.quantizer, FSQ | LFQ):
      return
    most = max(self.quantizer.levels)
    if most**self.stages > base.EXACT:
      raise UserError(
        f'quantizer.stages={self.stages} of {most} levels are finer than f32; '
        f'set it to {int(np.log(base.EXACT) / np.log(most))} or less'
      )

  @property
  def codes_per_token(self):
    return self.stages

  @property
  def tables(self):
    return 1 if self.shared else self.stages

  @property
  def draws(self):
    return self.dropout > 0 or super().draws

  @property
  def training_fields(self):
    return (*super().training_fields, 'dropout')

  def _step(self, i: int) -> Any:
    """The scale of stage i's codes."""
    if not isinstance(self.quantizer, FSQ | LFQ):
      return np.float32(1)
    return np.asarray(self.quantizer.levels, np.float32) ** np.float32(-i)

  def _bounded(self, z: Array) -> Array:
    if not isinstance(self.quantizer, FSQ):
      return z
    bound = np.asarray(self.quantizer.levels, np.float32) / 2
    return jnp.tanh(z / bound) * bound

  @property
  def search_names(self):
    names = [f'stage {i + 1}' for i in range(self.stages)]
    return tuple((name, '' if self.shared else name) for name in names)

  def _searches(self, z):
    found, rest = [], self._bounded(z)
    for i in range(self.stages):
      (search,) = self._call(i, '_searches', rest / self._step(i))
      found.append(search)
      rest = rest - self._stage_codes(i, search.indices)
    return found

  def _stage_codes(self, i: int, indices: Array) -> Array:
    """i32[...] -> f32[... c]: what stage i adds; zeros where it is dropped."""
    codes = self._call(i, '_lookup', jnp.maximum(indices, 0)) * self._step(i)
    codes = jnp.where(indices[..., None] < 0, 0, codes)
    # Rounded before they are added, in every program that uses them.
    return jax.lax.optimization_barrier(codes)

  def _stages(self, z: Array, train: bool) -> Iterator[tuple]:
    """For bounded f32[... c], yields (i, stage i's input, its indices, its
    codes); no stage is dropped."""
    rest = z
    for i in range(self.stages):
      scaled = rest / self._step(i)
      indices = self._call(i, '_assign', scaled, train, None)[1]
      codes = self._stage_codes(i, indices)
      yield i, rest, indices, codes
      rest = rest - jax.lax.stop_gradient(codes)

  def _assign(self, z, train, random):
    z = self._bounded(z)
    kept = self._kept(train, random)
    found = [
      _dropped(i, indices, kept) for i, _, indices, _ in self._stages(z, train)
    ]
    return z, jnp.stack(found, -1)

  def _quantize(self, z, train, random, losses):
    """Dropped stages count in no statistic and have zero loss; regularisers
    and `tokens` see what the stage would have quantized."""
    z = self._bounded(z)
    kept, found = self._kept(train, random), []
    for i, rest, indices, codes in self._stages(z, train):
      scaled = rest / self._step(i)
      values = self._call(i, '_regularisers', losses, scaled, scaled)
      tokens = None
      if train and random:
        keys = nested.random_of_part(random, i)
        own = codes / self._step(i)
        tokens = self._call(i, '_tokens', scaled, own, keys)
      indices = _dropped(i, indices, kept)
      if kept is not None:
        here = indices[..., None] >= 0
        codes, rest = (jnp.where(here, x, 0) for x in (codes, rest))
      values |= self._call(i, '_losses', rest, indices, codes)
      stats = self._call(i, '_stats', rest, indices, train)
      found.append((indices, codes, values, stats, tokens))
    indices, codes, values, stats, tokens = zip(*found, strict=True)
    return base.Quantized(
      surrogate=z,
      indices=jnp.stack(indices, -1),
      codes=functools.reduce(operator.add, codes),
      losses=nested.mean_of(values),
      stats=nested.joined(stats),
      tokens=None if tokens[0] is None else jnp.stack(tokens, 1),
    )

  def _kept(self, train: bool, random: Any) -> Array | None:
    """i32[b], how many stages each sample keeps, determined by its key alone;
    None if no stage is dropped."""
    if not (train and random and self.dropout):
      return None

    def one(key):
      drops, count = jax.random.split(key)
      kept = jax.random.randint(count, (), 1, self.stages + 1)
      drops = jax.random.uniform(drops) < self.dropout
      return jnp.where(drops, kept, self.stages)

    return jax.vmap(one)(random['samples'])

  def _lookup(self, indices):
    self._check(indices)
    codes = [self._stage_codes(i, indices[..., i]) for i in range(self.stages)]
    return functools.reduce(operator.add, codes)

  def _check(self, indices: Array) -> None:
    if indices.shape[-1:] != (self.stages,):
      raise UserError(
        f'indices must have a last axis of quantizer.stages={self.stages} '
        f'(-1 for a stage that is left out), got shape {indices.shape}'
      )

  def init_codebook(self, codebook, z, rng):
    """Places each stage's codes at the residual of the stages before it."""
    if nested.PARTS not in codebook:
      return codebook
    part = self.part
    if self.shared:

      def init(old):
        rows = nested.rows_of_all_stages(
          z, [1] * self.stages, self.codebook_size,
          lambda rest, _: rest, lambda rest, _, codes: rest - codes, rng,
        )  # fmt: skip
        return part.init_codebook(old, rows, rng, len(z) * self.stages)

      return self._each(init, codebook)
    rest, keys = z, jax.random.split(rng, self.stages)

    def init(old, key):
      nonlocal rest
      new = part.init_codebook(old, rest, key)
      if new is old:
        return old
      # Variables other than tables (a map of codes) keep their initial values.
      variables = {**part.init(key, rest[:1]), 'codebook': new}
      indices = part.apply(variables, rest, False, None, method='_assign')[1]
      rest = rest - part.apply(variables, indices, method='_lookup')
      return new

    return self._each(init, codebook, keys)

  def indices_to_stage_codes(self, indices: Array) -> Array:
    """i32[... q] -> f32[... q c], whose sum over q is the token's code."""
    self._check(indices)
    codes = [self._stage_codes(i, indices[..., i]) for i in range(self.stages)]
    return jnp.stack(codes, -2)

  def all_codes(self):
    """f32[q K c], as each stage adds them."""
    count = self.tables if np.all(self._step(1) == 1) else self.stages
    every = jnp.arange(self.codebook_size)
    return jnp.stack([self._stage_codes(i, every) for i in range(count)])

  def codes_to_indices(self, codes):
    """f32[... q c], the codes of each stage -> i32[... q]."""
    nested.check_stage_codes(codes, self.stages, self.code_width)
    found = [
      self._call(i, 'codes_to_indices', codes[..., i, :] / self._step(i))
      for i in range(self.stages)
    ]
    return jnp.stack(found, -1)


def _dropped(i: int, indices: Array, kept: Array | None) -> Array:
  """i32[b ...] of stage i, -1 in samples that keep no more than `kept`."""
  if kept is None:
    return indices
  kept = kept.reshape(-1, *[1] * (indices.ndim - 1))
  return jnp.where(i < kept, indices, -1)
