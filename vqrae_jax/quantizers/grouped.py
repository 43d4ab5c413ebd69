"""Grouped quantization (arXiv 2502.20321): the channels of a code are split
into groups, each quantized separately; a product of codebooks.

With g groups of K codes a token can take K^g values, which may exceed the 2^31
that one i32 index can count. A group's quantizer may be residual.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.quantizers import base, nested


class Grouped(nested.Nested):
  """`groups` codes per token, side by side.

  Indices are i32[... q], the groups in the order of their channels (all of a
  residual group's stages, then the next group's). Losses are means over groups.

  Attributes:
    groups: g, how many groups the channels are split into. At least 1.
    shared: whether one table serves all groups and learns from all of them.
  """

  allowed = ('vq', 'simvq', 'fsq', 'lfq', 'bsq', 'residual')
  positive = ('groups',)

  groups: int = 8
  shared: bool = False

  def __post_init__(self):
    super().__post_init__()
    inner, key = nested.innermost(self, 'quantizer')
    follows = nested.value_of(inner, 'code_dim', 0) is None
    if follows and self.latent_dim % self.groups:
      raise UserError(
        f'quantizer.groups={self.groups} must divide the {self.latent_dim} '
        f'channels of the latents; or set {key}.code_dim'
      )

  @property
  def codes_per_token(self):
    return self.groups * self.codes_per_part

  @property
  def tables(self):
    return 1 if self.shared else self.groups

  @property
  def part_dim(self):
    return self.latent_dim // self.groups

  @property
  def code_width(self):
    return self.groups * self.part.code_width

  @property
  def lowest_index(self):
    return self.quantizer.lowest_index

  @property
  def search_names(self):
    found = []
    for i in range(self.groups):
      group = f'group {i + 1}'
      for name, table in self.quantizer.search_names:
        table = table if self.shared else f'{group} {table}'
        found.append((f'{group} {name}'.strip(), table.strip()))
    return tuple(found)

  def _searches(self, z):
    split = enumerate(jnp.split(z, self.groups, -1))
    return [s for i, x in split for s in self._call(i, '_searches', x)]

  def _indices(self, indices: Array) -> list[Array]:
    """i32[... q] -> each group's, as its quantizer has them."""
    if indices.shape[-1:] != (self.codes_per_token,):
      raise UserError(
        f'indices must have a last axis of {self.codes_per_token}, one a code '
        f'of quantizer.groups={self.groups}, got shape {indices.shape}'
      )
    if not isinstance(self.quantizer, nested.Nested):
      return [indices[..., i] for i in range(self.groups)]
    return jnp.split(indices, self.groups, -1)

  def _joined(self, indices: Sequence[Array]) -> Array:
    if not isinstance(self.quantizer, nested.Nested):
      return jnp.stack(indices, -1)
    return jnp.concatenate(indices, -1)

  def _parts(self, z: Array, random: Any) -> list[tuple]:
    """[(i, channels of f32[... c], `random`)] for each part i."""
    return [
      (i, x, nested.random_of_part(random, i))
      for i, x in enumerate(jnp.split(z, self.groups, -1))
    ]

  def _assign(self, z, train, random):
    found = [
      self._call(i, '_assign', x, train, keys)
      for i, x, keys in self._parts(z, random)
    ]
    surrogates, indices = zip(*found, strict=True)
    return jnp.concatenate(surrogates, -1), self._joined(indices)

  def _quantize(self, z, train, random, losses):
    found = [
      self._call(i, '_quantize', x, train, keys, losses)
      for i, x, keys in self._parts(z, random)
    ]
    surrogates, indices, codes, values, stats, tokens = zip(*found, strict=True)
    return base.Quantized(
      surrogate=jnp.concatenate(surrogates, -1),
      indices=self._joined(indices),
      codes=jnp.concatenate(codes, -1),
      losses=nested.mean_of(values),
      stats=nested.joined(stats),
      tokens=nested.joined(tokens, 1),
    )

  def _lookup(self, indices):
    codes = [
      self._call(i, '_lookup', x) for i, x in enumerate(self._indices(indices))
    ]
    return jnp.concatenate(codes, -1)

  def init_codebook(self, codebook, z, rng):
    """Each table at its group's tokens; a shared one at those of all."""
    if nested.PARTS not in codebook:
      return codebook
    tokens = jnp.stack(jnp.split(z, self.groups, -1))
    tokens = tokens.reshape(self.tables, -1, tokens.shape[-1])
    keys = jax.random.split(rng, self.tables)
    return self._each(self.part.init_codebook, codebook, tokens, keys)

  def codes_to_indices(self, codes):
    """f32[... c] -> i32[... q]; not available for residual groups, whose codes
    are sums."""
    if isinstance(self.quantizer, nested.Nested):
      raise UserError(
        "codes_to_indices of residual groups is not available: a group's codes "
        'are summed'
      )
    found = [
      self._call(i, 'codes_to_indices', x)
      for i, x in enumerate(jnp.split(codes, self.groups, -1))
    ]
    return self._joined(found)
