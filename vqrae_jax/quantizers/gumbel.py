"""Gumbel-softmax (arXiv 1611.01144): a code drawn from learned logits.

Logits are a linear map of a token, one per code. In training the code is the
argmax of logits plus Gumbel noise, a sample from their softmax. The logits get
the gradient of softmax((logits + noise) / temperature) times the table, and the
code's row of the table gets the gradient of the code. At inference the code is
the argmax of the logits.

The temperature is an argument of the call; a run's `temperature` section sets
its schedule. The noise of each token is drawn from its sample's key.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.ops import codes as code_ops
from vqrae_jax.quantizers import base


def _token_keys(keys: Array, tokens: int) -> Array:
  """Keys [b] -> [b tokens], of each token of each sample."""
  of_sample = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(of_sample, (0, None))(keys, jnp.arange(tokens)).reshape(-1)


class Gumbel(base.TableQuantizer):
  """One of `num_codes` rows of a learned table, by logits.

  The loss "kl" is the divergence of a token's softmax from the uniform
  distribution over codes: log K minus its entropy, averaged over tokens.

  Attributes:
    num_codes: K, the size of the codebook. At least 1 code.
    code_dim: c, the width of a code; None for the latents' width. At least 1
      channel, or None.
  """

  loss_names = ('kl',)
  positive = ('num_codes', 'code_dim')

  projection: bool | str = False
  num_codes: int = 8192
  code_dim: int | None = None

  @property
  def draws(self):
    return True

  def setup_codes(self):
    shape = (self.num_codes, self.code_width)
    self.codes = self.param('codes', nn.initializers.normal(1.0), shape)
    # Not a submodule: it is read inside loops and checkpoints.
    init = nn.initializers.lecun_normal()
    self.kernel = self.param('kernel', init, shape[::-1])
    self.bias = self.param('bias', nn.initializers.zeros, shape[:1])

  def _table(self):
    return self.codes

  def _logits(self, tokens):
    """f32[n c] -> f32[n k]."""
    return jnp.matmul(tokens, self.kernel, precision='highest') + self.bias

  def _assign(self, z, train, random):
    shape, c = z.shape[:-1], z.shape[-1]
    n, k = math.prod(shape), self.num_codes
    tokens = z.reshape(n, c)
    if not train:

      def choose(tokens, counted):
        return jnp.argmax(self._logits(tokens), -1).astype(jnp.int32)

      indices = code_ops.by_chunk(choose, k, tokens)
      return z, code_ops.in_order(indices, n).reshape(shape)

    keys, temperature = None, 1.0
    if random:
      temperature = random.get('temperature', temperature)
      keys = _token_keys(random['samples'], math.prod(shape[1:]))
    table = jax.lax.stop_gradient(self.codes)

    def sample(tokens, *rest):
      logits = self._logits(tokens)
      if keys is not None:
        draw = lambda key: jax.random.gumbel(key, (k,))  # noqa: E731
        key = jax.random.wrap_key_data(rest[0], impl=jax.random.key_impl(keys))
        logits = logits + jax.vmap(draw)(key)
      soft = jax.nn.softmax(logits / temperature)
      soft = jnp.matmul(soft, table, precision='highest')
      return soft, jnp.argmax(logits, -1).astype(jnp.int32)

    drawn = () if keys is None else (jax.random.key_data(keys),)
    soft, indices = (
      code_ops.in_order(x, n)
      for x in code_ops.by_chunk(sample, k, tokens, *drawn)
    )
    indices = indices.reshape(shape)
    # The base uses only its gradient, not its value.
    return soft.reshape(z.shape) + self._lookup(indices), indices

  def _regulariser(self, name, z, surrogate):
    tokens = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    entropy, _ = code_ops.entropies(self._logits, self.num_codes, tokens)
    return math.log(self.num_codes) - entropy
