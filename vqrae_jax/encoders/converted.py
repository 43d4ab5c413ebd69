"""A converted encoder: the key format and `config.json` of this package.

  config.json         format version, the spec's fields, its origin
  model.safetensors   every leaf under its own name, blocks stacked

The fields are those of an `EncoderSpec` without the run options (scan, remat,
dtype) and without the choice of outputs (`output_norm`, `layers`, …): the file
keeps all blocks and the final norm. `convert.py` writes the folder.
No file is opened here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.errors import UserError
from vqrae_jax.specs import LATER_FIELDS, RUN_OPTIONS, EncoderSpec, ViTSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

FORMAT_VERSION = 1
# A section that a tokenizer's config.json does not have.
KEY = 'encoder'


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """Every leaf of the file, unchanged."""
  rows: list = [Rule(name, name) for name in shapes]
  if why := spec.final_norm and naming.norm_unused(spec):
    rows.append(Ignore('norm/.*', why))
  return Table(tuple(rows), ())


KEY_FORMATS = (naming.KeyFormat('this package', f'^{BLOCKS}', table),)
_CHOICE = {'output_norm', 'layers', 'fuse', 'add_final_mean'}
_LEFT_OUT = {*_CHOICE, *(f'vit.{name}' for name in RUN_OPTIONS)}
_FIELDS = {
  *(f.name for f in dataclasses.fields(EncoderSpec)),
  *(f'vit.{f.name}' for f in dataclasses.fields(ViTSpec)),
} - _LEFT_OUT
# May be missing: older files have their defaults.
_LATER = {*LATER_FIELDS, *(f'vit.{name}' for name in LATER_FIELDS)}


def describe(spec: EncoderSpec) -> dict[str, Any]:
  """The section that `fields` reads."""
  section = dataclasses.asdict(spec)
  for name in _CHOICE:
    del section[name]
  for name in RUN_OPTIONS:
    del section['vit'][name]
  return section


def fields(config: Mapping[str, Any], folder: str) -> dict:
  """A spec's fields from our `config.json`, all but `LATER_FIELDS` required.

  Args:
    config: the file's content, with a "format_version".
    folder: its folder, for the errors.

  Raises:
    UserError: the config of a tokenizer or of another format version, or a
      damaged one.
  """
  if KEY not in config:
    raise UserError(f'{folder} is a tokenizer; load_tokenizer opens it')
  if config['format_version'] != FORMAT_VERSION:
    raise UserError(
      f'{folder} has encoder format version {config["format_version"]}, this '
      f'package reads {FORMAT_VERSION}; install the version that wrote it'
    )
  section, keys = config[KEY], set()
  if isinstance(section, Mapping) and isinstance(section.get('vit'), Mapping):
    keys = {*section, *(f'vit.{key}' for key in section['vit'])}
  wrong = keys - _FIELDS or _FIELDS - keys - _LATER
  if wrong:
    fault = 'unknown' if keys - _FIELDS else 'missing'
    raise UserError(
      f'{folder}/config.json is damaged or was edited: the key '
      f'"{KEY}.{min(wrong)}" is {fault}; convert the encoder again'
    )
  return dict(section)
