"""Every name of the package that the contract reads beside the public API.

Golden files hold what a user has; how the test gets at it stands here alone,
so that a moved or renamed module changes one line of this file.
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import vqrae_jax
from vqrae_jax import (
  convert,
  export,
  fetch_weights,
  latent_stats,
  reconstruct_images,
  specs,
)
from vqrae_jax.data import pipeline, sources
from vqrae_jax.encoders import ENCODERS
from vqrae_jax.losses import (
  FROZEN_TERMS,
  IMAGE_TERMS,
  LATENT_TERMS,
  adversarial,
)
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.models.tokenizer import describe
from vqrae_jax.nn import discriminators
from vqrae_jax.pretrained import networks
from vqrae_jax.quantizers import QUANTIZERS
from vqrae_jax.train import __main__ as train_main
from vqrae_jax.train import checkpoint, initialize, loop, setup
from vqrae_jax.train import config as config_lib

COMMANDS = {
  'train': train_main.main,
  'reconstruct_images': reconstruct_images.main,
  'convert': convert.main,
  'fetch_weights': fetch_weights.main,
  'latent_stats': latent_stats.main,
}
CHOICES = {
  'encoder': ENCODERS,
  'decoder': [*DECODERS, 'symmetric'],
  'quantizer': QUANTIZERS,
  'loss': [*IMAGE_TERMS, *FROZEN_TERMS, *LATENT_TERMS, 'gan'],
  'discriminator': discriminators.DISCRIMINATORS,
}
# Sections of a config as the classes that hold their keys and defaults.
_SECTIONS = {
  '': config_lib.RunConfig,
  'losses.*': config_lib.LossTerm,
  'losses.distill': config_lib.DistillTerm,
  'losses.gan': config_lib.GanTerm,
  'schedules.*': config_lib.Schedule,
  'model.encoder': specs.EncoderSpec,
  'model.decoder': specs.DecoderSpec,
  'model.latents': specs.LatentsSpec,
  **{f'model.quantizer.{n}': c for n, c in QUANTIZERS.items()},
  **{
    f'discriminator.fields.{n}': c
    for n, c in discriminators.DISCRIMINATORS.items()
  },
}

save_tokenizer = export.save_tokenizer
discriminator = discriminators.build


def train(config: Any, workdir: pathlib.Path) -> None:
  """A whole run, its discriminator's fakes clipped but not rounded to 8 bits:
  a value between two levels falls to either by its last bit."""
  with mock.patch.object(
    adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0.0, 1.0)
  ):
    loop.train(config, workdir)


def loss_network(term: str, key: Any) -> Any:
  """The arrays of a loss's frozen network, drawn from `key`."""
  return networks.random(term, key)


def initial_state(config: Any) -> dict[str, Any]:
  """{leaf name: array} of a run's state at step 0, by a checkpoint's names."""
  made = setup.setup(config_lib.read_config(config))
  with jax.set_mesh(made.mesh):
    return checkpoint.as_leaves(initialize.initialize(made).state)


def checkpoint_leaves(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """{leaf name: "dtype [shape]"} of a checkpoint, as its manifest has them."""
  path = workdir / 'checkpoints' / f'{step:08d}' / '_CHECKPOINT_METADATA'
  leaves = json.loads(path.read_text())['custom_metadata']['leaves']
  return {name: f'{dtype} {shape}' for name, (shape, dtype) in leaves.items()}


def samples(
  data: str, augment: Mapping, *, steps: int, **options: Any
) -> list[list[tuple[str, np.ndarray]]]:
  """(image's name, its crop uint8 [h w 3]) of each row of the first batches.

  `options` are batch_size, seed, process_index and process_count.
  """
  source = sources.open_source(data)
  batches = pipeline.TrainBatches(
    source, pipeline.Augment(**augment), **options
  )
  found = []
  for _, batch in zip(range(steps), batches.iterate(0), strict=False):
    names = map(source.name, batch['photo'].tolist())
    found.append(list(zip(names, batch['images'], strict=True)))
  return found


def flags_of(help_text: str) -> dict[str, str | None]:
  """{flag: its default, None for none} out of what --help prints."""
  rows = re.findall(r'^ +--(?:\[no\])?(\w+)\b(.*)$', help_text, re.M)
  found = {}
  for name, text in rows:
    default = re.search(r'\(default: (.*)\)$', text)
    found[name] = default and default[1]
  return found


def recipe(name: str, arguments: str | None = None) -> Any:
  """The config of a file in `configs/`, with its `:arguments`."""
  return importlib.import_module(f'configs.{name}').get_config(arguments)


def resolved(config: Any) -> dict[str, Any]:
  """All that a config says, its defaults and names filled in."""
  spec = config_lib.read_config(config)
  tokenizer = vqrae_jax.build_tokenizer(spec.model)
  sections = _plain(spec)
  options = specs.RUN_OPTIONS
  sections['model'] = _plain(describe(tokenizer)) | {
    option: getattr(tokenizer.encoder_spec.vit, option) for option in options
  }
  sections['losses'] = _plain(spec.terms())
  sections['schedules'] = {
    str(i): {'leaves': regex, 'schedule': _plain(row)}
    for i, (regex, row) in enumerate(spec.schedule_rows())
  }
  if (player := spec.discriminator) is not None:
    module = discriminators.build({'name': player.name, **player.fields})
    sections['discriminator']['fields'] = _module_fields(module)
  return sections


def _module_fields(module: Any) -> dict[str, Any]:
  names = [f.name for f in dataclasses.fields(module)]
  names = [n for n in names if n not in ('parent', 'name')]
  return {n: _plain(getattr(module, n)) for n in names}


def _plain(value: Any) -> Any:
  """JSON's types alone."""
  if dataclasses.is_dataclass(value):
    names = (f.name for f in dataclasses.fields(value))
    return {n: _plain(getattr(value, n)) for n in names}
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value


def config_keys() -> dict[str, Any]:
  """{dotted key of a config: its default, "required" without one}."""
  found: dict[str, Any] = {}
  for prefix, kind in _SECTIONS.items():
    _add_keys(found, kind, f'{prefix}.' if prefix else '')
  return found


def _add_keys(found: dict, kind: type, prefix: str) -> None:
  hints = typing.get_type_hints(kind)
  module = 'parent' in hints
  follows = ('parent', 'name', 'latent_dim') if module else ()
  for field in dataclasses.fields(kind):
    if not field.init or field.name in follows:
      continue
    hint, name = hints[field.name], f'{prefix}{field.name}'
    inner = [
      k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)
    ]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    if inner:
      found |= {} if default is not None else {name: None}
      _add_keys(found, inner[0], f'{name}.')
    if dataclasses.is_dataclass(default):  # the section's own defaults
      found |= {f'{name}.{k}': v for k, v in _plain(default).items()}
    elif not inner:
      missing = default is dataclasses.MISSING
      found[name] = 'required' if missing else _plain(default)


def signatures() -> dict[str, list[str]]:
  """{public name: its parameters, none of a class}."""

  def parameters(value):
    return (
      [] if isinstance(value, type) else inspect.signature(value).parameters
    )

  names = vqrae_jax.__all__
  return {name: list(parameters(getattr(vqrae_jax, name))) for name in names}
