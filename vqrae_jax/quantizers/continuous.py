"""No quantisation: the continuous autoencoder (RAE, arXiv 2510.11690).

Latents pass through unchanged; there are no indices, codes equal latents. The
same config, trainer and decoder then train a continuous tokenizer.
"""

from vqrae_jax.errors import UserError
from vqrae_jax.quantizers import base
from vqrae_jax.types import QuantizerOutput


class Continuous(base.Quantizer):
  """Passes latents on.

  Attributes:
    code_dim: a linear bottleneck's width with `projection`; None for d.
  """

  projection: bool = False
  code_dim: int | None = None

  def __post_init__(self):
    if self.code_dim is not None and self.code_dim < 1:
      raise UserError(f'quantizer.code_dim={self.code_dim} must be above 0')
    super().__post_init__()

  @property
  def codebook_size(self):
    return 0

  @property
  def code_width(self):
    return self.code_dim or self.latent_dim

  def __call__(self, latents, *, train=False, rngs=None):
    """Latents f[... d] as `codes` f32[... c]; no indices."""
    codes = self.to_code_space(latents)
    return QuantizerOutput(
      z_q=self.tail(codes), codes=codes, indices=None, losses={}, stats={}
    )

  def _no_indices(self):
    raise UserError(
      'this tokenizer is continuous (quantizer "none") and has no indices; '
      'use encode for its latents'
    )

  def latents_to_indices(self, latents):
    self._no_indices()

  def indices_to_codes(self, indices):
    self._no_indices()

  def codes_to_indices(self, codes):
    self._no_indices()
