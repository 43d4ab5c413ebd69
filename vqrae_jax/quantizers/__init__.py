"""The quantizers that a config may name, and how one is built.

One file each, one idea, one arXiv number. The tokenizer cannot tell them
apart: `base.Quantizer` is the protocol.
"""

from collections.abc import Mapping

from vqrae_jax.errors import UserError, choose
from vqrae_jax.quantizers.base import Continuous, Quantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.gumbel import Gumbel
from vqrae_jax.quantizers.lfq import BSQ, LFQ
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.vq import VQ
from vqrae_jax.specs import build_spec

QUANTIZERS = {
  'fsq': FSQ,
  'lfq': LFQ,
  'bsq': BSQ,
  'vq': VQ,
  'simvq': SimVQ,
  'gumbel': Gumbel,
  'none': Continuous,
}


def build(section: Mapping, latent_dim: int, dtype: str) -> Quantizer:
  """The quantizer that `section` names, for latents of `latent_dim`.

  Args:
    section: dict(name=…, **its fields), a name of `QUANTIZERS`.
    latent_dim: the encoder's width.
    dtype: of its map from codes to latents.

  Raises:
    UserError: an unknown name or field.
  """
  fields = {k: v for k, v in section.items() if k != 'name'}
  cls = choose(QUANTIZERS, section.get('name', ''), 'quantizer')
  for key in ('latent_dim', 'dtype'):
    if key in fields:
      raise UserError(
        f'model.quantizer.{key} is not set here: it follows '
        f'{"the encoder" if key == "latent_dim" else "model.dtype"}'
      )
  fields = dict(latent_dim=latent_dim, dtype=dtype) | fields
  return build_spec(cls, fields, 'model.quantizer')


def name_of(quantizer: Quantizer) -> str:
  """The table's name of a quantizer's class."""
  return next(n for n, c in QUANTIZERS.items() if type(quantizer) is c)
