"""python -m vqrae_jax.train.export --run=runs/NAME --out=tokenizer

The tokenizer of a run that was stopped or is still training: the EMA weights
and the codebook of its latest checkpoint, as a finished run leaves them in its
tokenizer/.
"""

import os
from collections.abc import Collection

from absl import flags

from vqrae_jax import cli, export
from vqrae_jax.errors import UserError
from vqrae_jax.files import to_path
from vqrae_jax.ops import trees
from vqrae_jax.train import initialize

MODULE = 'vqrae_jax.train.export'
EXAMPLE = f'python -m {MODULE} --run=runs/quickstart --out=tokenizer'


def export_run(
  run: str | os.PathLike,
  out: str | os.PathLike,
  trusted: Collection[str] = (),
) -> str:
  """Writes the tokenizer of a run's latest checkpoint to `out`; its
  fingerprint. `trusted` is that of `load_tokenizer`.

  Raises:
    UserError: no run there, or no checkpoint that verifies.
  """
  own, target = to_path(run) / 'tokenizer', initialize.reachable(out, '--out')
  if target.exists() and target != own:
    raise UserError(f'--out={out} exists and is not replaced; name another')
  tokenizer, weights = initialize.of_run(run, key='--run', trusted=trusted)
  variables = trees.unflatten(weights.leaves)
  print(weights.summary)
  return export.save_tokenizer(tokenizer, variables, out)


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  flags.DEFINE_string('run', None, 'the workdir of a run', values)
  flags.DEFINE_string('out', None, 'the folder of the tokenizer', values)
  cli.define_trusted(values)


def main(argv: list[str]) -> None:
  """Parses flags, exports."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'run', 'out')
  fingerprint = export_run(values.run, values.out, values.trusted)
  print(f'{values.out}: fingerprint {fingerprint}')


if __name__ == '__main__':
  cli.run(main)
