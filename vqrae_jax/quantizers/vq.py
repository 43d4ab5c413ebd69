"""Vector quantization (arXiv 1711.00937): the nearest row of a learned table.

update="ema": the table is a moving average of the tokens it attracts. With
counts n and sums s of a step, N <- g N + (1-g) n, W <- g W + (1-g) s, and the
codes are W over the Laplace-smoothed N. update="gradient": the table is a
parameter that the codebook loss moves.

With the usual initialization (N = 0, random codes) the average destroys its own
codebook at the first step: a code without tokens is divided by almost zero and
reaches a norm of 1e6. Here the codes start at tokens of the first batch. A code
moves only when it wins a token, and the encoder or the projection may move away
from it: a code whose average count N has fallen below a share of the mean
becomes a token of the batch (as in Jukebox, 2005.00341), at most `REVIVED` of
them a step.

An encoder from scratch leaves nearly all codes within a few dozen steps. A new
code's N is therefore only that least count and one token's part of an average:
it is idle again unless it wins a token as soon as a code of the least count
does. With N = 1 for a start, 230 steps passed before the first was revived, and
a ViT on CIFAR-10 used 14 of 1024 codes by then (2026-11).

distance="cosine" (arXiv 2110.04627): tokens and codes are unit vectors, and the
average is scaled to norm one. With `projection` and a small `code_dim` these
are the l2-normalised codebooks of low dimension that many tokenizers use.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.quantizers import base

REVIVED = 256  # codes at most in a step


class VQ(base.Nearest):
  """The nearest of `num_codes` codes.

  Attributes:
    num_codes: K.
    code_dim: c; None for the latents' width.
    update: "ema" or "gradient".
    decay: g of the moving average, usually .95 to .999.
    epsilon: of the Laplace smoothing.
    data_init: start the codes at tokens of the first batch; "kmeans++" at
      tokens far from one another.
    distance: "l2", or "cosine" for unit vectors on both sides.
    revive_below: of "ema", the least average count of a code, as a share of
      the mean, tokens of a step / num_codes; 0 for never. A code of the mean
      that wins no more falls to .1 of it within 230 steps of decay .99.
  """

  choices = (
    ('update', ('ema', 'gradient')),
    ('distance', ('l2', 'cosine')),
    ('data_init', (True, False, 'kmeans++')),
  )
  training_fields = (
    *base.Nearest.training_fields, 'decay', 'epsilon', 'data_init',
    'revive_below',
  )  # fmt: skip
  positive = (*base.Nearest.positive, 'epsilon')

  projection: bool | str = False
  num_codes: int = 8192
  code_dim: int | None = None
  update: str = 'ema'
  decay: float = 0.99
  epsilon: float = 1e-5
  data_init: bool | str = True
  distance: str = 'l2'
  revive_below: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.revive_below < 1:
      raise UserError(
        f'quantizer.revive_below={self.revive_below} must lie in [0, 1)'
      )
    if not 0 <= self.decay < 1:
      raise UserError(f'quantizer.decay={self.decay} must lie in [0, 1)')

  @property
  def loss_names(self):
    moved = ('codebook', 'orthogonal') if self.update == 'gradient' else ()
    return ('commit', 'entropy', 'diversity', *moved)

  @property
  def ema_tables(self):
    return ('codes',) if self.update == 'ema' else ()

  @property
  def draws(self):
    return self.update == 'ema' and self.revive_below > 0

  def setup_codes(self):
    shape = (self.num_codes, self.code_width)
    if self.update == 'gradient':
      self.codes = self.param('codes', nn.initializers.normal(1.0), shape)
      return
    table = self.table('codes', 1.0, shape)
    if self.is_initializing():
      table.value = self._compared(table.value)
    self.codes = table.value
    # The state of the average: absent from a tokenizer on disk.
    if self.is_initializing():
      self.variable('codebook', 'counts', jnp.ones, shape[:1], jnp.float32)
      self.variable('codebook', 'sums', lambda: table.value)

  def _compared(self, x):
    """Tokens or codes, as they are compared."""
    return code_ops.unit(x) if self.distance == 'cosine' else x

  def _assign(self, z, train, random):
    z = self._compared(z)
    return z, nearest_code(z, self._table())

  def _table(self):
    if self.distance == 'l2' or self.update == 'ema':
      return self.codes
    if self.has_variable('codebook', 'codes'):  # baked
      return self.get_variable('codebook', 'codes')
    # The rows are the same to the last bit whatever reads them.
    return jax.lax.optimization_barrier(self._compared(self.codes))

  def _stats(self, z, indices, train):
    stats = super()._stats(z, indices, train)
    if train and self.update == 'ema':
      z = jax.lax.stop_gradient(z)
      stats['sums'] = code_ops.sum_by_code(z, indices, self.num_codes)[None]
    return stats

  def _tokens(self, z, random):
    if not self.draws:
      return None
    flat = jax.lax.stop_gradient(z).reshape(len(z), -1, z.shape[-1])

    def drawn(key, tokens):
      return tokens[jax.random.randint(key, (), 0, len(tokens))]

    return jax.vmap(drawn)(random['samples'], flat)

  def init_codebook(self, codebook, z, rng):
    """Codes at tokens of the batch."""
    if not self.data_init or self.update != 'ema':
      return codebook
    start = base.init_codes_from_data
    if self.data_init == 'kmeans++':
      start = base.spread_codes
    codes = self._compared(start(self._compared(z), self.num_codes, rng))
    count = self._least(len(z)) + 1 - self.decay if self.revive_below else 1.0
    return self._fresh_average(codes, count)

  def _least(self, tokens):
    """The average count below which a code is idle, of `tokens` a step."""
    return self.revive_below * tokens / self.num_codes

  def _fresh_average(self, codes, count=1.0):
    counts = jnp.full(self.num_codes, count, jnp.float32)
    # No buffer may be twice: both are donated to the step.
    return {'codes': codes, 'counts': counts, 'sums': count * codes}

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
    moved = self._compared(sums / (smooth * total)[:, None])
    codes = jnp.where(won, moved, codebook['codes'])
    if 'tokens' not in stats:
      return {'codes': codes, 'counts': counts, 'sums': sums}
    least = self._least(count.sum())
    idle, new = counts < least, least + 1 - g
    tokens = stats['tokens'][:REVIVED]
    place = jnp.cumsum(idle) - 1  # among the idle ones
    revived = (idle & (place < len(tokens)))[:, None]
    fresh = tokens[jnp.minimum(place, len(tokens) - 1)]
    codes = jnp.where(revived, fresh, codes)
    return {
      'codes': codes,
      'counts': jnp.where(revived[:, 0], new, counts),
      'sums': jnp.where(revived, new * fresh, sums),
    }
