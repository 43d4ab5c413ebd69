"""python -m vqrae_jax.train --config=configs/quickstart.py

Flags and `jax.distributed` only; the run is in `loop.py`.
"""

import os
import pathlib
import sys
from typing import Any

from absl import flags

from vqrae_jax import command
from vqrae_jax.errors import UserError, did_you_mean

MODULE = 'vqrae_jax.train'
EXAMPLE = f'python -m {MODULE} --config=configs/quickstart.py'


def find_config(path: str) -> str:
  """The config file that `path` names: as given, or as installed.

  Its folder's parent goes first on `sys.path`, so that a config's
  `from configs import common` finds the `configs` it lies in.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    root = pathlib.Path(__file__).resolve().parents[2]
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


def check_overrides(config: Any, argv: list[str]) -> None:
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
          f'unknown key "{path}.{key}"{did_you_mean(key, keys)}'
          if keys
          else f'"{path}" has no keys, so no "{path}.{key}"'
        )
      node, path = node[key], f'{path}.{key}'


def _steps(profile: str | None) -> tuple[int, int] | None:
  if not profile:
    return None
  try:
    first, last = (int(n) for n in profile.split(':'))
  except ValueError:
    first, last = 0, -1
  if not 1 <= first <= last:
    raise UserError(f'--profile={profile} must be FIRST:LAST, two step numbers')
  return first, last


def _flags(argv: list[str], overrides: bool) -> flags.FlagValues:
  """The parsed flags; without overrides the config is as its file says."""
  from ml_collections import config_flags

  if not overrides:
    argv = [w for w in argv if not w.lstrip('-').startswith('config.')]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config',
    None,
    'the run: a file with get_config(), :args after it; --config.a.b=v changes '
    'a key that it has',
    flag_values=values,
    # Or it would look for --config.a.b=v in the process's own arguments.
    sys_argv=[MODULE, *argv],
  )
  flags.DEFINE_string(
    'workdir', None, 'where the run is left; runs/<config>', flag_values=values
  )
  flags.DEFINE_bool(
    'dry_run', False, 'one step, nothing written', flag_values=values
  )
  flags.DEFINE_string(
    'profile',
    None,
    'FIRST:LAST, steps of a jax.profiler trace in workdir/profile',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'distributed',
    'JAX_COORDINATOR_ADDRESS' in os.environ,
    'join the other hosts by jax.distributed.initialize(), which finds them '
    'itself on TPU pods and under Slurm',
    flag_values=values,
  )
  command.parse(values, argv, MODULE, EXAMPLE)
  return values


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, trains."""
  from ml_collections import config_flags

  values = _flags(argv := resolved(argv), overrides=False)
  if values.config is not None:
    check_overrides(values.config, argv)
    values = _flags(argv, overrides=True)
  command.required(values, 'config')
  if values.workdir == '':
    raise UserError('flag --workdir is empty; name a folder, or leave it out')
  profile = _steps(values.profile)
  if values.dry_run and profile:
    raise UserError('--dry_run has one step and no --profile')
  if values.distributed:
    command.join_hosts()
  from vqrae_jax import sharding
  from vqrae_jax.train import loop, summary

  sharding.compile_afresh_on_cpu()
  if values.dry_run:
    for name, value in loop.dry_run(values.config).items():
      print(f'{name} {value:.6g}')
    return
  name = pathlib.Path(config_flags.get_config_filename(values['config'])).stem
  workdir = pathlib.Path(values.workdir or f'runs/{name}').expanduser()
  figures = loop.train(values.config, workdir, profile)
  print(f'\n{workdir}\n{summary.table(figures)}\n\n{_next_steps(workdir)}')


def _next_steps(workdir: pathlib.Path) -> str:
  lines = []
  if (workdir / 'reconstructions.png').exists():
    lines.append(f'look:        {workdir}/reconstructions.png')
  lines += [
    f'your images: python -m vqrae_jax.reconstruct_images '
    f'--tokenizer={workdir}/tokenizer --images=FOLDER --out=out',
    f'curves:      pip install tensorboard; tensorboard --logdir={workdir}',
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  command.run(main)
