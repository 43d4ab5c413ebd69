"""Vector quantization (arXiv 1711.00937): the nearest row of a learned table.

update="ema": the table is a moving average of the tokens it attracts. With
counts n and sums s of a step, N <- g N + (1-g) n, W <- g W + (1-g) s, and the
codes are W over the Laplace-smoothed N. update="gradient": the table is a
parameter that the codebook loss moves.

With the usual initialization (N = 0, random codes) the average destroys its own
codebook at the first step: a code without tokens is divided by almost zero and
reaches a norm of 1e6. Here N starts at one per code and the codes start at
tokens of the first batch. A code moves only when it wins a token; idle codes
are not revived yet.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.quantizers import base


class VQ(base.TableQuantizer):
  """The nearest of `num_codes` codes in squared L2.

  Attributes:
    num_codes: K.
    code_dim: c; None for the latents' width.
    update: "ema" or "gradient".
    decay: g of the moving average, usually .95 to .999.
    epsilon: of the Laplace smoothing.
    data_init: start the codes at tokens of the first batch.
  """

  choices = (('update', ('ema', 'gradient')),)
  training_fields = ('decay', 'epsilon', 'data_init')
  positive = ('num_codes', 'code_dim', 'epsilon')

  projection: bool = False
  num_codes: int = 8192
  code_dim: int | None = None
  update: str = 'ema'
  decay: float = 0.99
  epsilon: float = 1e-5
  data_init: bool = True

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.decay < 1:
      raise UserError(f'quantizer.decay={self.decay} must lie in [0, 1)')

  @property
  def loss_names(self):
    return ('commit',) if self.update == 'ema' else ('commit', 'codebook')

  @property
  def ema_tables(self):
    return ('codes',) if self.update == 'ema' else ()

  def setup_codes(self):
    shape = (self.num_codes, self.code_width)
    if self.update == 'gradient':
      self.codes = self.param('codes', nn.initializers.normal(1.0), shape)
      return
    table = self.table('codes', 1.0, shape)
    self.codes = table.value
    # The state of the average: absent from a tokenizer on disk.
    if self.is_initializing():
      self.variable('codebook', 'counts', jnp.ones, shape[:1], jnp.float32)
      self.variable('codebook', 'sums', lambda: table.value)

  def _assign(self, z, train, random):
    return z, code_ops.nearest_code(z, self.codes)

  def _table(self):
    return self.codes

  def _stats(self, z, indices, train):
    stats = super()._stats(z, indices, train)
    if train and self.update == 'ema':
      z = jax.lax.stop_gradient(z)
      stats['sums'] = code_ops.sum_by_code(z, indices, self.num_codes)[None]
    return stats

  def init_codebook(self, codebook, z, rng):
    """Codes at tokens of the batch."""
    if not self.data_init or self.update != 'ema':
      return codebook
    return self._fresh_average(
      base.init_codes_from_data(z, self.num_codes, rng)
    )

  def _fresh_average(self, codes):
    counts = jnp.ones(self.num_codes, jnp.float32)
    # A copy: both are donated to the step, and no buffer may be twice.
    return {'codes': codes, 'counts': counts, 'sums': jnp.copy(codes)}

  def training_codebook(self, tables):
    """An average that starts at the codes; its own state is not on disk."""
    if self.update != 'ema':
      return super().training_codebook(tables)
    return self._fresh_average(jnp.asarray(tables['codes']))

  def update_codebook(self, codebook, stats):
    if self.update != 'ema':
      return codebook
    g = self.decay
    count = stats['counts'][0].astype(jnp.float32)
    counts = g * codebook['counts'] + (1 - g) * count
    sums = g * codebook['sums'] + (1 - g) * stats['sums'][0]
    total = counts.sum()
    smooth = (counts + self.epsilon) / (total + self.num_codes * self.epsilon)
    # A code without tokens stays: its count decays below epsilon, and the
    # quotient would draw it to the origin, where all other idle codes are.
    won = (count > 0)[:, None]
    codes = jnp.where(won, sums / (smooth * total)[:, None], codebook['codes'])
    return {'codes': codes, 'counts': counts, 'sums': sums}
