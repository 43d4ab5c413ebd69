"""Lookup-free quantization (arXiv 2310.05737), and BSQ (arXiv 2406.07548).

A code is the signs of its channels, so no table is searched or stored: a
channel above 0 is a 1 bit, and the last channel is the least significant bit.
LFQ's codes are +-1; BSQ ("bsq") puts tokens and codes on the unit sphere, where
the codes are +-1/sqrt(bits).

The entropy loss makes each token's choice confident and encourages the use of
all codes: it is the mean entropy of a token's softmax over codes, minus gamma
times the entropy of the tokens' mean softmax. A token's softmax is a product
over bits, so its entropy is exactly the sum of the bits' entropies. The entropy
of the mean is such a sum only if the bits are independent; `entropy_bits` says
how many are treated jointly.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.quantizers import base
from vqrae_jax.specs import at_least

TOGETHER = 12  # bits that LFQ's entropy takes together by default, at most


def _digits(indices: Array, bits: int) -> Array:
  strides = code_ops.radix_strides((2,) * bits, last_is_least=True)
  return code_ops.index_to_digits(indices, strides, (2,) * bits)


class LFQ(base.Quantizer):
  """The signs of `bits` channels; K is 2^bits.

  Attributes:
    bits: channels of a code. In [1, 30].
    entropy_bits: how many bits are grouped to compute a joint entropy, over
      2^entropy_bits codes for every token; a divisor of `bits`. The groups'
      entropies are summed. None: all bits up to 12 of them; one above 12, and
      for BSQ. At least 1, or None.
    entropy_gamma: in the loss "entropy", the weight of the entropy of the
      tokens' mean. At least 0.
    entropy_temperature: of the softmax over codes, whose scores are
      -distance^2 / temperature. Above 0.
  """

  spherical: ClassVar[bool] = False
  loss_names = ('commit', 'entropy')
  training_fields = ('entropy_bits', 'entropy_gamma', 'entropy_temperature')
  positive = ('bits', 'entropy_bits', 'entropy_temperature')

  bits: int = 14
  entropy_bits: int | None = None
  entropy_gamma: float = 1.0
  entropy_temperature: float = 0.01

  def __post_init__(self):
    super().__post_init__()
    at_least(0, 'quantizer.', self, 'entropy_gamma')
    base.check_size(f'quantizer.bits={self.bits}', 2 ** min(self.bits, 31))
    if self.bits % self._entropy_bits:
      raise UserError(
        f'quantizer.entropy_bits={self.entropy_bits} must divide '
        f'quantizer.bits={self.bits}'
      )

  @property
  def codebook_size(self):
    return 2**self.bits

  @property
  def code_width(self):
    return self.bits

  @property
  def _entropy_bits(self):
    if self.entropy_bits is not None:
      return self.entropy_bits
    return 1 if self.spherical or self.bits > TOGETHER else self.bits

  @property
  def _size(self):
    """The absolute value of a code's channels."""
    return np.float32(self.bits**-0.5 if self.spherical else 1)

  @property
  def levels(self) -> tuple[int, ...]:
    """The levels of each channel, as FSQ's."""
    return (2,) * self.bits

  def digits(self, indices: Array) -> Array:
    """i32[...] -> i32[... bits], each 0 or 1."""
    return _digits(indices, self.bits)

  def _codes(self, indices, bits):
    digits = _digits(indices, bits)
    return (2 * digits - 1).astype(jnp.float32) * self._size

  def _assign(self, z, train, random):
    z = code_ops.unit(z) if self.spherical else z
    return z, self.codes_to_indices(z)

  def _lookup(self, indices):
    return self._codes(indices, self.bits)

  def codes_to_indices(self, codes):
    strides = code_ops.radix_strides((2,) * self.bits, last_is_least=True)
    return code_ops.digits_to_index((codes > 0).astype(jnp.int32), strides)

  def _regulariser(self, name, z, surrogate):
    g = self._entropy_bits
    codes = self._codes(jnp.arange(2**g), g)
    groups = jnp.moveaxis(surrogate.reshape(-1, self.bits // g, g), 1, 0)
    tokens, spread = jax.vmap(
      lambda z: code_ops.code_entropies(z, codes, self.entropy_temperature)
    )(groups)
    return tokens.sum() - self.entropy_gamma * spread.sum()


class BSQ(LFQ):
  """LFQ on the unit sphere: codes are +-1/sqrt(bits) a channel."""

  spherical = True
