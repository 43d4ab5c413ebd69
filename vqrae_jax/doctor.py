"""python -m vqrae_jax.doctor --tokenizer=DIR --data=DATA [--out=DIR]

The health of a tokenizer's codebook on images: how many codes are used, which
are copies of others, whether tokens and codes have similar norms, how near
tokens are to another index, and how many indices move under bf16, with the
batch size and with the number of devices. Each finding names the config key
that fixes it; a finding is not an error.

Images are cut into tiles of the size that the tokenizer was made for; smaller
images are enlarged to that size.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError
from vqrae_jax.files import atomic_write

MODULE = 'vqrae_jax.doctor'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer '
  '--data=bundled:photos --out=health'
)
# Findings start beyond these.
_UNUSED = 0.05  # of all codes, above what even use would leave
_UNEVEN = 0.25  # perplexity, of the codes that can be used
_COPIES = 0.01  # near-duplicates, of all codes
_LENGTHS = 3.0  # norms of tokens in those of codes, or the reverse
_MOVED = dict(bfloat16=0.01, float32=0.001)
_TOKENS = 10  # a code, to judge its use
_COLUMNS = 6  # stages side by side in the report


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  cli.define_data(values)
  text = 'a folder for doctor.json and doctor.png, made if absent'
  flags.DEFINE_string('out', None, text, **keys)
  flags.DEFINE_string('json', None, 'the file for the figures, F.json', **keys)
  flags.DEFINE_string('png', None, 'the file for the picture, F.png', **keys)
  text = 'number of images, evenly spaced in the listing; default: all'
  flags.DEFINE_integer('images', None, text, lower_bound=1, **keys)
  text = 'tiles at once'
  flags.DEFINE_integer('batch_size', 32, text, lower_bound=1, **keys)


def main(argv: list[str]) -> None:
  """Parses flags, examines, prints the report, writes the files."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'tokenizer', 'data')
  files = _files(values)
  report, page = examine(
    values.tokenizer,
    values.data,
    values.images,
    values.batch_size,
    values.trusted,
  )
  print(as_text(report))
  for ending, path in files.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
      if ending == '.png':
        page.save(file, format='PNG')
      else:
        file.write((json.dumps(report, allow_nan=False) + '\n').encode())
  if files:
    print('\nwrote ' + ' and '.join(map(str, files.values())))


def _files(values: flags.FlagValues) -> dict[str, pathlib.Path]:
  """{ending: file} that the flags ask for."""
  single = {
    f'.{n}': getattr(values, n) for n in ('json', 'png') if getattr(values, n)
  }
  if values.out is None:
    return {
      end: cli.new_file(path, end, f'--{end[1:]}')
      for end, path in single.items()
    }
  if single:
    raise UserError('--out names both files; leave --json and --png out')
  out = cli.new_folder(values.out)
  return {end: out / f'doctor{end}' for end in ('.json', '.png')}


def examine(
  tokenizer_dir: str,
  data: str,
  images: int | None = None,
  batch_size: int = 32,
  trusted: Collection[str] = (),
) -> tuple[dict, Any]:
  """(the report as JSON values, the picture) of a tokenizer on images.

  Args:
    tokenizer_dir: what `load_tokenizer` opens.
    data: what `open_source` opens.
    images: how many of them, evenly spaced; None for all.
    batch_size: tiles at once, brought up to a multiple of the devices.
    trusted: that of `load_tokenizer`.

  Raises:
    UserError: a continuous tokenizer, fewer images than asked for, or none
      that can be read.
  """
  import jax
  from tqdm import tqdm

  from vqrae_jax import export, sharding
  from vqrae_jax.data import pipeline
  from vqrae_jax.data.sources import choose_images, open_source
  from vqrae_jax.evaluate import codebooks, visualize
  from vqrae_jax.models.tokenizer import describe
  from vqrae_jax.quantizers.nested import innermost

  sharding.compile_afresh_on_cpu()
  source = open_source(data)
  chosen = choose_images(source, images, data)
  tokenizer, variables = export.load_tokenizer(tokenizer_dir, trusted=trusted)
  if not tokenizer.codebook_size:
    raise UserError(
      f'{tokenizer_dir} is continuous (model.quantizer.name="none"): it has no '
      'codes to examine'
    )
  size = tokenizer.native_size
  skipped = []

  def cut(image):
    if image.shape[0] < size[0] or image.shape[1] < size[1]:
      return pipeline.centre_crop(image, size)[None]
    return pipeline.tiles(image, size)

  def skip(index, error):
    skipped.append(error)
    tqdm.write(f'{source.name(index)}  skipped: {error.reason}')

  devices = jax.local_devices()
  batch_size = -(-batch_size // len(devices)) * len(devices)
  with tqdm(unit='tile', disable=None) as bar:
    stages = codebooks.gather(
      tokenizer,
      variables,
      pipeline.eval_batches(source, cut, batch_size, chosen, skip),
      devices,
      bar.update,
    )
  if not stages:
    raise skipped[-1]

  module, _ = innermost(tokenizer.quantizer, '')
  levels = module if hasattr(type(module), 'digits') else None
  figures = functools.partial(
    codebooks.figures, codebook_size=tokenizer.codebook_size, part=levels
  )
  found = [figures(stage) for stage in stages]
  tables: dict[str, list] = {}
  for stage, (_, table) in zip(
    stages, tokenizer.quantizer.search_names, strict=True
  ):
    tables.setdefault(table, []).append(stage)
  # A table that several searches share is judged by all of them together.
  shared = [s for s in tables.values() if len(s) > 1]
  together = []
  for group in shared if levels is None else ():
    whole = codebooks.merged(group)
    whole.name = 'all' if len(shared) == 1 else f'all of {group[0].name}'
    together.append((whole, figures(whole)))
  judged = [f for _, f in together] or found
  report = dict(
    tokenizer=str(tokenizer_dir),
    quantizer=describe(tokenizer)['quantizer'],
    data=data,
    images=len(chosen) - len(skipped),
    skipped=len(skipped),
    devices=len(devices),
    batch_size=batch_size,
    stages=found,
    together=[f for _, f in together],
    findings=findings(tokenizer.quantizer, judged),
  )
  shown = [s for s, _ in together] or stages
  title = (
    f'{report["quantizer"]["name"]}, {tokenizer.codebook_size} codes: '
    f'{tokenizer_dir} on {data}, {report["images"]} images'
  )
  page = visualize.codebook_page(list(zip(shown, judged, strict=True)), title)
  for stage in (*found, *report['together']):
    stage.pop('counts')
  return report, page


# ----------------------------------------------------------------------------
# Findings.


class _Keys:
  """The keys of a quantizer's config that a finding may name."""

  def __init__(self, quantizer: Any):
    from vqrae_jax.quantizers import Nested, name_of
    from vqrae_jax.quantizers.nested import innermost, value_of

    inner, key = innermost(quantizer, 'model.quantizer')
    self.outer, self.prefix = 'model.quantizer.', f'{key}.'
    self.nested, self.dtype = isinstance(quantizer, Nested), quantizer.dtype
    self.name = name_of(inner)
    self.value: Callable = lambda field: value_of(inner, field, None)
    self.losses = inner.loss_names
    self.projection = quantizer.projection

  def unless(self, **fields: Any) -> list[str]:
    """The keys of those fields that have another value now."""
    if self.value('distance') == 'cosine':  # unit vectors as they are
      fields.pop('normalize', None)
    return [
      f'{self.prefix}{name}={json.dumps(v) if isinstance(v, str) else v}'
      for name, v in fields.items()
      if self.value(name) not in (None, v, 'kmeans++')
    ]

  def loss(self, **weights: float) -> list[str]:
    """The keys of those losses that this quantizer has."""
    return [f'losses.{n}={w}' for n, w in weights.items() if n in self.losses]

  def projected(self) -> list[str]:
    """An MLP in front of the codes, where there is none."""
    if 'mlp' in (self.projection, self.value('adapter_in')):
      return []
    return [f'{self.outer}projection="mlp"']

  def fewer(self, size: int, used: int) -> list[str]:
    """A codebook no larger than what is used, a power of two."""
    fits = 2 ** max(math.ceil(math.log2(max(used, 1))), 1)
    if self.value('num_codes') is None or fits >= size:
      return []
    return [f'{self.prefix}num_codes={fits}']

  def use(self, size: int, used: int) -> list[str]:
    """What makes more codes used; the first that are not set yet."""
    if self.name == 'vq' and self.value('update') == 'gradient':
      found = self.unless(update='ema')
    elif self.name == 'vq':
      revive = [] if self.value('revive_below') else [0.1]
      found = [
        f'{self.prefix}revive_below={x} with update="ema"' for x in revive
      ]
      found += self.unless(data_init=True)
    elif self.name == 'simvq':
      found = self.unless(basis_init='tokens')
      found += [] if self.nested else self.unless(normalize=True)
    else:
      found = self.projected() if self.name in ('fsq', 'lfq', 'bsq') else []
    found += self.loss(entropy=0.1, kl=5e-4) or self.loss(diversity=0.1)
    found = found[:2]
    found = found or [*self.fewer(size, used), *self.projected()]
    return [*found, 'duration=… (train longer)']

  def sizes(self) -> list[str]:
    """What brings tokens and codes to one size."""
    if self.nested:
      return [*self.unless(data_init=True), *self.unless(basis_init='tokens'),
              'model.latents.norm="channel"'][:2]  # fmt: skip
    if self.name == 'simvq':
      found = self.unless(normalize=True)
    else:
      found = [] if self.value('affine') else self.unless(distance='cosine')
      found += self.unless(data_init=True)
    return found or ['model.latents.norm="channel"']


def findings(quantizer: Any, stages: list[dict]) -> list[dict[str, Any]]:
  """What is wrong with a quantizer, by the figures of its tables: "stage", ""
  if it has one; "what", one sentence; "keys" of the config that cure it, each
  with the value that helps."""
  keys = _Keys(quantizer)
  return [
    dict(stage=f['name'] * (len(stages) > 1), what=what, keys=cures)
    for f in stages
    for what, cures in _of_stage(keys, f)
  ]


def _percent(share: float) -> str:
  """41 %, 4.1 %, 0.04 %; 100 % of all only."""
  if 0.995 <= share < 1:
    return f'{min(100 * share, 99.9):.1f} %'
  digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2
  return f'{100 * share:.{digits}f} %'


def _of_stage(keys: _Keys, f: dict) -> list[tuple[str, list[str]]]:
  """(what, keys) of one table's figures; the first explain those after."""
  k, n = f['codes'], f['tokens']
  if f.get('codes_not_finite'):
    return [
      (
        f'{f["codes_not_finite"]} of {k} codes are NaN or infinite, yet tokens '
        'still get an index: go back to an earlier checkpoint and continue '
        'with clipped gradients or a lower learning rate',
        ['optim.clip=1.0', 'schedules=… dict(lr=…)'],
      )
    ]
  if f['tokens_not_finite']:
    share = _percent(f['tokens_not_finite'] / n)
    what = f'{share} of tokens are NaN or infinite; their indices mean nothing'
    return [(what, ['model.dtype="float32"', 'optim.clip=1.0'])]
  found = []
  lengths = f.get('code_norm') and _lengths(f)
  if lengths:
    found.append((lengths, keys.sizes()))
  cures = keys.use(k, f['used'])
  if f['unused'] > f['unused_if_even'] + _UNUSED:
    few, even = '', _percent(f['unused_if_even'])
    if n < _TOKENS * k:
      few = f' (on {n:,} tokens; even use would leave {even} unused)'
    what = f'{_percent(f["unused"])} of codes are never used{few}'
    found.append((what, cures))
  elif f['perplexity'] < _UNEVEN * min(k, n):
    what = (
      f'codes are used unevenly: perplexity {f["perplexity"]:.0f} of {k} codes'
    )
    found.append((what, cures))
  elif n < _TOKENS * k:
    what = (
      f'{n:,} tokens are too few to judge the usage of {k:,} codes: use at '
      f'least {_TOKENS * k:,}'
    )
    found.append((what, ['--data=… (more images)']))
  narrow = _narrow_channels(f)
  if narrow:
    found.append(
      (
        narrow,
        keys.projected()
        or keys.loss(commit=0.25, entropy=0.1)
        or ['model.latents.norm="channel"'],
      )
    )
  if f.get('near_duplicates', 0) > _COPIES * k:
    what = (
      f'{_percent(f["near_duplicates"] / k)} of codes are near-duplicates: '
      'closer to another code than a tenth of the distance from tokens to codes'
    )
    cures = keys.loss(orthogonal=0.01) or keys.unless(update='ema')
    cures += keys.fewer(k, k - f['near_duplicates'])
    found.append((what, cures or keys.use(k, f['used'])))
  error = f.get('relative_error')
  if k > 1 and error is not None and error >= 1:
    what = (
      'tokens are farther from their codes than from their own mean: the '
      'codes are not where the tokens are'
    )
    cures = keys.unless(data_init=True, basis_init='tokens')
    found.append((what, cures or keys.use(k, f['used'])))
  return found + _unstable(keys, f)


def _lengths(f: dict) -> str:
  tokens, codes = f['token_norm']['median'], f['code_norm']['median']
  for long, short, names in (
    (tokens, codes, ('tokens', 'codes')),
    (codes, tokens, ('codes', 'tokens')),
  ):
    if long > _LENGTHS * short:
      times = f'{long / short:.0f} times' if short else 'infinitely'
      return f'norms of {names[0]} are {times} those of {names[1]}'
  return ''


def _narrow_channels(f: dict) -> str:
  """Channels of FSQ or LFQ that use less than half of their levels."""
  effective, levels = f.get('effective_levels', ()), f.get('levels', ())
  narrow = [
    i
    for i, (e, x) in enumerate(zip(effective, levels, strict=True))
    if e < len(x) / 2 or e < 1.1
  ]
  if not narrow:
    return ''
  i = narrow[0]
  return (
    f'{len(narrow)} of {len(levels)} channels use few of their levels (channel '
    f'{i} effectively uses {effective[i]:.1f} of {len(levels[i])})'
  )


def _unstable(keys: _Keys, f: dict) -> list[tuple[str, list[str]]]:
  """Indices that another dtype, batch or number of devices moves; bf16 only
  those of a tokenizer that computes in it."""
  found = []
  canonical = 'precision="canonical" in encode_to_indices'
  for what, share in f['moved'].items():
    if share <= _MOVED[what.rpartition(' ')[2]]:
      continue
    if keys.dtype == 'float32' and what.endswith('bfloat16'):
      continue
    if what == 'bfloat16':
      text = f'{_percent(share)} of indices move under bf16'
      found.append((text, ['model.dtype="float32"', canonical]))
      continue
    kind, dtype = what.split(', ')
    if dtype in f['moved'] and f['moved'][dtype] > _MOVED[dtype]:
      continue  # it goes with the dtype
    text = (
      f'{_percent(share)} of {dtype} indices change with the {_CHANGES[kind]}'
    )
    one = 'a fixed batch size' if kind == 'batch size' else 'the same devices'
    cure = canonical if dtype == 'bfloat16' else f'{one} when tokenizing'
    found.append((text, [cure]))
  return found


_CHANGES = {'batch size': 'batch size', 'devices': 'number of devices'}


# ----------------------------------------------------------------------------
# The report as text.


def as_text(report: dict) -> str:
  """The report as a user reads it."""
  stages = [*report['together'], *report['stages']]
  n = report['images']
  lost = f' ({report["skipped"]} skipped)' if report['skipped'] else ''
  lines = [
    f'{report["tokenizer"]}: {report["quantizer"]["name"]}',
    f'{n} image{"s" * (n != 1)}{lost} of {report["data"]}',
    '',
  ]
  for at in range(0, len(stages), _COLUMNS):
    lines += [*_table(stages[at : at + _COLUMNS]), '']
  # The scales of a multi-scale quantizer have unlike numbers of codes.
  if len(report['stages']) > 1 and report['quantizer']['name'] != 'multiscale':
    used = sum(f['effective_bits'] for f in report['stages'])
    bits = sum(f['bits'] for f in report['stages'])
    lines += [
      f'all codes of a token: {used:.2f} effective bits of {bits:.2f}',
      '',
    ]
  if not report['findings']:
    return '\n'.join([*lines, 'findings: none'])
  lines.append('findings')
  for i, finding in enumerate(report['findings'], 1):
    stage = f'{finding["stage"]}: ' if finding['stage'] else ''
    lines.append(f'{i}. {stage}{finding["what"]}')
    lines.append(f'   cure: {", or ".join(finding["keys"])}')
  return '\n'.join(lines)


def _table(stages: list[dict]) -> list[str]:
  """Lines of figures, a column a stage."""

  def norm(values):
    return f'{values["median"]:.3g}' if values else '-'

  def number(value):
    return '-' if value is None else f'{value:.3g}'

  def margin(f, name):
    return number((f.get('margins') or {}).get(name))

  first = stages[0]
  rows: dict[str, Callable[[dict], str]] = {
    '': lambda f: f['name'],
    'tokens': lambda f: f'{f["tokens"]:,}',
    'codes': lambda f: f'{f["codes"]:,}',
    'used': lambda f: f'{f["used"]:,}',
    'usage': lambda f: _percent(f['usage']),
    'perplexity': lambda f: f'{f["perplexity"]:.1f}',
    'effective bits': lambda f: f'{f["effective_bits"]:.2f} of {f["bits"]:.2f}',
    'token norm, median': lambda f: norm(f['token_norm']),
  }
  if 'levels' in first:
    rows['levels used, fewest'] = lambda f: str(min(f['levels_used']))
  if 'code_norm' in first:
    rows |= {
      'code norm, median': lambda f: norm(f['code_norm']),
      'near-duplicate codes': lambda f: f'{f["near_duplicates"]:,}',
      'distance to code, mean': lambda f: number(f['distance']),
      'error, of token variance': lambda f: number(f['relative_error']),
      'margin, median': lambda f: margin(f, 'median'),
      'margin, 5 % below': lambda f: margin(f, 'p5'),
    }
  for what in first['moved']:
    rows[f'moved by {what}'] = lambda f, what=what: _percent(f['moved'][what])
  lines = []
  for label, value in rows.items():
    cells = ''.join(f'{value(f):>16}' for f in stages)
    if cells.strip():
      lines.append(f'{label:28}{cells}')
  return lines


if __name__ == '__main__':
  cli.run(main)
