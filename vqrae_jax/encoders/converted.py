"""An encoder as this package stores it: one more naming, and its config.json.

  config.json         format version, the spec's fields, where it came from
  model.safetensors   every leaf under its own name, blocks stacked

The fields are all of an `EncoderSpec` but how it is run (scan, remat, dtype)
and `output_norm`: the final norm's weights are kept, and which norm is applied
is chosen at load. `convert.py` writes the folder. No file is opened here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqrae_jax.encoders import naming
from vqrae_jax.encoders.naming import BLOCKS, Shapes
from vqrae_jax.errors import UserError
from vqrae_jax.specs import LATER_FIELDS, RUN_OPTIONS, EncoderSpec, ViTSpec
from vqrae_jax.weights import Rule, Table, ignore

FORMAT_VERSION = 1
# The section of config.json that a tokenizer's does not have.
KEY = 'encoder'

_KERNELS = (
  'embed/linear',
  *(f'{BLOCKS}attention/{n}' for n in ('query', 'key', 'value', 'out')),
  *(f'{BLOCKS}mlp/{n}' for n in ('gate', 'fc1', 'fc2')),
)
_NORMS = (f'{BLOCKS}norm1', f'{BLOCKS}norm2')
LEAVES = (
  'embed/positions',
  'embed/prefix',
  'embed/prefix_positions',
  'embed/registers',
  *(f'{at}/{leaf}' for at in _KERNELS for leaf in ('kernel', 'bias')),
  *(f'{at}/{leaf}' for at in _NORMS for leaf in ('scale', 'bias')),
  *(f'{BLOCKS}attention/{n}_norm/scale' for n in ('query', 'key')),
  *(f'{BLOCKS}scale{n}' for n in '12'),
)
_LAST = ('norm/scale', 'norm/bias')


def table(spec: EncoderSpec, shapes: Shapes) -> Table:
  """Every leaf that an encoder may have, as it is."""
  del shapes
  rows: list = [Rule(name, name) for name in LEAVES]
  if why := spec.final_norm and naming.NORMS[spec.output_norm]:
    rows.append(ignore('norm/.*', why))
  else:
    rows += [Rule(name, name) for name in _LAST]
  return Table(tuple(rows), ())


NAMINGS = (naming.KeyFormat('this package', f'^{BLOCKS}', table),)


def _without(cls: type, left_out: tuple[str, ...]) -> set[str]:
  return {f.name for f in dataclasses.fields(cls)} - set(left_out)


_FIELDS = _without(EncoderSpec, ('output_norm',))
_VIT_FIELDS = _without(ViTSpec, RUN_OPTIONS)


def describe(spec: EncoderSpec) -> dict[str, Any]:
  """The section that `fields` reads."""
  section = {k: v for k, v in dataclasses.asdict(spec).items() if k in _FIELDS}
  vit = {k: v for k, v in section['vit'].items() if k in _VIT_FIELDS}
  return section | {'vit': vit}


def fields(config: Mapping[str, Any], folder: str) -> dict:
  """A spec's fields out of our `config.json`; every one must be there.

  Args:
    config: what the file holds, a "format_version" among it.
    folder: where it lies, for the errors.

  Raises:
    UserError: a tokenizer's, another version's, or a damaged one.
  """
  if KEY not in config:
    raise UserError(f'{folder} is a tokenizer; load_tokenizer opens it')
  if config['format_version'] != FORMAT_VERSION:
    raise UserError(
      f'{folder} has format version {config["format_version"]} of encoders, '
      f'this package reads {FORMAT_VERSION}; install the version that wrote it'
    )
  section = config[KEY]
  vit = section.get('vit') if isinstance(section, Mapping) else None
  if not isinstance(vit, Mapping):
    raise UserError(
      f'{folder}/config.json is damaged: "{KEY}" is no section with a "vit"; '
      'convert the encoder again'
    )
  for have, want, at in ((section, _FIELDS, KEY), (vit, _VIT_FIELDS, 'vit')):
    missing = sorted(want - have.keys() - LATER_FIELDS.keys())
    unknown = sorted(have.keys() - want)
    if missing or unknown:
      fault = f'no key "{missing[0]}"' if missing else f'a key "{unknown[0]}"'
      raise UserError(
        f'{folder}/config.json is damaged or was edited: its section "{at}" '
        f'has {fault}; convert the encoder again'
      )
  return dict(section)
