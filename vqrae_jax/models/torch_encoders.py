"""Encoders as they lie inside a checkpoint of the PyTorch project.

The families' own tables, behind the project's prefixes: SigLIP (fixed sizes),
DINOv2 (SwiGLU too), ViT-MAE and InternViT, as transformers' files name their
leaves. A file says by its keys whose names it has; on the way back the spec
says which names to write. The project itself has no InternViT: its place is
that of the other models there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vqrae_jax import encoders
from vqrae_jax.encoders import dinov2, internvit, mae, siglip
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.errors import UserError
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import PREFIXES, Table, export

# The wrappers around a family's own names, outermost first.
_PREFIXES = ('encoder.', 'model.', *PREFIXES)


@dataclasses.dataclass(frozen=True)
class _Family:
  """A family's names, and what stands before them in a whole model."""

  table: Callable[[EncoderSpec, Shapes], Table]
  home: str


_FAMILIES = {
  'SigLIP': _Family(siglip.table, 'encoder.model.'),
  'DINOv2': _Family(dinov2.table, 'encoder.encoder.'),
  'ViT-MAE': _Family(mae.table, 'encoder.model.'),
  'InternViT': _Family(internvit.hf_table, 'encoder.model.'),
}


def _family(spec: EncoderSpec) -> str:
  """Whose names a spec's leaves have; no spec is of two families."""
  s = spec.vit
  plain = s.norm == 'layer' and not s.qk_norm
  scaled = s.layer_scale is not None
  if s.posemb == 'learned' and not s.num_prefix_tokens:
    if plain and not scaled and s.qkv_bias:
      return 'SigLIP'
  elif s.posemb == 'learned' and s.prefix_has_posemb:
    one = s.num_prefix_tokens == 1 and not s.num_registers
    if scaled and plain and spec.final_norm:
      return 'DINOv2'
    if not scaled and plain and spec.final_norm and one:
      return 'ViT-MAE'
    if scaled and not spec.final_norm and one:
      return 'InternViT'
  raise UserError(
    "model.encoder is of no family that the PyTorch project's checkpoints are "
    f'written for: {", ".join(_FAMILIES)}; keep it as a tokenizer directory'
  )


def file_table(
  spec: EncoderSpec, shapes: Shapes, where: str
) -> tuple[Table, str]:
  """The rows for a file's own names, prefixes of the project allowed, and
  the names' name.

  Args:
    spec: the encoder to fill.
    shapes: {the file's key: shape}.
    where: the file, for the error.

  Raises:
    UserError: no family's names.
  """
  naming = encoders.naming_of(shapes, where)
  table = naming.table(spec, shapes)
  return dataclasses.replace(table, prefixes=_PREFIXES), naming.name


def export_encoder(leaves: dict, spec: EncoderSpec) -> dict[str, np.ndarray]:
  """{key in the project's whole model: array} of an encoder.

  DINOv2's mask token, which no tokenizer has and no latent needs, is written
  as it is drawn: zeros. SigLIP's pooling head is not written.

  Args:
    leaves: {leaf name under params/encoder: array}.
    spec: the encoder's.

  Raises:
    UserError: a family whose checkpoints are not written.
  """
  name = _family(spec)
  family = _FAMILIES[name]
  theirs = export(family.table(spec, {}), leaves)
  if name == 'DINOv2':
    width = spec.vit.width
    theirs['embeddings.mask_token'] = np.zeros((1, width), np.float32)
  return {family.home + key: x for key, x in theirs.items()}
