"""Lookup-free quantization (arXiv 2310.05737): a code is the signs of its
channels, and its index the number that they spell, the last bit least.

`vqrae_jax.quantizers` has one with more fields; this shows how short one is.
"""

import jax
import jax.numpy as jnp

from vqrae_jax.quantizers import Quantizer


def entropy(p):
  """Of coins that show 1 with probability p, nats."""
  p = jnp.clip(p, 1e-6, 1 - 1e-6)  # beyond it no gradient, and no NaN
  return -(p * jnp.log(p) + (1 - p) * jnp.log(1 - p))


class LFQ(Quantizer):
  """Codes are +-1 in each of `bits` channels; K is 2^bits."""

  loss_names = ('commit', 'entropy')  # a config may weigh these
  training_fields = ('temperature',)
  positive = ('bits', 'temperature')

  bits: int = 12
  temperature: float = 1.0  # of a bit's softmax in "entropy"

  @property
  def codebook_size(self):
    return 2**self.bits

  @property
  def code_width(self):
    return self.bits

  def _assign(self, z, train, random):
    return z, self.codes_to_indices(z)

  def _lookup(self, indices):
    digits = indices[..., None] >> jnp.arange(self.bits)[::-1] & 1
    return 2.0 * digits.astype(jnp.float32) - 1.0

  def codes_to_indices(self, codes):
    digits = (codes > 0).astype(jnp.int32)
    return (digits << jnp.arange(self.bits)[::-1]).sum(-1)

  def _regulariser(self, name, z, surrogate):
    p = jax.nn.sigmoid(4 * surrogate / self.temperature).reshape(-1, self.bits)
    return entropy(p).sum(-1).mean() - entropy(p.mean(0)).sum()
