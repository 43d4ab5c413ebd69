"""python -m vqrae_jax.train --config=configs/quickstart.py

Trains the tokenizer of a config, in a workdir of its own. The same command
in the same workdir resumes from the latest checkpoint.

On SIGTERM and Ctrl-C it saves before it exits. The run is in `loop.py`; this
module has only the flags and `jax.distributed`.
"""

import pathlib
import re

from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError
from vqrae_jax.files import Path, to_path

MODULE = 'vqrae_jax.train'
EXAMPLE = f'python -m {MODULE} --config=configs/quickstart.py'
ABOUT = (
  'the run: a file with get_config(), :args after it; --config.a.b=v changes '
  'one of its keys'
)


def _steps(profile: str | None) -> tuple[int, int] | None:
  if not profile:
    return None
  match = re.fullmatch('([0-9]{1,18}):([0-9]{1,18})', profile)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise UserError(f'--profile={profile} must be FIRST:LAST, two step numbers')
  return first, last


def default_workdir(source: str) -> str:
  """runs/CONFIG, or runs/CONFIG-ARGS: each argument has its own run."""
  path, _, args = source.partition(':')
  name = pathlib.Path(path).stem
  return f'runs/{name}-{args.replace("/", "_")}' if args else f'runs/{name}'


def define(values: flags.FlagValues) -> None:
  """The command's flags but --config."""
  text = "the run's folder; runs/CONFIG or runs/CONFIG-ARGS if left out"
  flags.DEFINE_string('workdir', None, text, values)
  flags.DEFINE_bool('dry_run', False, 'run one step and write nothing', values)
  text = 'FIRST:LAST, steps to trace with jax.profiler, to workdir/profile'
  flags.DEFINE_string('profile', None, text, values)
  cli.define_hosts(values)


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, trains."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, define)
  cli.required(values, 'config')
  if values.workdir == '':
    raise UserError('flag --workdir is empty; name a folder, or leave it out')
  profile = _steps(values.profile)
  if values.dry_run and profile:
    raise UserError('--dry_run runs one step; leave --profile out')
  cli.join_hosts(values)
  from vqrae_jax.evaluate.metrics import table
  from vqrae_jax.train import compile_cache, loop

  source = values['config'].default_as_str
  workdir = to_path(values.workdir or default_workdir(source))
  compile_cache.keep_in(None if values.dry_run else workdir)
  if values.dry_run:
    for name, value in loop.dry_run(values.config).items():
      print(f'{name} {value:.6g}')
    print(
      'dry run passed: config, data, weights and one step are in order; '
      'nothing was written'
    )
    return
  figures = loop.train(values.config, workdir, profile)
  print(f'\n{workdir}\n{table(figures)}\n\n{_next_steps(workdir)}')


def _next_steps(workdir: Path) -> str:
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
  cli.run(main)
