"""SimVQ (arXiv 2411.02038): a frozen basis seen through one learned map.

The codes are basis @ W + b. A gradient to W moves every code at once, so usage
stays high at wide codes. One function computes the full table in the highest
precision; inference reads it baked.

distance="l2": tokens and codes as they are, after tokens are scaled to an RMS
of one (`normalize`): a token of width 1536 has a norm near 39, far outside a
table of norm one, and usage would stay low. distance="cosine": both sides are
unit vectors, scaled by sqrt(c) so that losses averaged over channels do not
vanish and the decoder reads values of order one (`code_scale`; the PyTorch
project's decoder reads unit vectors, or the rows unscaled).

The papers' basis is random. A ViT's tokens share a direction and fill few
dimensions of the code space, so a few such rows are nearest to all of them, and
training makes it worse: on the latents of a frozen autoencoder, 4096 codes of
64 channels, perplexity was 7 after 50 steps and 2 after 150. With tokens of the
first batch as the basis and the identity as the map it was 908 and 620, and the
reconstruction 5 dB better (2026-11). That is the default.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops.codes import unit_rms
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.quantizers import base


class SimVQ(base.Nearest):
  """The nearest of `num_codes` rows of basis @ W + b.

  Attributes:
    num_codes: K, 16384 in the papers. At least 1 code.
    code_dim: c, 1536 in VQRAE; independent of the latents' width. At least 1
      channel.
    distance: how tokens and codes are compared. One of "l2", "cosine".
    normalize: whether tokens are scaled to an RMS of one with "l2" ("cosine"
      always does).
    basis_init: the basis: tokens of a run's first batch with a map that starts
      as the identity; the same with tokens far from one another; or random rows
      with a random map, as in the papers. One of "tokens", "kmeans++",
      "normal".
    basis_std: of the normal basis; 1 gives codes an RMS near one. Above 0.
    code_scale: with "cosine", how the codes that the decoder reads are scaled:
      to an RMS of one, to a norm of one, or not (the table's rows). One of
      "rms", "unit", "none".
    token_map: whether tokens pass through a learned map, code_dim wide, before
      they are compared.
  """

  choices = (
    ('distance', ('l2', 'cosine')),
    ('basis_init', ('tokens', 'kmeans++', 'normal')),
    ('code_scale', ('rms', 'unit', 'none')),
  )
  loss_names = ('commit', 'codebook', 'entropy', 'diversity', 'orthogonal')
  training_fields = (*base.Nearest.training_fields, 'basis_std', 'basis_init')
  positive = (*base.Nearest.positive, 'basis_std')

  num_codes: int = 16384
  code_dim: int = 1536
  distance: str = 'l2'
  normalize: bool = True
  basis_std: float = 1.0
  code_scale: str = 'rms'
  token_map: bool = False
  basis_init: str = 'tokens'

  def __post_init__(self):
    super().__post_init__()
    if self.code_scale != 'rms' and self.distance != 'cosine':
      raise UserError(
        f'quantizer.code_scale={self.code_scale!r} needs '
        'quantizer.distance="cosine"'
      )

  def setup_codes(self):
    c = self.code_dim
    init = nn.initializers.lecun_normal()
    if self.basis_init != 'normal':
      init = lambda _, shape: jnp.eye(*shape)  # noqa: E731
    self.kernel = self.param('kernel', init, (c, c))
    self.bias = self.param('bias', nn.initializers.zeros, (c,))
    if self.token_map:
      self.map_tokens = nn.Dense(c, precision='highest')
    if self.is_initializing():
      self.table('basis', self.basis_std, (self.num_codes, c))

  def init_codebook(self, codebook, z, rng, tokens=None):
    """The basis at tokens of the batch, as they are compared."""
    if self.basis_init == 'normal':
      return codebook
    if self.normalize or self.distance == 'cosine':
      z = unit_rms(z)
    start = base.init_codes_from_data
    if self.basis_init == 'kmeans++':
      start = base.spread_codes
    return {'basis': start(z, self.num_codes, rng)}

  def _table(self):
    """f32[k c], the codes: the baked ones, else all of basis @ W + b."""
    if self.has_variable('codebook', 'codes'):
      return self.get_variable('codebook', 'codes')
    table = self._rows(self.get_variable('codebook', 'basis'))
    # The rows are bitwise the same in every program that reads them.
    return jax.lax.optimization_barrier(table)

  def _rows(self, basis):
    """The codes of rows of the basis, f32[... c]."""
    rows = jnp.matmul(basis, self.kernel, precision='highest') + self.bias
    return self._scaled(rows) if self.distance == 'cosine' else rows

  def _lookup(self, indices):
    found, n = super()._lookup(indices), indices.size
    baked = self.has_variable('codebook', 'codes')
    if baked or not isinstance(n, int) or 2 * n > self.num_codes:
      return found
    # A map's gradient from the rows that were read, not from the full table.
    basis = code_ops.lookup(self.get_variable('codebook', 'basis'), indices)
    return code_ops.straight_through(self._rows(basis), found)

  def _scaled(self, x):
    """Tokens, or the table's rows, as `code_scale` says."""
    if self.code_scale == 'none':
      return x
    x = unit_rms(x)
    return x if self.code_scale == 'rms' else x * self.code_dim**-0.5

  def to_code_space(self, latents):
    z = super().to_code_space(latents)
    return self.map_tokens(z) if self.token_map else z

  def _assign(self, z, train, random):
    table = self._table()
    if self.code_scale != 'rms':  # compared by angle, whatever their size
      indices = nearest_code(unit_rms(z), unit_rms(table))
      return self._scaled(z), indices
    if self.normalize or self.distance == 'cosine':
      z = unit_rms(z)
    return z, nearest_code(z, table)

  def _of_softmax(self, surrogate):
    found = super()._of_softmax(surrogate)
    if self.code_scale != 'none':
      return found
    return tuple(map(unit_rms, found))  # chosen by angle, whatever their size

  def _searches(self, z):
    (search,) = super()._searches(z)
    if self.code_scale != 'rms':
      tokens, table = map(unit_rms, search[:2])
      search = search._replace(tokens=tokens, table=table)
    return [search]
