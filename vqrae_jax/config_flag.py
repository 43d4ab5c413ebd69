"""The flag `--config=F.py:args --config.a.b=v` of the commands that take a run.

A file is found as given or as installed, and an override names a key that is
there, else the nearest one is named.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from vqrae_jax import command
from vqrae_jax.errors import UserError, did_you_mean


def find_config(path: str) -> str:
  """The config file that `path` names: as given, or as installed.

  Its folder's parent goes first on `sys.path`, so that a config's
  `from configs import common` finds the `configs` it lies in.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    root = pathlib.Path(__file__).resolve().parents[1]
    installed = root / file
    if not installed.is_file():
      known = [f'configs/{p.name}' for p in (root / 'configs').glob('[!_]*.py')]
      raise UserError(f'no config at "{path}"{did_you_mean(path, known)}')
    file = installed
  home = str(file.resolve().parents[1])
  if home not in sys.path[:1]:
    sys.path.insert(0, home)
    sys.modules.pop('configs', None)
  return str(file)


def resolved(argv: list[str]) -> list[str]:
  """argv with the config's path resolved, its `:args` kept."""
  out, words = [], iter(argv)
  for word in words:
    if word in ('--config', '-config'):  # the value is the next word
      word = f'{word}={next(words, "")}'
    if word.startswith(('--config=', '-config=')):
      path, colon, args = word.split('=', 1)[1].partition(':')
      word = f'--config={find_config(path)}{colon}{args}'
    out.append(word)
  return out


def parse(
  argv: list[str],
  module: str,
  example: str,
  about: str,
  define: Callable[[flags.FlagValues], None],
) -> flags.FlagValues:
  """The parsed flags of `python -m module`, --config among them.

  Args:
    argv: without the program.
    about: what --help says of --config.
    define: adds the command's other flags.

  Raises:
    UserError: an unknown flag or key, or a bad value.
  """
  from ml_collections import config_flags

  def values_of(words):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
      'config',
      None,
      about,
      flag_values=values,
      # Or it would look for --config.a.b=v in the process's own arguments.
      sys_argv=[module, *words],
    )
    define(values)
    command.parse(values, words, module, example)
    return values

  argv = resolved(argv)
  own = [w for w in argv if not w.lstrip('-').startswith('config.')]
  values = values_of(own)
  if values.config is None:
    return values
  # As its file says first, to see that each override has its key.
  _check_overrides(values.config, argv)
  return values_of(argv)


def _check_overrides(config: Any, argv: list[str]) -> None:
  """Every --config.a.b=v names a key that the config has."""
  for word in argv:
    dotted = word.lstrip('-').split('=')[0]
    if not (word.startswith('-') and dotted.startswith('config.')):
      continue
    node, path = config, 'config'
    for key in dotted.split('.')[1:]:
      keys = list(node.keys()) if hasattr(node, 'keys') else []
      if key not in keys:
        raise UserError(
          f'unknown key "{path}.{key}"{did_you_mean(key, keys)} (others are '
          "set in the config's file)"
          if keys
          else f'"{path}" has no keys, so no "{path}.{key}"'
        )
      node, path = node[key], f'{path}.{key}'
