"""The encoders that a config may name: specs, weight tables, hub repositories.

A row holds an `EncoderSpec`'s fields under its published name, in lower case
and without its owner. A family is one file: its rows, the key formats of its
files (`KEY_FORMATS`), and the reader of its `config.json` (`fields`).
`tests/golden/encoder_params.json` pins exact parameter counts. No modules are
built and no file is opened here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import (
  clip,
  converted,
  dinov2,
  dinov3,
  internvit,
  mae,
  siglip,
)
from vqrae_jax.encoders.naming import KeyFormat, Shapes
from vqrae_jax.errors import UserError

_FAMILIES = (siglip, dinov2, dinov3, mae, internvit, clip)
ENCODERS = {name: row for f in _FAMILIES for name, row in f.ROWS.items()}
# CLIP first: its files also match the signatures of SigLIP and InternViT.
KEY_FORMATS = tuple(
  key_format
  for family in (clip, *_FAMILIES[:-1], converted)
  for key_format in family.KEY_FORMATS
)

# config.json's model_type -> its reader.
_READERS = {
  'siglip_vision_model': siglip.fields,
  'siglip2_vision_model': siglip.fields,
  'dinov2': dinov2.fields,
  'dinov2_with_registers': dinov2.fields,
  'dinov3_vit': dinov3.fields,
  'vit_mae': mae.fields,
  'intern_vit_6b': internvit.fields,
  'internvl_vision': internvit.fields,
  'clip_vision_model': clip.fields,
}
# model_type of a model with an encoder in it -> that of its "vision_config".
_AROUND = {
  'siglip': 'siglip_vision_model',
  'siglip2': 'siglip2_vision_model',
  'internvl_chat': 'intern_vit_6b',
  'internvl': 'internvl_vision',
  'clip': 'clip_vision_model',
}


def key_format(shapes: Shapes, where: str) -> KeyFormat:
  """The first format that matches a file's keys.

  Args:
    shapes: {the file's key: shape}.
    where: the file, for the error.

  Raises:
    UserError: the keys are of no supported family.
  """
  for found in KEY_FORMATS:
    if found.matches(shapes):
      return found
  names = ', '.join(f.name for f in KEY_FORMATS)
  raise UserError(
    f'could not identify the encoder family from the keys in {where}; '
    f'supported: {names}'
  )


def fields_of(config: Mapping[str, Any], where: str) -> dict:
  """An `EncoderSpec`'s fields from a published `config.json`.

  Raises:
    UserError: an unsupported model_type, or a value that is unsupported or of
      the wrong type.
  """
  # diffusers' models have a "_class_name" in its place.
  kind = str(config.get('model_type') or config.get('_class_name'))
  try:
    if kind in _AROUND:
      kind = _AROUND[kind]
      config = dict(config.get('vision_config') or {}) | {'model_type': kind}
    if kind not in _READERS:
      raise UserError(
        f'"{kind}" is not the model_type of a supported encoder; supported: '
        f'{", ".join(sorted((*_READERS, *_AROUND)))}'
      )
    return _READERS[kind](config)
  except UserError as e:
    raise UserError(f'{where}: {e}') from None
  except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
    raise UserError(f'{where} cannot be read as a {kind} config: {e}') from None


@dataclasses.dataclass(frozen=True)
class Published:
  """A repository of the Hugging Face hub.

  No revision is pinned: a repository's files are taken as the hub has them,
  or at "@REV", and the commit found is recorded.

  Attributes:
    hub: ORG/NAME.
    licence: of the weights, as the repository states it; read it there before
      relying on it.
  """

  hub: str
  licence: str


_MAE_LICENCE = "see the hub's page; the authors' repository is CC BY-NC 4.0"
_CLIP_LICENCE = "see the hub's page; the authors' repository is MIT"
# Last updated 2025-08-19; `docs/encoders.md` says what is in it.
_DINOV3_LICENCE = (
  "DINOv3 License, Meta's own: "
  'https://ai.meta.com/resources/models-and-libraries/dinov3-license'
)
# First part of a row's name -> (owner on the hub, licence).
_OWNERS = {
  'siglip2': ('google', 'Apache-2.0'),
  'siglip': ('google', 'Apache-2.0'),
  'dinov2': ('facebook', 'Apache-2.0'),
  'dinov3': ('facebook', _DINOV3_LICENCE),
  'vit': ('facebook', _MAE_LICENCE),
  'internvit': ('OpenGVLab', 'MIT'),
}


def _published(name: str) -> Published:
  family = name.split('-')[0]
  if family == 'clip':
    hub = clip.HUBS[name]
    return Published(hub, 'MIT' if hub.startswith('laion/') else _CLIP_LICENCE)
  owner, licence = _OWNERS[family]
  if family == 'internvit':  # the one whose repositories have capitals
    for low, high in (
      ('internvit', 'InternViT'), ('300m', '300M'), ('6b', '6B'), ('-v', '-V')
    ):  # fmt: skip
      name = name.replace(low, high)
  return Published(f'{owner}/{name}', licence)


# Row's name -> its repository.
PUBLISHED = {name: _published(name) for name in ENCODERS}


def row_of(hub: str) -> str | None:
  """The row that a hub id names, case ignored; None if there is none."""
  return next(
    (n for n, p in PUBLISHED.items() if p.hub.lower() == hub.lower()), None
  )
