"""Encoders as they lie inside a checkpoint of the PyTorch project.

The families' own tables, behind the project's prefixes: SigLIP (fixed sizes)
and DINOv2, as transformers names their leaves.
"""

import dataclasses

from vqrae_jax.encoders import dinov2, siglip
from vqrae_jax.errors import UserError
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import PREFIXES, Table

# A family's table, and what stands before its names in a whole model.
_FAMILIES = {
  'siglip': (siglip.table, 'encoder.model.'),
  'dinov2': (dinov2.table, 'encoder.encoder.'),
}


def _family(spec: EncoderSpec) -> str:
  s = spec.vit
  if s.layer_scale is not None and s.num_prefix_tokens and spec.final_norm:
    return 'dinov2'
  plain = s.layer_scale is None and not s.num_prefix_tokens
  if plain and s.posemb == 'learned' and s.qkv_bias and not s.qk_norm:
    return 'siglip'
  raise UserError(
    "model.encoder is neither a SigLIP nor a DINOv2: the PyTorch project's "
    'checkpoints of other encoders cannot be converted yet'
  )


def encoder_table(spec: EncoderSpec) -> Table:
  """The rows of the encoder's family, prefixes of the project allowed.

  Raises:
    UserError: a family that the project's checkpoints are not read for.
  """
  table = _FAMILIES[_family(spec)][0](spec, {})
  # The wrappers around a family's own names, outermost first.
  prefixes = ('encoder.', 'model.', *PREFIXES)
  return dataclasses.replace(table, prefixes=prefixes)


def home(spec: EncoderSpec) -> str:
  """What stands before a family's names in the project's whole model."""
  return _FAMILIES[_family(spec)][1]
