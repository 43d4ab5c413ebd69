"""Vector quantization (arXiv 1711.00937): the nearest row of a learned table.

update="ema": the table is a moving average of the tokens it attracts. With
counts n and sums s of a step, N <- g N + (1-g) n, W <- g W + (1-g) s, and the
codes are W over the Laplace-smoothed N. update="gradient": the table is a
parameter that the codebook loss moves.

With the usual initialization (N = 0, random codes) the average destroys its own
codebook at the first step: a code without tokens is divided by almost zero and
reaches a norm of 1e6. Here the codes start at tokens of the first batch. A code
moves only when it wins a token, and the encoder or the projection may move away
from it. So a code whose average count N has fallen below a share of the mean
is revived: it moves to halfway between a token of the batch and that token's
code, where it wins a share of that code's tokens. At most `REVIVED` codes move
per step. At the token itself, as in Jukebox (2005.00341), it would win almost
none when there are many channels: tokens are further from one another than from
their mean (docs/quantizers.md).

An encoder trained from scratch abandons nearly all codes within a few dozen
steps. So a revived code starts with an N of only that least count plus one
token's part of an average: it is idle again unless it wins a token as soon as a
code of the least count does. When codes started with N = 1, it took 230 steps
until the first was revived, and a ViT on CIFAR-10 used 14 of 1024 codes by then
(2026-11).

distance="cosine" (arXiv 2110.04627): tokens and codes are unit vectors, and the
average is scaled to norm one. With `projection` and a small `code_dim` these
are the l2-normalised codebooks of low dimension that many tokenizers use.

affine=True (arXiv 2305.08842): a code is mean + std * signal, with the running
mean and standard deviation of the tokens' channels. Both updates move the
signals, in these units; all codes, including idle ones, follow drifting tokens.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.quantizers import base

REVIVED = 256  # codes at most in a step
LEAST_VARIANCE = 1e-10  # of a channel that the affine map divides by


class VQ(base.Nearest):
  """The nearest of `num_codes` codes.

  Attributes:
    num_codes: K, the size of the codebook. At least 1 code.
    code_dim: c, the width of a code; None for the latents' width. At least 1
      channel, or None.
    update: what moves the codes: a moving average of their tokens, or the
      codebook loss. One of "ema", "gradient".
    decay: g of the moving average, usually .95 to .999. In [0, 1).
    epsilon: of the Laplace smoothing of counts. Above 0.
    data_init: with "ema", whether codes start at tokens of the first batch;
      "kmeans++" at tokens far from one another. One of True, False, "kmeans++".
    distance: how tokens and codes are compared; "cosine" makes both unit
      vectors. One of "l2", "cosine".
    revive_below: with "ema", the average count below which a code is revived,
      as a share of the mean (tokens of a step / num_codes); 0 for never. With
      decay .99, a code with the mean count that stops winning tokens falls to
      .1 of it within 230 steps. In [0, 1).
    affine: whether codes follow the tokens' mean and variance, averages of
      `decay` that start at the first batch.
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
  affine: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.revive_below < 1:
      raise UserError(
        f'quantizer.revive_below={self.revive_below} must lie in [0, 1)'
      )
    if not 0 <= self.decay < 1:
      raise UserError(f'quantizer.decay={self.decay} must lie in [0, 1)')
    if self.affine and self.distance != 'l2':
      raise UserError(
        f'quantizer.affine=True needs quantizer.distance="l2": tokens of '
        f'"{self.distance}" are unit vectors as they are'
      )

  @property
  def loss_names(self):
    moved = ('codebook', 'orthogonal') if self.update == 'gradient' else ()
    return ('commit', 'entropy', 'diversity', *moved)

  @property
  def ema_tables(self):
    if self.update == 'ema':
      return ('codes',)
    return ('token_mean', 'token_var') if self.affine else ()

  @property
  def draws(self):
    return self.update == 'ema' and self.revive_below > 0

  def setup_codes(self):
    shape = (self.num_codes, self.code_width)
    if self.affine:
      for name, init in (('token_mean', jnp.zeros), ('token_var', jnp.ones)):
        self.variable('codebook', name, init, shape[1:], jnp.float32)
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
    fixed = self.distance == 'l2' and not self.affine
    if fixed or self.update == 'ema':
      return self.codes
    if self.has_variable('codebook', 'codes'):  # baked
      return self.get_variable('codebook', 'codes')
    codes = self._to_codes(self._compared(self.codes), self._map())
    # The rows are bitwise the same in every program that reads them.
    return jax.lax.optimization_barrier(codes)

  def _map(self) -> dict[str, Array]:
    """The affine map's variables."""
    return dict(self.variables['codebook']) if self.affine else {}

  def _to_codes(self, signals, at):
    """f32[... c] in units of the tokens' mean and variance `at` -> codes."""
    if not self.affine:
      return signals
    # Separate from the sum: fused, the two would round once, to another value.
    scaled = jax.lax.optimization_barrier(signals * _std(at))
    return scaled + at['token_mean']

  def _to_signals(self, codes, at):
    """The inverse of `_to_codes`; of tokens too."""
    if not self.affine:
      return codes
    return (codes - at['token_mean']) / _std(at)

  def _stats(self, z, indices, train):
    stats = super()._stats(z, indices, train)
    if not train:
      return stats
    z = self._to_signals(jax.lax.stop_gradient(z), self._map())
    if self.update == 'ema':
      stats['sums'] = code_ops.sum_by_code(z, indices, self.num_codes)[None]
    if self.affine:
      z = jnp.where(indices[..., None] < 0, 0, z).reshape(-1, z.shape[-1])
      stats['moments'] = jnp.stack([z.sum(0), (z * z).sum(0)])[None]
    return stats

  def _tokens(self, z, codes, random):
    if not self.draws:
      return None
    halfway = jax.lax.stop_gradient(0.5 * (z + codes))
    flat = halfway.reshape(len(z), -1, z.shape[-1])

    def drawn(key, tokens):
      return tokens[jax.random.randint(key, (), 0, len(tokens))]

    return jax.vmap(drawn)(random['samples'], flat)

  def init_codebook(self, codebook, z, rng, tokens=None):
    """Codes start at tokens of the batch, the affine map at their mean and
    variance; codes that do not start at tokens are mapped by it."""
    z, at = self._compared(z), {}
    if self.affine:
      at = {'token_mean': z.mean(0), 'token_var': z.var(0)}
    if self.update != 'ema':
      return at or codebook
    if not self.data_init:
      if not at:
        return codebook
      return self._fresh_average(self._to_codes(codebook['codes'], at), at)
    start = base.init_codes_from_data
    if self.data_init == 'kmeans++':
      start = base.spread_codes
    codes = self._compared(start(z, self.num_codes, rng))
    count = 1.0
    if self.revive_below:
      count = self._least(tokens or len(z)) + 1 - self.decay
    return self._fresh_average(codes, at, count)

  def _least(self, tokens):
    """The average count below which a code is idle, at `tokens` per step."""
    return self.revive_below * tokens / self.num_codes

  def _fresh_average(self, codes, at, count=1.0):
    counts = jnp.full(self.num_codes, count, jnp.float32)
    # They must not share a buffer: both are donated to the step.
    sums = count * self._to_signals(codes, at)
    return {'codes': codes, 'counts': counts, 'sums': sums, **at}

  def training_codebook(self, tables):
    """An average that starts at the codes; its own state is not on disk."""
    at = super().training_codebook(tables)
    if self.update != 'ema':
      return at
    return self._fresh_average(jnp.asarray(tables['codes']), at)

  def rescale_average(self, codebook, indices):
    """So that no code is idle because another batch was larger, and codes move
    no faster than `decay` says."""
    if self.update != 'ema':
      return codebook
    scale = indices / codebook['counts'].sum()
    return codebook | {n: scale * codebook[n] for n in ('counts', 'sums')}

  def _moved_map(self, codebook: dict, stats: dict) -> dict[str, Array]:
    """The affine map after a step."""
    if not self.affine:
      return {}
    g, n = self.decay, stats['counts'][0].sum().astype(jnp.float32)
    mean, squares = stats['moments'][0] / jnp.maximum(n, 1)
    std, var = _std(codebook), squares - mean**2  # in units of the old map
    new = {
      'token_mean': codebook['token_mean'] + (1 - g) * std * mean,
      'token_var': g * codebook['token_var'] + (1 - g) * std**2 * var,
    }
    return {
      name: jnp.where(n > 0, x, codebook[name]) for name, x in new.items()
    }

  def update_codebook(self, codebook, stats):
    new_map = self._moved_map(codebook, stats)
    if self.update != 'ema':
      return new_map or codebook
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
    codes = self._to_signals(codebook['codes'], codebook)
    codes = jnp.where(won, moved, codes)
    if 'tokens' in stats:
      least = self._least(count.sum())
      idle, new = counts < least, least + 1 - g
      tokens = self._compared(stats['tokens'][:REVIVED, 0])
      tokens = self._to_signals(tokens, codebook)
      place = jnp.cumsum(idle) - 1  # among the idle ones
      revived = (idle & (place < len(tokens)))[:, None]
      fresh = tokens[jnp.minimum(place, len(tokens) - 1)]
      codes = jnp.where(revived, fresh, codes)
      counts = jnp.where(revived[:, 0], new, counts)
      sums = jnp.where(revived, new * fresh, sums)
    codes = self._to_codes(codes, new_map)
    return {'codes': codes, 'counts': counts, 'sums': sums, **new_map}


def _std(at: dict) -> Array:
  return jnp.sqrt(jnp.maximum(at['token_var'], LEAST_VARIANCE))
