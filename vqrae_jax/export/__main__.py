"""python -m vqrae_jax.export --tokenizer=DIR --out=DIR

Exports a tokenizer, or the latest checkpoint of a run (--run), as a bundle:
encode and decode as `jax.export` programs for any batch size on CPU, TPU and
CUDA, with the variables, a version card, and a loader that needs neither this
package nor Flax (`bundle.py` describes the folder).
"""

import re

import jax
from absl import flags

from vqrae_jax import cli, export
from vqrae_jax.errors import UserError
from vqrae_jax.export import bundle
from vqrae_jax.inference import PRECISIONS
from vqrae_jax.ops import trees
from vqrae_jax.specs import DTYPES

MODULE = 'vqrae_jax.export'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer --out=bundle'
)


def _size(text: str, native: tuple[int, int]) -> tuple[int, int] | None:
  if text == 'any':
    return None
  if text == 'native':
    return native
  match = re.fullmatch(r'(\d{1,6})(?:x(\d{1,6}))?', text)
  if not match:
    raise UserError(f'--size={text} must be native, any, H or HxW')
  return int(match[1]), int(match[2] or match[1])


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  text = 'instead of --tokenizer: a run, whose newest intact checkpoint is used'
  flags.DEFINE_string('run', None, text, **keys)
  flags.DEFINE_string('out', None, 'the folder of the bundle, new', **keys)
  text = (
    'image size: native, H, HxW, or any (all multiples of the patch; not with '
    'learned positions or with different patches)'
  )
  flags.DEFINE_string('size', 'native', text, **keys)
  text = '"default", or "canonical": f32 and the highest precision'
  flags.DEFINE_enum('precision', 'default', PRECISIONS, text, **keys)
  text = f'what the programs run on: {", ".join(bundle.PLATFORMS)}'
  flags.DEFINE_list('platforms', 'cpu,tpu,cuda', text, **keys)
  text = 'what the networks compute in: float32 or bfloat16'
  flags.DEFINE_enum('dtype', 'float32', DTYPES, text, **keys)


def main(argv: list[str]) -> None:
  """Parses flags, writes the bundle."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'out')
  if bool(values.tokenizer) == bool(values.run):
    raise UserError('give one of --tokenizer and --run')
  if values.precision == 'canonical' and values['dtype'].present:
    raise UserError('--precision=canonical computes in f32; leave --dtype out')
  _size(values.size, (1, 1))
  out = cli.new_folder(values.out, absent=True)
  # An accelerator would put its own kernels into the programs.
  jax.config.update('jax_platforms', 'cpu')
  options = dict(dtype=values.dtype, scan=True, remat=False)
  if values.tokenizer:
    tokenizer, variables = export.load_tokenizer(
      values.tokenizer, trusted=values.trusted, **options
    )
  else:
    from vqrae_jax.train import initialize

    tokenizer, weights = initialize.of_run(
      values.run, key='--run', trusted=values.trusted
    )
    print(weights.summary)
    tokenizer = tokenizer.with_run_options(**options)
    variables = trees.unflatten(weights.leaves)
    variables = trees.unflatten(export.bake(tokenizer, variables))
  size = _size(values.size, tokenizer.native_size)
  card = bundle.save_bundle(
    tokenizer,
    variables,
    out,
    size=size,
    precision=values.precision,
    platforms=values.platforms,
  )
  for name in ('images', 'indices', 'decoded'):
    print(f'{name}: {card[name]["dtype"]}{card[name]["shape"]}')
  print(f'{out}: fingerprint {card["fingerprint"]}')


if __name__ == '__main__':
  cli.run(main)
