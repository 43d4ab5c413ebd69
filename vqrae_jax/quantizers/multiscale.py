"""Multi-scale residual quantization (arXiv 2404.02905): a grid of latents as
maps of indices from coarse to fine.

At each scale the residual of the grid is downsampled to the scale by area
averaging, quantized with one shared table, upsampled (bicubic, as torch without
antialias), smoothed by a convolution phi,
  h -> (1 - ratio) h + ratio conv3x3(h),
and subtracted. The code of the grid is the sum over scales. Scales share a few
phi, assigned by their position between the first and the last scale.
"""

import functools
import math
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import images as image_ops
from vqrae_jax.quantizers import base, nested


class MultiScale(nested.Nested):
  """A grid of tokens as n indices; n is the sum of the areas of its scales.

  Latents are [... gh gw d] with the grid of the last scale; indices are
  i32[... n], each scale in row order, coarse scales first. An index of -1 adds
  nothing, so a prefix of the scales can be decoded too. Losses compare the
  partial sum with the latents, averaged over scales.

  The codes cannot be recovered from their sum: `codes_to_indices` takes the
  output of `indices_to_stage_codes`, f32[... n c].

  Attributes:
    scales: sides of square maps, or (rows, columns), coarse to fine; the last
      is the grid of the tokens. Each at least 1 token.
    phis: how many convolutions the scales share; 0 for none. At least 0.
    residual_ratio: the share of the convolution's output in phi. In [0, 1].
  """

  allowed = ('vq', 'simvq')
  lowest_index = -1

  scales: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  phis: int = 4
  residual_ratio: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    sides = [side for size in self.sizes for side in size]
    last = self.sizes[-1:]
    if (
      not sides
      or min(sides) < 1
      or any(a > b for s in self.sizes for a, b in zip(s, *last, strict=True))
    ):
      raise UserError(
        f'quantizer.scales={self.scales} must be sides of at least 1, none '
        'above the last'
      )
    if self.phis < 0 or not 0 <= self.residual_ratio <= 1:
      raise UserError(
        f'quantizer.phis={self.phis} must be at least 0 and quantizer.'
        f'residual_ratio={self.residual_ratio} lie in [0, 1]'
      )
    nested.check_residual(self.quantizer)
    nested.check_shared_start(self.quantizer)
    fit = [n for n in range(self.phis + 1) if len(set(self._phis(n))) == n]
    if self.phis != fit[-1]:
      raise UserError(
        f'quantizer.phis={self.phis}: some would not be nearest to any of the '
        f'{len(self.scales)} scales, so never trained; set it to {fit[-1]}'
      )

  @property
  def sizes(self) -> list[tuple[int, int]]:
    """(rows, columns) of each scale."""
    return [(s, s) if isinstance(s, int) else tuple(s) for s in self.scales]

  @property
  def only_grid(self):
    return self.sizes[-1]

  @property
  def tables(self):
    return 1

  @property
  def loss_names(self):
    # "codebook" also trains phi.
    others = (n for n in super().loss_names if n not in base.LOSSES)
    return (*base.LOSSES, *others)

  @property
  def index_axes(self):
    return ('n',)

  def index_shape(self, grid):
    self._check_grid(grid)
    return (sum(map(math.prod, self.sizes)),)

  def _check_grid(self, grid: tuple[int, ...]) -> None:
    if tuple(grid) != self.only_grid:
      raise UserError(
        f'quantizer.scales end in {self.only_grid}, but the grid of tokens is '
        f'{tuple(grid)}: make the last scale (rows, columns) of the grid'
      )

  def setup_codes(self):
    super().setup_codes()
    self.phi = [
      nn.Conv(self.code_width, (3, 3), precision='highest')
      for _ in range(self.phis)
    ]
    if self.is_initializing():
      for phi in self.phi:
        phi(jnp.zeros((1, 1, 1, self.code_width)))

  def _phis(self, count: int) -> list[int]:
    """Which of `count` phi each scale has: the one whose position in (0, 1) is
    nearest to the scale's, as in the paper's code, whose positions differ for
    four."""
    if not count:
      return []
    margin = 1 / (3 if count == 4 else 2) / count
    places = np.linspace(margin, 1 - margin, count)
    last = max(len(self.scales) - 1, 1)
    return [
      int(np.argmin(np.abs(places - scale / last)))
      for scale in range(len(self.scales))
    ]

  def _smoothed(self, codes: Array, scale: int) -> Array:
    if not self.phis:
      return codes
    phi = self.phi[self._phis(self.phis)[scale]]
    ratio = self.residual_ratio
    return (1 - ratio) * codes + ratio * phi(codes)

  def _enlarged(self, scale: int, codes: Array) -> Array:
    """A scale's map f32[... h w c] -> what it adds to the grid."""
    # Computed from the same values by themselves, whatever is around them.
    codes = jax.lax.optimization_barrier(codes)
    codes = image_ops.resize(codes, self.only_grid, 'bicubic', antialias=False)
    return jax.lax.optimization_barrier(self._smoothed(codes, scale))

  def _added(self, scale: int, indices: Array) -> Array:
    """i32[... h w] -> f32[... gh gw c]; a map that is -1 everywhere adds
    nothing, nor phi's bias."""
    added = self._enlarged(scale, self._rows(indices))
    left_out = (indices < 0).all((-2, -1))
    return jnp.where(left_out[..., None, None, None], 0, added)

  def _rows(self, indices: Array) -> Array:
    """i32[...] -> f32[... c], zeros at -1."""
    codes = self._call(0, '_lookup', jnp.maximum(indices, 0))
    return jnp.where(indices[..., None] < 0, 0, codes)

  def _shrunk(self, rest: Array, scale: int) -> Array:
    if self.sizes[scale] == rest.shape[-3:-1]:
      return rest
    return image_ops.resize(rest, self.sizes[scale], 'area')

  def _maps(self, indices: Array) -> list[Array]:
    """i32[... n] -> [i32[... h w]] of each scale."""
    ends = np.cumsum([math.prod(size) for size in self.sizes])
    if indices.shape[-1:] != (ends[-1],):
      raise UserError(
        f'indices must have a last axis of {ends[-1]}, all of quantizer.'
        f'scales={self.scales}, got shape {indices.shape}'
      )
    parts = jnp.split(indices, ends[:-1], -1)
    return [
      x.reshape(*x.shape[:-1], *size)
      for x, size in zip(parts, self.sizes, strict=True)
    ]

  def _stages(self, z: Array, train: bool) -> Iterator[tuple]:
    """For f32[... gh gw c], yields each scale's tokens, their indices and
    codes, and what the scale adds to the grid."""
    self._check_grid(z.shape[-3:-1])
    rest = z
    for scale in range(len(self.scales)):
      tokens = self._shrunk(rest, scale)
      indices = self._call(0, '_assign', tokens, train, None)[1]
      codes = self._rows(indices)
      added = self._enlarged(scale, codes)
      yield tokens, indices, codes, added
      rest = rest - jax.lax.stop_gradient(added)

  def _assign(self, z, train, random):
    if self.is_initializing():  # by one token: all variables are made already
      n = sum(map(math.prod, self.sizes))
      return z, jnp.zeros((*z.shape[:-3], n), jnp.int32)
    found = [indices for _, indices, _, _ in self._stages(z, train)]
    return z, _flat(found, z.ndim - 3)

  def _quantize(self, z, train, random, losses):
    if self.is_initializing():
      zero = {name: jnp.zeros(()) for name in self.loss_names}
      _, indices = self._assign(z, train, random)
      return base.Quantized(z, indices, z, zero, {}, None)
    values, stats, found, sums, pairs = [], [], [], [], []
    for tokens, indices, codes, added in self._stages(z, train):
      sums.append(sums[-1] + added if sums else added)
      values.append(self._call(0, '_regularisers', losses, tokens, tokens))
      stats.append(self._call(0, '_stats', tokens, indices, train))
      found.append(indices)
      pairs.append((tokens, codes))
    values = nested.mean_of(values)
    so_far = jnp.stack(sums)
    values |= {name: base.LOSSES[name](z, so_far) for name in base.LOSSES}
    tokens = None
    if train and random:  # one of all scales, as the table is
      flat = (_flat(maps, z.ndim - 3) for maps in zip(*pairs, strict=True))
      tokens = self._call(0, '_tokens', *flat, random)
    return base.Quantized(
      surrogate=z,
      indices=_flat(found, z.ndim - 3),
      codes=sums[-1],
      losses=values,
      stats=jax.tree.map(lambda *x: sum(x), *stats),
      tokens=None if tokens is None else tokens[:, None],
    )

  @property
  def search_names(self):
    return tuple((f'scale {h}x{w}', '') for h, w in self.sizes)

  def _searches(self, z):
    self._check_grid(z.shape[-3:-1])
    found, rest = [], z
    for scale in range(len(self.scales)):
      (search,) = self._call(0, '_searches', self._shrunk(rest, scale))
      found.append(search)
      rest = rest - self._added(scale, search.indices)
    return found

  def _lookup(self, indices):
    maps = enumerate(self._maps(indices))
    return functools.reduce(
      operator.add, [self._added(scale, index) for scale, index in maps]
    )

  def init_codebook(self, codebook, z, rng):
    """Codes placed at tokens of all scales, taking phi as the identity."""
    grid = self.only_grid

    def take(rest, scale):
      return self._shrunk(rest, scale).reshape(-1, z.shape[-1])

    def leave(rest, scale, codes):
      codes = codes.reshape(len(rest), *self.sizes[scale], z.shape[-1])
      return rest - image_ops.resize(codes, grid, 'bicubic', antialias=False)

    def init(old):
      images = z.reshape(-1, *grid, z.shape[-1])
      counts = [math.prod(size) for size in self.sizes]
      rows = nested.rows_of_all_stages(
        images, counts, self.codebook_size, take, leave, rng
      )
      tokens = len(images) * sum(counts)
      return self.part.init_codebook(old, rows, rng, tokens)

    if nested.PARTS not in codebook:
      return codebook
    return self._each(init, codebook)

  def indices_to_stage_codes(self, indices: Array) -> Array:
    """i32[... n] -> the table's rows f32[... n c], before they are enlarged."""
    return self._rows(indices)

  def codes_to_indices(self, codes):
    """f32[... n c], the table's rows -> i32[... n]."""
    n = sum(map(math.prod, self.sizes))
    nested.check_stage_codes(codes, n, self.code_width)
    return self._call(0, 'codes_to_indices', codes)


def _flat(maps: Sequence[Array], lead: int) -> Array:
  """[... h w …] of each scale -> [... n …], side by side."""
  flat = [
    x.reshape(
      *x.shape[:lead],
      math.prod(x.shape[lead : lead + 2]),
      *x.shape[lead + 2 :],
    )
    for x in maps
  ]
  return jnp.concatenate(flat, lead)
