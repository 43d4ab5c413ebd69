"""The encoders that a config may name: specs and weight tables, no modules.

A row holds an `EncoderSpec`'s fields under the name it was published by, in
lower case and without its owner; a family is one file: its rows, how its
files name leaves (`NAMINGS`), and how its `config.json` is read (`fields`).
Where rows come from stands in `published.py`. Exact parameter counts are
pinned in `tests/golden/encoder_params.json`. No file is opened here.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import (
  converted,
  dinov2,
  internvit,
  mae,
  siglip,
  siglip2,
)
from vqrae_jax.encoders.naming import KeyFormat, Shapes
from vqrae_jax.errors import UserError, did_you_mean

ENCODERS = {
  **siglip.ROWS,
  **siglip2.ROWS,
  **dinov2.ROWS,
  **mae.ROWS,
  **internvit.ROWS,
}

NAMINGS = (
  *siglip.NAMINGS,
  *dinov2.NAMINGS,
  *mae.NAMINGS,
  *internvit.NAMINGS,
  *converted.NAMINGS,
)

# config.json's model_type -> its reader.
MODEL_TYPES = {
  'siglip_vision_model': siglip.fields,
  'siglip2_vision_model': siglip.fields,
  'dinov2': dinov2.fields,
  'dinov2_with_registers': dinov2.fields,
  'vit_mae': mae.fields,
  'intern_vit_6b': internvit.fields,
  'internvl_vision': internvit.fields,
}
# A model around an encoder -> the encoder's type, its own section.
_AROUND = {
  'siglip': 'siglip_vision_model',
  'siglip2': 'siglip2_vision_model',
  'internvl_chat': 'intern_vit_6b',
  'internvl': 'internvl_vision',
}


def naming_of(shapes: Shapes, where: str) -> KeyFormat:
  """Whose names a file's keys are.

  Args:
    shapes: {the file's key: shape}.
    where: the file, for the error.

  Raises:
    UserError: no family's.
  """
  for naming in NAMINGS:
    if naming.tells(shapes):
      return naming
  known = ', '.join(n.name for n in NAMINGS)
  raise UserError(f'{where} has no key that tells an encoder; known: {known}')


def fields_of(config: Mapping[str, Any], where: str) -> dict:
  """An `EncoderSpec`'s fields out of a model's `config.json`.

  Raises:
    UserError: a type that is not known, or a number that is none.
  """
  kind = config.get('model_type')
  if kind in _AROUND:
    config = dict(config.get('vision_config') or {})
    config['model_type'] = kind = _AROUND[kind]
  if kind not in MODEL_TYPES:
    known = [*MODEL_TYPES, *_AROUND]
    raise UserError(
      f'{where}: model_type {kind!r} is no encoder known here'
      f'{did_you_mean(kind, known)}'
    )
  try:
    return MODEL_TYPES[kind](config)
  except UserError as e:
    raise UserError(f'{where}: {e}') from None
  except (TypeError, ValueError, AttributeError) as e:
    raise UserError(f'{where} cannot be read as a {kind} ({e})') from None
